"""Seconds, efficiency and money from a schedule. Everything here is a prediction: nothing has been measured on a TPU.

A step is played as one core that does its work in order, with one queue for what goes over the links: a synchronous exchange
holds the core, an asynchronous one holds it only at its end, if it is not there yet. The rates (spec/tpu.md section 8):

    XLA's fusions     the compiler's estimated_cycles x how often they run / the clock
    attention kernels FLOPs of their matmuls / (peak x a stated share of it, plan/topology.py)
    other kernels     bytes read and written / (HBM bandwidth x KERNEL_BANDWIDTH)
    collectives       bytes on the wire / (links of the group x a link's bandwidth); between slices the chip's network share

Not in it: the host, its copies, the input pipeline, launch and DMA latencies, stragglers, contention with checkpoints.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from cogvideox_jax.plan import hlo
from cogvideox_jax.plan.topology import Chip, Topology

KERNEL_BANDWIDTH = 0.7  # share of HBM's bandwidth that a streaming Pallas kernel reaches; an assumption
# matmuls of 2 l m d FLOPs a head that each attention kernel does
_FORWARD, _FUSED_BACKWARD, _DKV, _DQ = 2, 5, 4, 3


def attention_shape(kernel: hlo.Kernel) -> tuple[int, int, int, int] | None:
    """(heads of the whole batch, queries, keys, head dim) of an attention kernel, from its first two large operands.

    They are (..., length, dim) or (..., dim, length): a sequence is longer than a head is wide.
    """
    large = [
        dims
        for shape in kernel.operand_shapes
        for kind, dims in hlo.arrays(shape)
        if len(dims) >= 3 and kind[0] in "bf"
    ]
    if len(large) < 2:
        return None
    q, k = large[:2]
    return math.prod(q[:-2]), max(q[-2:]), max(k[-2:]), min(q[-2:])


def kernel_flops(kernel: hlo.Kernel) -> tuple[float, str]:
    """FLOPs of an attention kernel's matmuls and "forward" or "backward"; (0, "") for other kernels."""
    name = kernel.name + " " + kernel.instruction.op_name
    shape = attention_shape(kernel)
    if shape is None or not re.search(r"splash|flash|mha|attention", name):
        return 0.0, ""
    heads, queries, keys, dim = shape
    unit = 2.0 * heads * queries * keys * dim
    own = kernel.name
    if "dkv" in own:
        outputs = [dims for _, dims in hlo.arrays(kernel.instruction.shape) if len(dims) >= 3 and min(dims[-2:]) == dim]
        return (_FUSED_BACKWARD if len(outputs) > 2 else _DKV) * unit, "backward"
    if "dq" in own:
        return _DQ * unit, "backward"
    return (_FUSED_BACKWARD * unit, "backward") if "bwd" in own else (_FORWARD * unit, "forward")


def kernel_seconds(kernel: hlo.Kernel, chip: Chip) -> float:
    """Seconds of one call on one device."""
    flops, direction = kernel_flops(kernel)
    if flops:
        shape = attention_shape(kernel)
        assert shape
        share = chip.attention_forward if direction == "forward" else chip.attention_backward
        return flops / (chip.peak_flops / chip.devices * min(share * shape[3] / 64, 0.95))
    size = hlo.shape_bytes(kernel.instruction.shape) + sum(map(hlo.shape_bytes, kernel.operand_shapes))
    return size / (chip.hbm_bandwidth / chip.devices * KERNEL_BANDWIDTH)


def exchange_seconds(exchange: hlo.Collective, topology: Topology) -> float:
    """Seconds on the links, without latency. Groups are taken to be neighbours, as make_mesh lays them."""
    if exchange.group < 2:
        return 0.0
    chip = topology.chip
    # the share of the bytes that crosses slices: a hierarchical algorithm sends each byte across once
    across = exchange.wire_bytes * (exchange.slices - 1) / (exchange.group - 1)
    if exchange.kind == "collective-permute":
        across = exchange.wire_bytes if exchange.slices > 1 else 0.0
        links, hops = 1, 1.0
    else:
        links, hops = topology.axis_links(exchange.group // exchange.slices), 1.0
        if exchange.kind in ("all-to-all", "ragged-all-to-all"):
            # to a partner that is a quarter of a ring away on average, over links that others use too
            hops = max(1.0, exchange.group / exchange.slices / 8)
    inside = (exchange.wire_bytes - across) * hops / (links * chip.link_bandwidth)
    return inside + across / (chip.network_bandwidth / chip.devices)


@dataclasses.dataclass
class Timeline:
    """Seconds of one step and what they are made of.

    Fields:
      serial: with nothing overlapped; overlapped: with everything; scheduled: as played, which is the prediction.
      wire_bytes: by (kind, group, mode); calls: how often.
      fusions: seconds by (category, phase, name of the function that it comes from).
      exposed: seconds that the core waits for the links.
      xla_floor: what XLA's fusions would take if those without a matmul ran at HBM's full bandwidth; see `floor`.
    """

    xla: float = 0.0
    xla_floor: float = 0.0
    kernels: float = 0.0
    links: float = 0.0
    exposed: float = 0.0
    scheduled: float = 0.0
    host_bytes: float = 0.0
    wire_bytes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    calls: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    link_seconds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    fusions: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    kernel_seconds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    windows: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def serial(self) -> float:
        return self.xla + self.kernels + self.links

    @property
    def floor(self) -> float:
        """Full overlap, and all that is not a matmul at HBM's bandwidth: a lower bound.

        The compiler's estimates count elements and not bytes, so for bfloat16 they are twice or more what the bandwidth allows.
        """
        return max(self.xla_floor + self.kernels, self.links)

    @property
    def overlapped(self) -> float:
        return max(self.xla + self.kernels, self.links)

    @property
    def async_share(self) -> float:
        """Share of the bytes on the wire that leave the core free; 1 where nothing is sent."""
        total = sum(self.wire_bytes.values())
        return sum(size for (_, _, mode), size in self.wire_bytes.items() if mode != "sync") / total if total else 1.0


def phase(op_name: str) -> str:
    """Which part of a training step an instruction comes from."""
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "update"


def play(events: Sequence[hlo.Event], topology: Topology) -> Timeline:
    """The timeline of a schedule."""
    line = Timeline()

    def run(events: Sequence[hlo.Event], trips: int) -> float:
        """Seconds of the events once; what they add to the sums counts `trips` times."""
        now = link_free = 0.0
        ends: dict[str, tuple[float, float, hlo.Collective]] = {}
        for event in events:
            if isinstance(event, hlo.Compute):
                seconds = event.cycles / topology.chip.clock_hz
                now += seconds
                line.xla += seconds * trips
                streamed = event.hbm_bytes / (topology.chip.hbm_bandwidth / topology.chip.devices)
                line.xla_floor += (seconds if event.category == "matmul" else min(seconds, streamed)) * trips
                op_name = event.instruction.op_name
                line.fusions[event.category, phase(op_name), label(op_name, event.instruction.name)] += seconds * trips
            elif isinstance(event, hlo.Kernel):
                seconds = kernel_seconds(event, topology.chip)
                now += seconds
                line.kernels += seconds * trips
                line.kernel_seconds[event.name] += seconds * trips
                line.calls["kernel", event.name] += trips
            elif isinstance(event, hlo.Loop):
                # nothing is in flight across iterations: what a body starts, it ends
                now += event.trips * run(event.body, trips * event.trips)
            elif isinstance(event, hlo.HostCopy):
                line.host_bytes += event.size * trips
            elif isinstance(event, hlo.Exchange):
                exchange = event.collective
                key = (exchange.kind, exchange.group, exchange.mode)
                seconds = exchange_seconds(exchange, topology)
                line.wire_bytes[key] += exchange.wire_bytes * trips
                line.link_seconds[key] += seconds * trips
                line.calls[key] += trips
                line.links += seconds * trips
                begin = max(now, link_free)
                link_free = begin + seconds
                if event.key:
                    ends[event.key] = (now, max(link_free, ends[event.key][1] if event.key in ends else 0.0), exchange)
                else:
                    line.exposed += (link_free - now) * trips
                    now = link_free
            elif event.key in ends:
                start, end, exchange = ends.pop(event.key)
                line.windows[exchange.kind, exchange.group, exchange.mode] += (now - start) * trips
                if end > now:
                    line.exposed += (end - now) * trips
                    now = end
        return max(now, link_free)

    line.scheduled = run(events, 1)
    return line


def label(op_name: str, name: str) -> str:
    """The last parts of a path of functions, without what every path has."""
    dull = ("while", "body", "closed_call", "checkpoint", "rematted_computation")
    parts = [part for part in op_name.split("/") if part not in dull]
    return "/".join(parts[-3:]) or re.sub(r"(\.clone|\.remat|[.\d]+)+$", "", name)


def transformer_flops(*, num_layers: int, width: int, tokens: int) -> float:
    """Model FLOPs of training on one sample: 6 N T + 12 L T^2 d with N = 12 d^2 L (spec/tpu.md section 4).

    N is what multiplies every token (projections and MLP). Embeddings, modulation and what is computed again are left out.
    """
    return 6.0 * 12 * width**2 * num_layers * tokens + 12.0 * num_layers * tokens**2 * width


def jaxpr_flops(jaxpr: Any) -> float:
    """FLOPs of the matmuls and convolutions of a jaxpr, scans unrolled."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel, out_dim = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
            total += 2.0 * equation.outvars[0].aval.size * math.prod(kernel) / kernel[out_dim]
        times = params.get("length", 1) if name == "scan" else 1
        for value in params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * jaxpr_flops(inner)
    return total


@dataclasses.dataclass(frozen=True)
class Outlook:
    """A whole stage, from one step."""

    samples_per_s: float
    mfu: float
    days: float
    chip_hours: float
    price: float


def outlook(
    step_s: float, *, topology: Topology, samples: int, flops_per_sample: float, stage_samples: int, chip_price: float
) -> Outlook:
    """What a stage takes.

    Args:
      step_s: seconds of a step of `samples` samples.
      flops_per_sample: model FLOPs, which MFU is a share of all chips' bfloat16 peak of.
      stage_samples: that the stage trains on, its steps x its batch.
      chip_price: money per chip-hour.
    """
    rate = samples / step_s
    seconds = stage_samples / rate
    chip_hours = seconds / 3600 * topology.chips
    mfu = rate * flops_per_sample / (topology.chips * topology.chip.peak_flops)
    return Outlook(rate, mfu, seconds / 86400, chip_hours, chip_hours * chip_price)
