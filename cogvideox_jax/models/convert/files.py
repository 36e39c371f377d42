"""Weight files in the safetensors format, read and written tensor by tensor, without torch.

A safetensors file is eight bytes (the header's length, little-endian), a JSON header {name: {dtype, shape, data_offsets}} and
the tensors' bytes. A large model is several such files and an index {"weight_map": {name: file}}. Nothing in them is trusted:
sizes, offsets and names are checked against each other and against the file before a tensor is read, and pickles (.bin, .pt),
which run code when they are loaded, are never opened.
"""

import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cogvideox_jax.core.errors import InputError

# diffusers and transformers name their files so
BASENAMES = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_MAX_JSON = 100_000_000
_AGAIN = "get the file again from where it came"


class StoredTensor:
    """A tensor in a file: its shape and dtype are known, its values are read when `np.asarray` asks for them."""

    def __init__(self, path: Path, name: str, dtype: np.dtype, shape: tuple[int, ...], offset: int):
        self.dtype, self.shape = dtype, shape
        self._path, self._name, self._offset = path, name, offset

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # read, not mapped: pages of a mapped file count as this process's memory until somebody else wants them
        with self._path.open("rb") as file:
            file.seek(self._offset)
            raw = np.empty(self.nbytes, np.uint8)
            if file.readinto(memoryview(raw)) != self.nbytes:
                raise InputError(f"{self._path} ends within {self._name}: {_AGAIN}")
        array = raw.view(self.dtype).reshape(self.shape)
        return array if dtype is None else array.astype(dtype, copy=False)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json's hook for objects: a key that stands twice is a mistake or a trick, and the later one would win silently."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} stands there twice")
        found[name] = value
    return found


def parse_json(text: bytes | str, where: str) -> dict[str, Any]:
    """A JSON object from foreign text. Raises InputError where it is broken, nested too deeply, or has a key twice."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise InputError(f"{where} is not readable as JSON ({reason}): {_AGAIN}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where} holds a {type(value).__name__} where a JSON object is expected: {_AGAIN}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a foreign file. Raises InputError where it is missing, huge, broken, or has a key twice."""
    try:
        size = path.stat().st_size
        if size > _MAX_JSON:
            raise InputError(f"{path} has {size} bytes, more than the {_MAX_JSON} that such a file may have: {_AGAIN}")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a complete folder") from None


class _Place(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def _place(value: Any, where: str) -> _Place:
    """One entry of the header, checked by itself."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where} is not described by dtype, shape and data_offsets: {_AGAIN}")
    name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise InputError(f"{where} has dtype {name!r}, expected one of {', '.join(DTYPES)}: {_AGAIN}")

    def counts(numbers: Any) -> bool:
        return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)

    if not counts(shape) or not counts(offsets) or len(offsets) != 2:
        raise InputError(f"{where} has shape {shape!r} and data_offsets {offsets!r}, expected counts: {_AGAIN}")
    start, stop = offsets
    expected = math.prod(shape) * DTYPES[name].itemsize
    if stop - start != expected:
        raise InputError(
            f"{where}: {name} {shape} takes {expected} bytes, the header gives it {stop - start}: {_AGAIN}"
        )
    return _Place(DTYPES[name], tuple(shape), start, stop)


def _refuse_pickle(path: Path, first: bytes = b"") -> None:
    """By its name, or by its first bytes: PyTorch's zip files, and bare pickles of protocol 2 and later."""
    if path.suffix in PICKLES or first.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise InputError(
            f"{path} is a pickle, which can run any program when it is loaded, and is not opened: give a .safetensors file"
        )


def open_file(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """One safetensors file: (its tensors, its metadata). Reads the header only, and refuses one that does not fit the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            _refuse_pickle(path)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(size - 8, _MAX_HEADER):
                # only now: a header of 640 bytes starts with the same two as a pickle
                _refuse_pickle(path, first)
                raise InputError(
                    f"{path} has {size} bytes and its header would have {length}: it is cut short or no safetensors file; "
                    f"{_AGAIN}"
                )
            header = parse_json(file.read(length), f"the header of {path}")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a .safetensors file") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: __metadata__ must map names to strings: {_AGAIN}")
    places = {name: _place(value, f"{path}: {name}") for name, value in header.items()}
    # tensors lie one after the other, without gaps or overlaps, up to the end of the file
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].stop)):
        if place.start != end:
            what = "overlaps the tensor before it" if place.start < end else "leaves a gap before it"
            raise InputError(f"{path}: {name} starts at byte {place.start} and {what}, which ends at {end}: {_AGAIN}")
        end = place.stop
    data = 8 + length
    if end != size - data:
        raise InputError(f"{path} holds {size - data} bytes of tensors, its header describes {end}: {_AGAIN}")
    return {name: StoredTensor(path, name, p.dtype, p.shape, data + p.start) for name, p in places.items()}, metadata


def _open_index(path: Path) -> dict[str, StoredTensor]:
    """The files that an index names, which must hold just the tensors that it says they hold."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path} has no weight_map: {_AGAIN}")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # links are how the hub's cache stores files; a name, though, may not lead out of the folder
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise InputError(f"{path}: {name} lies in {file!r}, expected the name of a file beside it: {_AGAIN}")
        _refuse_pickle(Path(file))
        files.setdefault(file, set()).add(name)
    tensors: dict[str, StoredTensor] = {}
    for file, names in sorted(files.items()):
        if not (path.parent / file).exists():
            raise InputError(f"{path.parent / file} is missing, {path.name} says that it holds {len(names)} tensors")
        found, _ = open_file(path.parent / file)
        doubled = tensors.keys() & found.keys()
        if doubled:
            raise InputError(f"{path.parent / file} holds again what another file holds: {listing(doubled)}")
        wrong = found.keys() ^ names
        if wrong:
            raise InputError(
                f"{path.parent / file} and {path.name} disagree on which tensors it holds: {listing(wrong)}"
            )
        tensors |= found
    return tensors


def open_tensors(source: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, or of a folder that holds one (or its parts and their index).

    Only headers are read. Raises InputError, naming the file, for whatever is missing, cut short or does not add up.
    """
    source = Path(source)
    if not source.is_dir():
        return _open_index(source) if source.name.endswith(".index.json") else open_file(source)[0]
    found = [
        path
        for base in BASENAMES
        for path in (source / f"{base}.safetensors", source / f"{base}.safetensors.index.json")
        if path.exists()
    ]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise InputError(f"{source} holds {names}: remove the one that is not meant")
    if found:
        return open_tensors(found[0])
    for path in sorted(source.iterdir()):
        _refuse_pickle(path)
    expected = " or ".join(f"{base}.safetensors" for base in BASENAMES)
    raise InputError(f"{source} holds no weights: expected {expected}, or its parts and their .index.json")


def listing(names: Iterable[str], known: Iterable[str] = ()) -> str:
    """At most ten of the names, each with the nearest of the known ones."""
    rows, known = sorted(names), list(known)
    shown = []
    for name in rows[:10]:
        near = difflib.get_close_matches(name, known, 1)
        shown.append(f"{name} (nearest: {near[0]})" if near else name)
    return ", ".join(shown) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")


class Spec(NamedTuple):
    """What a tensor will be, known before its values are."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def split(layout: Mapping[str, Spec], max_shard_bytes: int) -> list[list[str]]:
    """Names per file, in their order and as huggingface_hub splits them: a tensor above the limit gets a file of its own."""
    shards: list[list[str]] = []
    current: list[str] = []
    size = 0
    for name, spec in layout.items():
        if spec.nbytes > max_shard_bytes:
            shards.append([name])
            continue
        if size + spec.nbytes > max_shard_bytes:
            shards.append(current)
            current, size = [], 0
        current.append(name)
        size += spec.nbytes
    return [*shards, current] if current else shards


def _header(names: list[str], layout: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """A file's first bytes, and where each tensor starts in it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    # wider types first: so each tensor starts at a multiple of its element's size, which torch needs
    for name in sorted(names, key=lambda n: -np.dtype(layout[n].dtype).itemsize):
        spec = layout[name]
        starts[name] = end
        end += spec.nbytes
        header[name] = {
            "dtype": _NAMES[np.dtype(spec.dtype)],
            "shape": list(spec.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {name: len(first) + start for name, start in starts.items()}


def write_tensors(
    folder: Path,
    layout: Mapping[str, Spec],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    basename: str,
    max_shard_bytes: int = 10_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write safetensors files as diffusers names them: BASENAME.safetensors, or BASENAME-00001-of-0000N and an index.

    Args:
      folder: is made where it is missing.
      layout: every tensor's shape and dtype; its order is that of the files.
      tensors: (name, values) in any order, each of the layout once. One is held at a time.
      max_shard_bytes: of one file's tensors.
      metadata: strings for the header; {"format": "pt"} by default, which transformers asks for.

    Returns: the files. Each is written under a temporary name and renamed when all are whole.
    """
    metadata = {"format": "pt"} if metadata is None else metadata
    folder.mkdir(parents=True, exist_ok=True)
    shards = split(layout, max_shard_bytes)
    paths = [folder / f"{basename}.safetensors"]
    if len(shards) > 1:
        paths = [folder / f"{basename}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    temporary = [path.with_name(path.name + ".tmp") for path in paths]
    places: dict[str, tuple[int, int]] = {}
    opened: list[int] = []
    try:
        for path, names in zip(temporary, shards, strict=True):
            first, starts = _header(names, layout, metadata)
            opened.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644))
            _write_at(opened[-1], first, 0)
            places |= {name: (opened[-1], start) for name, start in starts.items()}
        for name, values in tensors:
            spec = layout[name]
            if values.shape != tuple(spec.shape) or values.dtype != spec.dtype:
                got = f"{values.dtype} {values.shape}"
                raise ValueError(f"{name} was announced as {spec.dtype} {spec.shape} and is {got}")
            descriptor, start = places.pop(name)
            _write_at(descriptor, np.ascontiguousarray(values).reshape(-1).view(np.uint8), start)
        if places:
            raise ValueError(f"announced and not given: {listing(places)}")
        for descriptor in opened:
            os.fsync(descriptor)
        for old, new in zip(temporary, paths, strict=True):
            old.replace(new)
    finally:
        for descriptor in opened:
            os.close(descriptor)
        for path in temporary:
            path.unlink(missing_ok=True)
    if len(shards) > 1:
        weight_map = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
        total = sum(spec.nbytes for spec in layout.values())
        write_json(
            folder / f"{basename}.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    return paths


def _write_at(descriptor: int, values: bytes | np.ndarray, start: int) -> None:
    # one call writes at most 2 GB
    view = memoryview(values)
    while view:
        count = os.pwrite(descriptor, view, start)
        view, start = view[count:], start + count


def write_json(path: Path, value: Any) -> None:
    """JSON in diffusers' style, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    temporary.replace(path)
