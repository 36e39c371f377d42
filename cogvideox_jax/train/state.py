"""What a training step carries from one step to the next."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
    """Float32 master parameters, their moving average, optimizer moments and the number of finished steps."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def create(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0: the moving average starts at the parameters."""
    # a copy: the two trees are donated to the step together and must not share buffers
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def apply_gradients(
    state: TrainState, gradients: Any, optimizer: optax.GradientTransformation, *, ema_decay: float
) -> tuple[TrainState, jax.Array]:
    """One optimizer step and one step of the moving average; also returns the gradients' global norm.

    The average's decay warms up as min(ema_decay, (1 + n) / (10 + n)), so that a short run is not an average of its start.
    """
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    n = state.step.astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1 + n) / (10 + n))
    ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
    return TrainState(state.step + 1, params, ema, opt_state), optax.tree.norm(gradients)
