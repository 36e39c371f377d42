"""AdamW as the paper uses it, with its schedule and clipping."""

import jax
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
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with linear warm-up and cosine decay to learning_rate * final_fraction.

    Weight decay spares biases, norms and tables.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps, max(num_steps, warmup_steps + 1), learning_rate * final_fraction
    )
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask),
    )


def decay_mask(params) -> dict:
    """True for the arrays that weight decay applies to: everything named kernel."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
