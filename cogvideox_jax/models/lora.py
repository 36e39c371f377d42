"""LoRA: a low-rank addition to the attention's projections (spec 4.9), as pure functions of a tree beside the parameters.

The tree mirrors the parameters, with all layers stacked:

    {"blocks": {"attention": {"query": {"a": (layers, in, rank), "b": (layers, rank, out)}, ...}}}

A tree that is applied, combined or merged is scaled already, by alpha / rank and by the weight that the user gives it:

    model.apply({"params": params, "lora": scaled(tree, alpha / rank)}, ...)
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import lax

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.layers.conv import torch_uniform
from cogvideox_jax.models.transformer import Transformer

# the projections of the attention that may have one, in the order of trees and files
TARGETS = ("query", "key", "value", "out")
Tree = Mapping[str, Any]


def _path(target: str) -> str:
    return f"blocks/attention/{target}"


def _check_targets(targets: tuple[str, ...], what: str) -> None:
    if not targets or len(set(targets)) != len(targets) or not set(targets) <= set(TARGETS):
        raise InputError(f"{what} is for {', '.join(map(str, targets)) or 'nothing'}, expected {', '.join(TARGETS)}")


def pairs(tree: Tree) -> dict[str, tuple[Any, Any]]:
    """target -> (a, b), in the order of TARGETS. Raises InputError where the tree is not a LoRA's."""
    flat = {"/".join(map(str, path)): leaf for path, leaf in flatten_dict(tree).items()}
    expected = [f"{_path(name)}/{part}" for name in TARGETS for part in ("a", "b")]
    unknown = sorted(flat.keys() - set(expected))
    if unknown or not flat:
        raise InputError(
            f"the LoRA's tree holds {', '.join(unknown) or 'nothing'}, expected a and b of {_path('TARGET')} "
            f"for {', '.join(TARGETS)}"
        )
    found = {}
    for name in TARGETS:
        a, b = (flat.get(f"{_path(name)}/{part}") for part in ("a", "b"))
        if a is None and b is None:
            continue
        shape_a, shape_b = (None if part is None else tuple(part.shape) for part in (a, b))
        if (
            not (shape_a and shape_b and len(shape_a) == len(shape_b) == 3)
            or shape_a[0] != shape_b[0]
            or not 0 < shape_a[2] == shape_b[1]
        ):
            raise InputError(
                f"the LoRA of {_path(name)} has a {shape_a} and b {shape_b}, "
                "expected (layers, in, rank) and (layers, rank, out)"
            )
        found[name] = a, b
    return found


def tree_of(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """The inverse of `pairs`."""
    return {"blocks": {"attention": {name: {"a": a, "b": b} for name, (a, b) in pairs.items()}}}


def shapes(model: Transformer, rank: int, targets: Iterable[str] = TARGETS) -> dict[str, Any]:
    """The tree's shapes and dtypes for a model (jax.ShapeDtypeStruct)."""
    targets = tuple(targets)
    _check_targets(targets, "the LoRA")
    if rank < 1:
        raise InputError(f"the LoRA's rank is {rank}, expected 1 or more")
    width = model.num_heads * model.head_dim
    a = jax.ShapeDtypeStruct((model.num_layers, width, rank), jnp.float32)
    b = jax.ShapeDtypeStruct((model.num_layers, rank, width), jnp.float32)
    return tree_of({name: (a, b) for name in TARGETS if name in targets})


def check(tree: Tree, model: Transformer) -> None:
    """Refuse a tree that is not for this model (InputError): `apply` would not notice what stands at a wrong path."""
    for name, (a, b) in pairs(tree).items():
        expected = tuple(part.shape for part in pairs(shapes(model, a.shape[2], (name,)))[name])
        if (tuple(a.shape), tuple(b.shape)) != expected:
            raise InputError(
                f"the LoRA of {_path(name)} has a {tuple(a.shape)} and b {tuple(b.shape)}, "
                f"this model expects {expected[0]} and {expected[1]}: it was made for another model"
            )


def init(key: jax.Array, model: Transformer, rank: int, targets: Iterable[str] = TARGETS) -> dict[str, Any]:
    """A LoRA that changes nothing yet: a as torch starts a linear layer (Kaiming uniform with sqrt(5)), b zero; float32."""
    fresh = {}
    for name, (a, b) in pairs(shapes(model, rank, targets)).items():
        layers, *shape = a.shape
        keys = jax.random.split(jax.random.fold_in(key, TARGETS.index(name)), layers)
        fresh[name] = jax.vmap(lambda k, shape=shape: torch_uniform(k, shape))(keys), jnp.zeros(b.shape)
    return tree_of(fresh)


def scaled(tree: Tree, scale: Any) -> dict[str, Any]:
    """The tree with every b multiplied: by alpha / rank, and by the weight that the user gives this LoRA."""
    return tree_of({name: (a, b * scale) for name, (a, b) in pairs(tree).items()})


def combine(trees: Iterable[Tree]) -> dict[str, Any]:
    """One LoRA that adds what all of them add; each is scaled already, and may have its own targets and ranks."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    for tree in trees:
        for name, (a, b) in pairs(tree).items():
            others = found.setdefault(name, [])
            others.append((a, b))
            sizes = [(*a.shape[:2], b.shape[2]) for a, b in (others[0], others[-1])]
            if sizes[0] != sizes[1]:
                raise InputError(
                    f"the LoRAs of {_path(name)} are for different models: "
                    f"(layers, in, out) is {sizes[0]} in one and {sizes[1]} in another"
                )
    _check_targets(tuple(found), "the combination of LoRAs")

    def joined(group: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        return jnp.concatenate([a for a, _ in group], axis=2), jnp.concatenate([b for _, b in group], axis=1)

    return tree_of({name: joined(found[name]) for name in TARGETS if name in found})


def _added(params: Any, tree: Tree, sign: int) -> dict[str, Any]:
    attention = dict(params["blocks"]["attention"])
    for name, (a, b) in pairs(tree).items():
        kernel = attention[name]["kernel"]
        if (a.shape[0], a.shape[1], b.shape[2]) != kernel.shape:
            raise InputError(
                f"the LoRA of {_path(name)} has a {tuple(a.shape)} and b {tuple(b.shape)}, "
                f"the kernel is {tuple(kernel.shape)}: it was made for another model"
            )
        a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
        change = jnp.einsum("lir,lro->lio", a, b, precision=lax.Precision.HIGHEST)
        new = (jnp.asarray(kernel, jnp.float32) + sign * change).astype(kernel.dtype)
        attention[name] = {**attention[name], "kernel": new}
    return {**params, "blocks": {**params["blocks"], "attention": attention}}


def merge(params: Any, tree: Tree) -> dict[str, Any]:
    """Parameters that hold the (scaled) LoRA: kernel + a b, summed in float32. A new tree; other leaves are shared."""
    return _added(params, tree, 1)


def unmerge(params: Any, tree: Tree) -> dict[str, Any]:
    """The inverse of `merge`, up to one rounding in the kernel's dtype."""
    return _added(params, tree, -1)
