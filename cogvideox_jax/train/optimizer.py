"""AdamW as the paper uses it, with its schedule and clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def adamw(
    *,
    learning_rate: float,
    warmup_steps: int,
    num_steps: int,
    final_fraction: float,
    weight_decay: float,
    b1: float,
    b2: float,
    eps: float,
    clip_norm: float,
    moment_dtype: str,
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with linear warm-up and cosine decay to learning_rate * final_fraction.

    Weight decay spares biases, norms and tables. `moment_dtype` is that of the two moments in memory, "float32" or
    "bfloat16"; they are updated in float32.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps, max(num_steps, warmup_steps + 1), learning_rate * final_fraction
    )
    adam = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
    if moment_dtype != "float32":
        adam = stored_as(jnp.dtype(moment_dtype), adam)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adam)


def stored_as(dtype: jnp.dtype, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with the arrays of its state kept in `dtype` between updates, each of which runs in float32."""

    def cast(state: Any, old: Any, new: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(new) if x.ndim and x.dtype == old else x, state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, cast(state, dtype, jnp.float32), params)
        return updates, cast(state, jnp.float32, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), jnp.float32, dtype), update)


def decay_mask(params) -> dict:
    """True for the arrays that weight decay applies to: everything named kernel."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
