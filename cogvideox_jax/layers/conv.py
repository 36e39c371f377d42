"""Convolutions over (batch, time, height, width, channels)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from cogvideox_jax.parallel import halo
from cogvideox_jax.parallel.halo import Frames, Split
from cogvideox_jax.parallel.sharding import platform

# torch's default for convolutions and linear layers: uniform in +-1/sqrt(fan_in)
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _conv2d(x: Array, kernel: Array, strides: int = 1, padding: Any = "SAME") -> Array:
    return lax.conv_general_dilated(x, kernel, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def conv3d(x: Float[Array, "b t h w i"], kernel: Float[Array, "kt kh kw i o"]) -> Float[Array, "b t-kt+1 h w o"]:
    """3D convolution, valid in time and same in space. The one place that chooses its form.

    On CPU a sum of 2D convolutions, one per tap in time, is two to four times as fast as XLA's own 3D one (128 channels,
    60x90: 346 against 85 GFLOP/s, with gradients 197 against 35); with very few channels the taps lie side by side in one
    (8: 48 against 36). A TPU wants the whole.
    """
    taps, frames = kernel.shape[0], x.shape[1] - kernel.shape[0] + 1
    if platform() == "cpu":
        if kernel.shape[3] <= 8:
            stacked = jnp.concatenate([x[:, i : i + frames] for i in range(taps)], axis=-1)
            y = _conv2d(stacked.reshape(-1, *stacked.shape[2:]), jnp.concatenate(list(kernel), axis=2))
            return y.reshape(x.shape[0], frames, *y.shape[1:])

        def tap(i: int) -> Array:
            y = _conv2d(x[:, i : i + frames].reshape(-1, *x.shape[2:]), kernel[i])
            return y.reshape(x.shape[0], frames, *y.shape[1:])

        return sum((tap(i) for i in range(1, taps)), start=tap(0))
    space = [((k - 1) // 2, k // 2) for k in kernel.shape[1:3]]
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), [(0, 0), *space], dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


class CausalConv3d(nn.Module):
    """3x3x3 convolution that sees this frame and the two before it (paper section 2.1; spec 3.1)."""

    features: int
    dtype: Any = jnp.float32
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Frames, cache: Float[Array, "b 2 h w c"] | None = None) -> tuple[Frames, Array]:
        """Convolve one chunk (b, t, h, w, c).

        Args:
          x: frames of this chunk.
          cache: the two frames before it; None at the start of a clip, where the first frame is repeated.

        Returns: the output (b, t, h, w, features), and the cache for the next chunk (its input's last two frames, padding
        included). Where the frames are split, each stretch is convolved as a chunk of its own after its neighbour's frames.
        """
        features_in = jax.tree.leaves(x)[0].shape[-1]
        kernel = self.param("kernel", torch_uniform, (3, 3, 3, features_in, self.features)).astype(self.dtype)
        bias = self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
        x = jax.tree.map(lambda part: part.astype(self.dtype), x)
        if isinstance(x, Split):
            past, cache = halo.before(x, cache)
            rest = conv3d(jnp.concatenate([past.astype(self.dtype), x.rest], axis=1), kernel) + bias
            if x.first is None:
                return Split(None, rest), cache
            # all three taps in time see the first frame
            first = conv3d(x.first, kernel.sum(axis=0, keepdims=True)) + bias
            return Split(first, rest), cache
        past = jnp.repeat(x[:, :1], 2, axis=1) if cache is None else cache.astype(self.dtype)
        x = jnp.concatenate([past, x], axis=1)
        return conv3d(x, kernel) + bias, x[:, -2:]


class PointwiseConv(nn.Module):
    """1x1x1 convolution: a linear layer on channels. Kernel (c, features)."""

    features: int
    dtype: Any = jnp.float32
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w features"]:
        dense = nn.Dense(
            self.features, dtype=self.dtype, kernel_init=torch_uniform, bias_init=self.bias_init, name="linear"
        )
        return dense(x)


class SpatialConv(nn.Module):
    """3x3 convolution on each frame by itself. stride=2 pads right and bottom by one, as the encoder does (spec 3.4)."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 features"]:
        kernel = self.param("kernel", torch_uniform, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        frames = x.astype(self.dtype).reshape(-1, *x.shape[2:])
        padding = ((0, 1), (0, 1)) if self.stride == 2 else ((1, 1), (1, 1))
        y = _conv2d(frames, kernel.astype(self.dtype), self.stride, padding) + bias.astype(self.dtype)
        return y.reshape(*x.shape[:2], *y.shape[1:])
