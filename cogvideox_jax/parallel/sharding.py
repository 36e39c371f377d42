"""Named placements, and the one rule that places parameters, EMA and optimizer moments alike."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# specs of activations; dimensions that are not named are not split
BATCH = P(("data", "fsdp"))
TOKENS = P(("data", "fsdp"), "sequence")  # (batch, tokens, ...)
HEADS = P(("data", "fsdp"), None, "sequence")  # (batch, tokens, heads, ...)
PARTS = P(None, ("data", "fsdp"))  # (parts of a batch, rows, ...)
REPLICATED = P()

SMALLEST_SHARDED = 1024  # elements; below this a gather costs more than the memory it saves


def ambient_axis(name: str) -> int:
    """Size of an axis of the ambient mesh, 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def platform() -> str:
    """What the program is compiled for, "cpu" or "tpu": the ambient mesh's devices, which need not be this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Pin the placement of an activation; does nothing without an ambient mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def named(mesh: Mesh, spec: P) -> NamedSharding:
    """A spec on a mesh, for what lies outside of compiled code."""
    return NamedSharding(mesh, spec)


def parameter_spec(shape: tuple[int, ...], axes: dict[str, int]) -> P:
    """Placement of one parameter, by its shape alone.

    The largest dimension that divides (the last of equals, a kernel's outputs) is split over fsdp and sequence together
    (parameters would otherwise be replicated over sequence), else over fsdp; small arrays stay whole.
    """
    if np.prod(shape, dtype=np.int64) < SMALLEST_SHARDED:
        return REPLICATED
    for names in (("fsdp", "sequence"), ("fsdp",)):
        ways = int(np.prod([axes[name] for name in names]))
        for dim in sorted(range(len(shape)), key=lambda i: (-shape[i], -i)):
            if ways > 1 and shape[dim] % ways == 0:
                return P(*[names if i == dim else None for i in range(len(shape))])
    return REPLICATED


def place(tree: Any, mesh: Mesh) -> Any:
    """The rule applied to every leaf that has a shape: a tree of shardings for jit, device_put and orbax."""
    axes = dict(mesh.shape)
    return jax.tree.map(lambda leaf: NamedSharding(mesh, parameter_spec(np.shape(leaf), axes)), tree)
