"""What a name table is, and how it is read in both directions."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from cogvideox_jax.core.errors import InputError


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
_RANKS = {"linear": 2, "conv3d": 5, "conv2d": 4, "pointwise": 5, "patch2": 4, "row": 3}


def _leaf(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _listing(names: Iterable[str], known: Iterable[str]) -> str:
    rows, known = sorted(names), list(known)
    shown = []
    for name in rows[:10]:
        near = difflib.get_close_matches(name, known, 1)
        shown.append(f"{name} (nearest: {near[0]})" if near else name)
    return ", ".join(shown) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")


def to_params(entries: list[Entry], tensors: Mapping[str, np.ndarray], shapes: Any, *, source: str = "file") -> Any:
    """Tensors in the other system's layout -> our parameter tree (numpy).

    Args:
      entries: the table.
      tensors: name -> array, as stored.
      shapes: our tree of anything with a shape (jax.eval_shape of init), which every tensor is checked against.
      source: what to call the origin in messages.

    Raises InputError listing missing, unknown or misshapen tensors, at most ten, with the nearest name.
    """
    wanted = {entry.theirs for entry in entries}
    missing, unknown = wanted - set(tensors), set(tensors) - wanted
    if missing or unknown:
        parts = [f"missing: {_listing(missing, unknown)}"] if missing else []
        parts += [f"unknown: {_listing(unknown, missing)}"] if unknown else []
        raise InputError(f"{source} does not hold this network's tensors; " + "; ".join(parts))
    out: dict[str, Any] = {}
    for entry in entries:
        leaf = _leaf(shapes, entry.ours)
        shape = tuple(leaf.shape) if entry.layer is None else tuple(leaf.shape[1:])
        tensor = np.asarray(tensors[entry.theirs])
        if tensor.ndim != _RANKS.get(entry.rule, tensor.ndim):
            raise InputError(
                f"{source}: {entry.theirs} has shape {tensor.shape}, expected {_RANKS[entry.rule]} dimensions"
            )
        value = RULES[entry.rule][0](tensor)
        if value.shape != shape:
            raise InputError(
                f"{source}: {entry.theirs} has shape {tensor.shape}, which does not fit {entry.ours} {shape}"
            )
        node = out
        *parents, name = entry.ours.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        if entry.layer is None:
            node[name] = np.ascontiguousarray(value)
        else:
            if name not in node:
                node[name] = np.empty(leaf.shape, tensor.dtype)
            node[name][entry.layer] = value
    return out


def to_tensors(entries: list[Entry], params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters -> (name, array) in the other system's layout, one tensor at a time."""
    for entry in entries:
        leaf = _leaf(params, entry.ours)
        value = np.asarray(leaf if entry.layer is None else leaf[entry.layer])
        yield entry.theirs, np.ascontiguousarray(RULES[entry.rule][1](value))
