"""Reads the schedule out of a compiled TPU program's text (`compiled.as_text()`, is_scheduled=true).

The order of the instructions of a computation is the order in which the core starts them. Of each fusion the compiler says how
many cycles it reckons with (backend_config, estimated_cycles); a loop's body has to be counted as often as it runs, which
cost_analysis does not do (spec/tpu.md section 2). Pallas kernels carry no estimate, and collectives no time on the links.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

# bits of an element; what is not here (token, opaque) has no bytes
_BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_HOST = "S(5)"  # the memory space of the host in a layout; HBM has none, VMEM is S(1)
_IN_HBM = re.compile(r"\b[a-z]\w*\[[\d,]*\](?:\{(?![^}]*S\()[^}]*\})?(?!\{)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str  # what stands between the parentheses

    @property
    def cycles(self) -> int:
        """The compiler's estimate, 0 where there is none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else 0

    @property
    def op_name(self) -> str:
        """Where it comes from: the path of jax functions and modules."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def called(self, *keys: str) -> str:
        """Name of the computation under the first of `keys` ("body", "calls", ...) that is there, else ""."""
        for key in keys:
            match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
            if match:
                return match[1]
        return ""


@dataclasses.dataclass(frozen=True)
class Module:
    """All computations by name, and which one is the program."""

    computations: dict[str, list[Instruction]]
    entry: str
    num_partitions: int


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and dimensions of every array of a shape, tuples flattened; tokens are left out."""
    return [
        (kind, tuple(int(n) for n in dims.split(",") if n))
        for kind, dims in _ARRAY.findall(shape)
        if kind in _BITS or kind.startswith("f8")
    ]


def shape_bytes(shape: str) -> int:
    """Bytes of a shape without padding: "(f32[2,3]{1,0}, bf16[4])" -> 32."""
    return sum(math.prod(dims) * _BITS.get(kind, 8) // 8 for kind, dims in arrays(shape))


def _balance(line: str) -> int:
    return line.count("{") - line.count("}")


def parse(text: str) -> Module:
    """The program's computations. An instruction may go over several lines (a Pallas call's metadata does)."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    entry, pending, depth = "", "", 0
    match = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    num_partitions = int(match[1]) if match else 1
    for line in text.splitlines():
        if pending:
            pending += " " + line.strip()
            depth += _balance(line)
        elif current is None:
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            continue
        elif line.startswith("}"):
            current = None
            continue
        elif _INSTRUCTION.match(line):
            pending, depth = line, _balance(line)
        if pending and depth <= 0 and current is not None:
            current.append(_instruction(pending))
            pending = ""
    if not entry:
        raise ValueError("this text has no ENTRY computation: it is not a compiled program")
    return Module(computations, entry, num_partitions)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _instruction(line: str) -> Instruction:
    match = _INSTRUCTION.match(line)
    assert match
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = re.match(r"\s*([\w\-]+)", rest[end:])
    start = rest.index("(", end)
    stop = _closing(rest, start)
    literal = rest[start + 1 : stop]
    return Instruction(
        match[1], rest[:end], opcode[1] if opcode else "", tuple(_NAME.findall(literal)), rest[stop + 1 :], literal
    )


def trip_count(module: Module, loop: Instruction) -> int:
    """How often a while loop runs: what XLA knows, else the bound that its condition compares with (from 0, as scan counts).

    Raises ValueError where there is neither: a loop counted once would make every figure wrong.
    """
    known = re.search(r'known_trip_count"?:\s*\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    bounds: list[int] = []
    pending = [loop.called("condition")]
    while pending:
        for instruction in module.computations.get(pending.pop(), []):
            if instruction.opcode == "constant" and instruction.literal.lstrip("-").isdigit():
                bounds.append(int(instruction.literal))
            if instruction.opcode == "fusion":
                pending.append(instruction.called("calls"))
    if not bounds:
        raise ValueError(f"no trip count of {loop.name}")
    return max(bounds)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Fields:
      wire_bytes: that a device sends, with the algorithm that sends least: (n - 1) / n of the whole for a gather, twice that
        for an all-reduce, its own block for a permute.
      slices: how many slices a group spans (1: all of it within one).
      mode: "sync"; "async" (a start and a done); "sparsecore" (the same, on its own processor); "fused" (inside of a fusion
        with computation, whose cycles hide it).
    """

    name: str
    kind: str
    op_name: str
    group: int
    slices: int
    wire_bytes: float
    mode: str


def groups(attributes: str, num_partitions: int) -> np.ndarray:
    """replica_groups as an array (groups, devices of a group), in any of the three ways they are written."""
    text = attributes[attributes.find("replica_groups=") + len("replica_groups=") :]
    everyone = np.arange(num_partitions).reshape(1, -1)
    explicit = re.match(r"\{(\{[\d,{} ]*\})\}", text)
    if explicit:
        rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d, ]+)\}", explicit[0])]
        return np.array(rows) if rows else everyone
    iota = re.match(r"\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        return _iota(iota[2]).reshape([int(n) for n in iota[1].split(",")])
    mesh = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)(?= \{))? \{([^}]*)\}", text)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", mesh[2] or "")
        ids = _iota(f"<=[{order[1]}]" + (f"T({order[2]})" if order[2] else "")) if order else np.arange(num_partitions)
        shape, chosen = [], []
        # 'axis':(a)b is the part of size b of an axis, after a part of size a
        wanted = {name: part for name, part in re.findall(r"'([^']+)'(:\(\d+\)\d+)?", mesh[3])}
        for name, size in sizes.items():
            parts = [size]
            if wanted.get(name):
                before, own = (int(n) for n in re.findall(r"\d+", wanted[name]))
                parts = [before, own, size // (before * own)]
                chosen.append(len(shape) + 1)
            elif name in wanted:
                chosen.append(len(shape))
            shape += parts
        rest = [i for i in range(len(shape)) if i not in chosen]
        width = math.prod(shape[i] for i in chosen)
        return ids.reshape(shape).transpose(rest + chosen).reshape(-1, width)
    return everyone


def _iota(text: str) -> np.ndarray:
    dims, order = re.fullmatch(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()  # pyright: ignore
    shape = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).reshape(-1)


def collective(instruction: Instruction, num_partitions: int, num_slices: int, mode: str) -> Collective | None:
    """What an instruction exchanges; None where it is no collective, or the second half of one."""
    started = instruction.opcode.endswith("-start")
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?\})\}", instruction.attributes)
        rows = np.array(
            [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", pairs[0] if pairs else "")]
        )
        rows = rows.reshape(-1, 2)
        moved = rows[rows[:, 0] != rows[:, 1]]
        group = 2 if len(moved) else 1
    else:
        moved = groups(instruction.attributes, num_partitions)
        group = moved.shape[1]
    per_slice = max(num_partitions // num_slices, 1)
    slices = max((len(set(row // per_slice)) for row in moved), default=1)
    size = shape_bytes(instruction.shape)
    if started and kind == "collective-permute":
        size = size // 2  # input and output
    elif started and kind == "all-gather":
        size = size * group // (group + 1)  # the shape holds the input too
    elif started and kind == "reduce-scatter":
        size = size // (group + 1)
    share = (group - 1) / group
    wire = {
        "all-gather": size * share,
        "all-reduce": 2 * size * share,
        "reduce-scatter": size * (group - 1),
        "collective-permute": size if len(moved) else 0,
    }.get(kind, size * share)
    mode = "async" if started and mode == "sync" else mode
    return Collective(instruction.name, kind, instruction.op_name, group, slices, float(wire), mode)


@dataclasses.dataclass(frozen=True)
class Compute:
    """A fusion, copy or reduction.

    Fields:
      category: matmul, copy, reduce, elementwise, ...
      hbm_bytes: of its results and operands in HBM. More than it moves where it takes a slice out of an operand.
    """

    instruction: Instruction
    cycles: int
    category: str
    hbm_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas call, with the shapes of its operands: there is no estimate."""

    instruction: Instruction
    operand_shapes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its name without the number that makes it unique."""
        return re.sub(r"[.\d]+$", "", self.instruction.name)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A synchronous collective, or the start of one that ends at `Done(key)`."""

    collective: Collective
    key: str  # "" for synchronous ones


@dataclasses.dataclass(frozen=True)
class Done:
    key: str


@dataclasses.dataclass(frozen=True)
class HostCopy:
    """Bytes between the device's memory and the host's."""

    size: int


@dataclasses.dataclass(frozen=True)
class Loop:
    trips: int
    body: tuple["Event", ...]


Event = Compute | Kernel | Exchange | Done | HostCopy | Loop


def schedule(module: Module, num_slices: int = 1) -> tuple[Event, ...]:
    """What the core does, in order. Raises ValueError for a loop without a trip count."""
    matmul: dict[str, bool] = {}

    def compute(instruction: Instruction, category: str, shapes: dict[str, str]) -> Compute:
        touched = [instruction.shape, *(shapes.get(operand, "") for operand in instruction.operands)]
        size = sum(shape_bytes(array) for shape in touched for array in _IN_HBM.findall(shape))
        return Compute(instruction, instruction.cycles, category, size)

    def has_matmul(name: str) -> bool:
        if name not in matmul:
            matmul[name] = False
            matmul[name] = any(
                i.opcode in ("convolution", "dot") or (i.opcode == "fusion" and has_matmul(i.called("calls")))
                for i in module.computations.get(name, [])
            )
        return matmul[name]

    def inside(name: str) -> Iterator[Instruction]:
        for instruction in module.computations.get(name, []):
            yield instruction
            if instruction.opcode in ("fusion", "call", "async-start"):
                yield from inside(instruction.called("calls", "to_apply"))

    def category(instruction: Instruction) -> str:
        if instruction.opcode == "convolution" or (
            instruction.opcode == "fusion" and has_matmul(instruction.called("calls"))
        ):
            return "matmul"
        if instruction.opcode == "fusion":
            return "reduce" if "reduce" in instruction.name else "copy" if "copy" in instruction.name else "elementwise"
        return instruction.opcode

    def walk(name: str) -> Iterator[Event]:
        shapes = {i.name: i.shape for i in module.computations[name]}
        # start, step and done of one exchange may each be a fusion that repeats it: it lasts from the first to the last
        fused: dict[str, tuple[Collective, str, str]] = {}
        for instruction in module.computations[name]:
            for part in inside(instruction.called("calls")) if instruction.opcode == "fusion" else ():
                found = collective(part, module.num_partitions, num_slices, "fused")
                if found:
                    channel = re.search(r"channel_id=(\d+)", part.attributes)
                    key = channel[1] if channel else part.name
                    first = fused[key][:2] if key in fused else (found, instruction.name)
                    fused[key] = (*first, instruction.name)
        for instruction in module.computations[name]:
            opcode = instruction.opcode
            if opcode == "while":
                yield Loop(trip_count(module, instruction), tuple(walk(instruction.called("body"))))
            elif opcode == "call":
                yield from walk(instruction.called("to_apply", "calls"))
            elif opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                names = _NAME.findall(branches[1]) if branches else []
                names = names or [instruction.called("true_computation"), instruction.called("false_computation")]
                # the branch that takes longest: an upper bound
                yield from max((tuple(walk(branch)) for branch in names if branch), key=_cycles, default=())
            elif opcode in ("call-start", "async-start"):
                mode = "sparsecore" if "sparsecore" in instruction.attributes else "async"
                for part in inside(instruction.called("to_apply", "calls")):
                    found = collective(part, module.num_partitions, num_slices, mode)
                    if found:
                        yield Exchange(found, instruction.name)
            elif opcode in ("copy-start", "copy") and _HOST in instruction.shape + shapes.get(
                next(iter(instruction.operands), ""), ""
            ):
                yield HostCopy(shape_bytes(instruction.shape) // (2 if opcode == "copy-start" else 1))
            elif opcode == "custom-call":
                if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
                    yield Kernel(instruction, tuple(shapes.get(operand, "") for operand in instruction.operands))
                elif instruction.cycles:
                    yield compute(instruction, "custom-call", shapes)
            elif opcode.endswith("-done") or opcode.endswith("-update"):
                if opcode.endswith("-done"):
                    yield Done(instruction.operands[0] if instruction.operands else "")
            elif opcode.removesuffix("-start") in COLLECTIVES:
                found = collective(instruction, module.num_partitions, num_slices, "sync")
                if found:
                    yield Exchange(found, instruction.name if opcode.endswith("-start") else "")
            else:
                for key, (exchange, first, _) in fused.items():
                    if first == instruction.name:
                        yield Exchange(exchange, f"fused {key}")
                if instruction.cycles:
                    yield compute(instruction, category(instruction), shapes)
                for key, (_, _, last) in fused.items():
                    if last == instruction.name:
                        yield Done(f"fused {key}")

    return tuple(walk(module.entry))


def _cycles(events: tuple[Event, ...]) -> int:
    total = 0
    for event in events:
        if isinstance(event, Compute):
            total += event.cycles
        elif isinstance(event, Loop):
            total += event.trips * _cycles(event.body)
    return total
