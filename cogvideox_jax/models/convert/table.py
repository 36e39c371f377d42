"""What a name table is, and how it is read in both directions, one tensor at a time.

Values may be arrays or anything that has a shape and a dtype and is read by `np.asarray` (files.StoredTensor,
trees.StoredArray): nothing is held longer than it is needed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from einops import rearrange

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.convert.files import Spec, listing


class Entry(NamedTuple):
    """One tensor: our parameter (a path with slashes; the layer where ours are stacked), theirs, and the layout rule."""

    ours: str
    theirs: str
    rule: str = "same"
    layer: int | None = None


def _patch(x: np.ndarray, patch: int) -> np.ndarray:
    return rearrange(x, "(c ph pw) d -> d c ph pw", ph=patch, pw=patch)


# rule -> (theirs to ours, ours to theirs). Torch keeps outputs first, Flax last.
RULES = {
    "same": (lambda x: x, lambda x: x),
    "linear": (lambda x: x.T, lambda x: x.T),
    "conv3d": (lambda x: rearrange(x, "o i t h w -> t h w i o"), lambda x: rearrange(x, "t h w i o -> o i t h w")),
    "conv2d": (lambda x: rearrange(x, "o i h w -> h w i o"), lambda x: rearrange(x, "h w i o -> o i h w")),
    "pointwise": (lambda x: x[:, :, 0, 0, 0].T, lambda x: x.T[:, :, None, None, None]),
    "patch2": (lambda x: rearrange(x, "d c ph pw -> (c ph pw) d"), lambda x: _patch(x, 2)),
    "row": (lambda x: x[0], lambda x: x[None]),
}
FLOATS = tuple(np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))


class Leaf:
    """One of our parameters, made when it is asked for: `np.asarray(leaf)` whole, or `leaf[i]` the i-th of its layers.

    Fields: shape, dtype; stacked: whether the first dimension counts layers.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[int], np.ndarray], *, stacked: bool):
        """`read` gives layer i, or the whole (called with 0) where nothing is stacked."""
        self.shape, self.dtype, self.stacked = tuple(shape), np.dtype(dtype), stacked
        self._read = read

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, layer: int) -> np.ndarray:
        if not self.stacked:
            raise TypeError("this parameter is not stacked")
        return self._read(layer)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.stacked:
            array = np.empty(self.shape, self.dtype)
            for layer in range(self.shape[0]):
                array[layer] = self._read(layer)
        else:
            array = np.ascontiguousarray(self._read(0))
        return array if dtype is None else array.astype(dtype, copy=False)


def _leaf(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set a leaf of a nested dict by its path with slashes."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value


def cast(values: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """Values in another dtype. Raises InputError where a finite one becomes infinite (float16 ends at 65504)."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        new = values.astype(dtype)
    if np.isinf(new).any() and not np.isinf(values).any():
        raise InputError(f"{name} holds values that {np.dtype(dtype).name} cannot: choose bfloat16 or float32")
    return new


def layout(entries: list[Entry], shapes: Any, dtype: Any = None) -> dict[str, Spec]:
    """What each of their tensors will be, in the table's order.

    Args:
      entries: the table.
      shapes: our tree of anything with a shape and a dtype.
      dtype: of all tensors; None keeps each leaf's.
    """
    specs: dict[str, Spec] = {}
    for entry in entries:
        leaf = _leaf(shapes, entry.ours)
        shape = leaf.shape if entry.layer is None else leaf.shape[1:]
        # an array of that shape whose elements are all the same byte
        probe = np.broadcast_to(np.int8(0), tuple(shape))
        if entry.theirs in specs:
            raise ValueError(f"{entry.theirs} stands twice in the table")
        specs[entry.theirs] = Spec(RULES[entry.rule][1](probe).shape, np.dtype(dtype or leaf.dtype))
    return specs


def check(entries: list[Entry], tensors: Mapping[str, Any], shapes: Any, *, source: str) -> None:
    """Refuse tensors that are not those of the table, by their names, shapes and dtypes alone (errors as in `compare`)."""
    compare(layout(entries, shapes), tensors, source=source)


def compare(expected: Mapping[str, Spec], tensors: Mapping[str, Any], *, source: str) -> None:
    """Refuse tensors whose names or shapes are not the expected ones, or that are no floats; the float's width is free.

    Raises InputError listing what is missing, unknown, misshapen or no float: at most ten each, with the nearest name.
    """
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    wrong, no_float = [], []
    for name in expected.keys() & tensors.keys():
        shape, dtype = tuple(tensors[name].shape), np.dtype(tensors[name].dtype)
        if shape != expected[name].shape:
            wrong.append(f"{name} is {shape}, expected {expected[name].shape}")
        if dtype not in FLOATS:
            no_float.append(f"{name} is {dtype}")
    parts = [f"missing: {listing(missing, unknown)}"] if missing else []
    parts += [f"unknown: {listing(unknown, missing)}"] if unknown else []
    parts += [f"misshapen: {listing(wrong)}"] if wrong else []
    parts += [f"not float (quantised weights are not read): {listing(no_float)}"] if no_float else []
    if parts:
        raise InputError(f"{source} does not hold this network's tensors; " + "; ".join(parts))


def leaves(
    entries: list[Entry],
    tensors: Mapping[str, Any],
    shapes: Any,
    *,
    source: str = "file",
    dtype: Any = None,
    done: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Tensors in the other system's layout -> our parameter tree of `Leaf`: nothing is read yet.

    Args:
      entries: the table.
      tensors: name -> array, or anything that has shape and dtype and is read by np.asarray.
      shapes: our tree of anything with a shape (jax.eval_shape of init), which every tensor is checked against.
      source: what to call the origin in messages.
      dtype: to convert to; None keeps the file's.
      done: is called with each tensor's name when it has been read.

    Raises InputError as `check` does, and where the layers of one parameter differ in dtype and none is chosen.
    """
    check(entries, tensors, shapes, source=source)
    grouped: dict[str, list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(entry.ours, []).append(entry)
    tree: dict[str, Any] = {}
    for ours, group in grouped.items():
        group.sort(key=lambda entry: entry.layer or 0)
        stored = {np.dtype(tensors[entry.theirs].dtype) for entry in group}
        if dtype is None and len(stored) > 1:
            names = f"{group[0].theirs} to {group[-1].theirs}"
            raise InputError(f"{source}: {names} are stored as {', '.join(sorted(map(str, stored)))}: choose one dtype")
        target = np.dtype(dtype) if dtype is not None else stored.pop()
        put(tree, ours, _lazy(_leaf(shapes, ours).shape, target, group, tensors, done))
    return tree


def _lazy(
    shape: tuple[int, ...], dtype: np.dtype, group: list[Entry], tensors: Mapping[str, Any], done: Callable[[str], None]
) -> Leaf:
    def read(index: int) -> np.ndarray:
        entry = group[index]
        values = cast(np.asarray(tensors[entry.theirs]), dtype, entry.theirs)
        done(entry.theirs)
        return np.ascontiguousarray(RULES[entry.rule][0](values))

    return Leaf(shape, dtype, read, stacked=group[0].layer is not None)


def to_params(entries: list[Entry], tensors: Mapping[str, Any], shapes: Any, *, source: str = "file") -> Any:
    """Tensors in the other system's layout -> our parameter tree in memory (numpy); arguments and errors as in `leaves`."""

    def whole(node: Any) -> Any:
        return {name: whole(child) for name, child in node.items()} if isinstance(node, dict) else np.asarray(node)

    return whole(leaves(entries, tensors, shapes, source=source))


def to_tensors(entries: Iterable[Entry], params: Any, *, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters -> (name, array) in the other system's layout, one tensor at a time.

    All layers of one parameter come after each other, so that each stored array is read once.
    """
    grouped: dict[str, list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(entry.ours, []).append(entry)
    for ours, group in grouped.items():
        leaf = _leaf(params, ours)
        for entry in sorted(group, key=lambda entry: entry.layer or 0):
            values = np.asarray(leaf if entry.layer is None else leaf[entry.layer])
            values = cast(values, values.dtype if dtype is None else np.dtype(dtype), entry.theirs)
            yield entry.theirs, np.ascontiguousarray(RULES[entry.rule][1](values))
