"""Which timesteps a training step sees, and how a timestep becomes a vector."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cogvideox_jax.core.schedule import NUM_TIMESTEPS


def explicit_uniform(
    key: jax.Array, batch_size: int, *, num_timesteps: int = NUM_TIMESTEPS
) -> Int[Array, "{batch_size}"]:
    """Stratified timesteps: [0, num_timesteps) is cut into batch_size intervals and each sample draws from its own.

    The paper (section 3.2, "explicit uniform sampling") gives each data-parallel rank one interval. Strata here belong to
    the global sample index and are dealt out anew by `key` each step, so the coverage is the same on any mesh, and no
    record of the data set is tied to one part of the schedule.

    Returns: int32 (batch_size,), each marginally uniform on 0 .. num_timesteps - 1.
    """
    key_strata, key_offset = jax.random.split(key)
    strata = jax.random.permutation(key_strata, batch_size)
    offsets = jax.random.uniform(key_offset, (batch_size,))
    timesteps = jnp.floor((strata + offsets) / batch_size * num_timesteps).astype(jnp.int32)
    # (strata + offset) / batch_size may round up to 1.0 in float32
    return jnp.minimum(timesteps, num_timesteps - 1)


def uniform(key: jax.Array, batch_size: int, *, num_timesteps: int = NUM_TIMESTEPS) -> Int[Array, "{batch_size}"]:
    """Independent uniform timesteps, the usual alternative."""
    return jax.random.randint(key, (batch_size,), 0, num_timesteps)


SAMPLERS = {"explicit_uniform": explicit_uniform, "uniform": uniform}


def sinusoid(timesteps: Float[Array, "b"], dim: int) -> Float[Array, "b {dim}"]:
    """Sinusoidal embedding [cos(t f) ; sin(t f)], f_j = 10000^(-j / (dim/2)), float32 (spec 2.2)."""
    half = dim // 2
    frequencies = np.exp(-np.log(10_000) * np.arange(half, dtype=np.float32) / half)
    angles = jnp.asarray(timesteps, jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
