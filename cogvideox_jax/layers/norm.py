"""Normalisations. Statistics are float32 whatever the compute dtype."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from cogvideox_jax.layers.conv import PointwiseConv
from cogvideox_jax.parallel import halo
from cogvideox_jax.parallel.halo import Frames


class GroupNorm(nn.Module):
    """GroupNorm over (time, height, width, channels of the group) of the chunk it is given, eps 1e-6 (spec 3.2).

    Split frames count as the chunk they are, the first one once.
    """

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        channels = jax.tree.leaves(x)[0].shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def grouped(means: Float[Array, "rows c"]) -> Float[Array, "rows 1 1 1 c"]:
            means = means.reshape(means.shape[0], self.groups, -1).mean(-1)
            return jnp.repeat(means, channels // self.groups, axis=-1)[:, None, None, None]

        # in two passes: the mean of squares less the squared mean loses digits where the mean is large
        mean = grouped(halo.clip_mean(lambda part: jnp.mean(part.astype(jnp.float32), axis=(1, 2, 3)), x))
        variance = grouped(halo.clip_mean(lambda part: jnp.mean((part - mean) ** 2, axis=(1, 2, 3)), x))
        factor = jax.lax.rsqrt(variance + 1e-6) * scale
        return jax.tree.map(lambda part: ((part - mean) * factor + bias).astype(self.dtype), x)


def layer_norm(epsilon: float, dtype: Any, name: str) -> nn.LayerNorm:
    """LayerNorm over the last dimension with scale and bias."""
    return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, name=name)


def in_time(latents: Frames, x: Frames) -> Frames:
    """Latents (b, t1, h, w, c) repeated to the frames of a feature map (b, t, ...)."""
    return halo.after_first(lambda rest, frames: jnp.repeat(rest, frames.shape[1] // rest.shape[1], axis=1), latents, x)


class SpatialNorm(nn.Module):
    """GroupNorm whose scale and shift are read off the decoder's input latents (MoVQ, arXiv 2209.09002; spec 3.3)."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Frames, latents: Frames) -> Frames:
        channels = jax.tree.leaves(x)[0].shape[-1]
        # a pointwise convolution commutes with a nearest resize, so both run at the latents' size
        # a fresh scale is around 1: around 0 each norm would multiply the features by noise of either sign
        scale = jax.tree.map(PointwiseConv(channels, self.dtype, nn.initializers.ones, name="conv_y"), latents)
        shift = jax.tree.map(PointwiseConv(channels, self.dtype, name="conv_b"), latents)
        normed = GroupNorm(self.groups, self.dtype, name="norm")(x)
        return jax.tree.map(modulate, normed, in_time(scale, x), in_time(shift, x))


def modulate(
    x: Float[Array, "b t h w c"], scale: Float[Array, "b t h1 w1 c"], shift: Float[Array, "b t h1 w1 c"]
) -> Float[Array, "b t h w c"]:
    """x * scale + shift, which are repeated in space to the size of x."""
    # the features are folded to the latents and not the latents stretched to the features: the stretched scales depend on
    # no feature, and a scheduler that starts what is ready held those of every norm at once (12 GB in a tile)
    blocks = rearrange(x, "b t (h y) (w x) c -> b t h y w x c", h=scale.shape[2], w=scale.shape[3])
    scale, shift = (rearrange(m, "b t h w c -> b t h 1 w 1 c") for m in (scale, shift))
    return rearrange(blocks * scale + shift, "b t h y w x c -> b t (h y) (w x) c")


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
