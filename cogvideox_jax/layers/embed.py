"""Embeddings of scalars."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from cogvideox_jax.core.timesteps import sinusoid
from cogvideox_jax.layers.conv import torch_uniform


class ScalarEmbed(nn.Module):
    """Sinusoid of width `sinusoid_dim` -> linear -> SiLU -> linear (spec 2.2). Used for the timestep and for ofs."""

    sinusoid_dim: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, values: Float[Array, "b"]) -> Float[Array, "b features"]:
        x = sinusoid(values, self.sinusoid_dim).astype(self.dtype)
        x = nn.Dense(self.features, dtype=self.dtype, kernel_init=torch_uniform, name="linear_1")(x)
        return nn.Dense(self.features, dtype=self.dtype, kernel_init=torch_uniform, name="linear_2")(nn.silu(x))
