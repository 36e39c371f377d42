"""Normalisations. Statistics are float32 whatever the compute dtype."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from cogvideox_jax.layers.conv import PointwiseConv


def group_norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    """GroupNorm over (time, height, width, channels of the group) of the chunk it is given, eps 1e-6 (spec 3.2)."""
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


def layer_norm(epsilon: float, dtype: Any, name: str) -> nn.LayerNorm:
    """LayerNorm over the last dimension with scale and bias."""
    return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, name=name)


def nearest(x: Float[Array, "b t h w c"], size: tuple[int, int, int]) -> Float[Array, "b t2 h2 w2 c"]:
    """Nearest resize of (t, h, w): source index floor(i * in / out)."""
    for axis, out in zip((1, 2, 3), size, strict=True):
        length = x.shape[axis]
        if out == length:
            continue
        if out % length == 0:
            x = jnp.repeat(x, out // length, axis=axis)
        else:
            x = jnp.take(x, jnp.arange(out) * length // out, axis=axis)
    return x


def latent_like(latents: Float[Array, "b t h w c"], size: tuple[int, int, int]) -> Float[Array, "b t2 h2 w2 c"]:
    """Latents stretched to a feature map's (t, h, w). In a chunk of odd length the first frame stands for itself."""
    frames, height, width = size
    if frames > 1 and frames % 2 == 1:
        first = nearest(latents[:, :1], (1, height, width))
        rest = nearest(latents[:, 1:], (frames - 1, height, width))
        return jnp.concatenate([first, rest], axis=1)
    return nearest(latents, size)


class SpatialNorm(nn.Module):
    """GroupNorm whose scale and shift are read off the decoder's input latents (MoVQ, arXiv 2209.09002; spec 3.3)."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], latents: Float[Array, "b t1 h1 w1 z"]
    ) -> Float[Array, "b t h w c"]:
        # a pointwise convolution commutes with a nearest resize, so both run at the latents' size
        # a fresh scale is around 1: around 0 each norm would multiply the features by noise of either sign
        scale = PointwiseConv(x.shape[-1], self.dtype, nn.initializers.ones, name="conv_y")(latents)
        shift = PointwiseConv(x.shape[-1], self.dtype, name="conv_b")(latents)
        size = x.shape[1:4]
        normed = group_norm(self.groups, self.dtype, "norm")(x)
        return normed * latent_like(scale, size) + latent_like(shift, size)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale; the statistics in float32, cast before the scale (T5; spec t5x.md)."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide / jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return wide.astype(self.dtype) * scale.astype(self.dtype)
