"""The 3D causal VAE: 4x in time, 8x8 in space, 16 latent channels (paper section 2.1; spec section 3)."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from cogvideox_jax.core import video
from cogvideox_jax.core.errors import InputError
from cogvideox_jax.layers.conv import CausalConv3d, PointwiseConv, SpatialConv
from cogvideox_jax.layers.norm import SpatialNorm, group_norm

# A cache is a nested tuple with one (b, 2, h, w, c) array per causal convolution, in the order of the forward pass.
Cache = Any


class _Caches:
    """Hands out the old caches in order and gathers the new ones."""

    def __init__(self, old: Cache | None):
        self._old: Iterator | None = None if old is None else iter(old)
        self._new: list = []

    def __call__(self, layer: Callable, *args: Any) -> Any:
        y, new = layer(*args, None if self._old is None else next(self._old))
        self._new.append(new)
        return y

    @property
    def new(self) -> Cache:
        return tuple(self._new)


class ResnetBlock(nn.Module):
    """norm, SiLU, causal conv, twice, plus the skip. With latents the norms are SpatialNorm (decoder)."""

    features: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, latents: Array | None, cache: Cache | None = None) -> tuple[Array, Cache]:
        caches = _Caches(cache)

        def norm(y: Array, name: str) -> Array:
            if latents is None:
                return group_norm(self.groups, self.dtype, name)(y)
            return SpatialNorm(self.groups, self.dtype, name=name)(y, latents)

        y = caches(CausalConv3d(self.features, self.dtype, name="conv1"), nn.silu(norm(x, "norm1")))
        y = caches(CausalConv3d(self.features, self.dtype, name="conv2"), nn.silu(norm(y, "norm2")))
        if x.shape[-1] != self.features:
            x = PointwiseConv(self.features, self.dtype, name="shortcut")(x)
        return x + y, caches.new


def pool_time(x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h w c"]:
    """Average pairs of frames; in a chunk of odd length the first frame is kept as it is (spec 3.4)."""
    if x.shape[1] == 1:
        return x
    first, rest = (x[:, :1], x[:, 1:]) if x.shape[1] % 2 else (x[:, :0], x)
    pairs = (rest[:, 0::2] + rest[:, 1::2]) / 2
    return jnp.concatenate([first, pairs], axis=1)


def double(x: Float[Array, "b t h w c"], *, time: bool) -> Float[Array, "b t2 2*h 2*w c"]:
    """Repeat in space, and in time all frames but the first of a chunk of odd length (spec 3.4)."""
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    if not time or x.shape[1] == 1:
        return x
    if x.shape[1] % 2:
        return jnp.concatenate([x[:, :1], jnp.repeat(x[:, 1:], 2, axis=1)], axis=1)
    return jnp.repeat(x, 2, axis=1)


def narrow_posterior(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Bias of the encoder's last layer: means start at 0, log-variances at -6.

    With both at zero the noise of the posterior drowns the means until they have grown, which costs a short run its start.
    """
    del key
    return jnp.where(jnp.arange(shape[0]) < shape[0] // 2, 0, -6).astype(dtype)


class Encoder(nn.Module):
    """Pixels -> posterior moments (mean and log-variance concatenated on channels)."""

    channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w 3"], cache: Cache | None = None) -> tuple[Array, Cache]:
        caches = _Caches(cache)
        x = caches(CausalConv3d(self.channels[0], self.dtype, name="conv_in"), x)
        for i, features in enumerate(self.channels):
            for j in range(self.layers_per_block):
                x = caches(ResnetBlock(features, self.groups, self.dtype, name=f"down_{i}_resnet_{j}"), x, None)
            if i < len(self.channels) - 1:
                x = pool_time(x) if i < 2 else x
                x = SpatialConv(features, stride=2, dtype=self.dtype, name=f"down_{i}_downsample")(x)
        for j in range(2):
            x = caches(ResnetBlock(self.channels[-1], self.groups, self.dtype, name=f"mid_resnet_{j}"), x, None)
        x = nn.silu(group_norm(self.groups, self.dtype, "norm_out")(x))
        x = caches(CausalConv3d(2 * self.latent_channels, self.dtype, bias_init=narrow_posterior, name="conv_out"), x)
        return x, caches.new


class Decoder(nn.Module):
    """Latents -> pixels, every norm conditioned on the latents themselves."""

    channels: tuple[int, ...]
    layers_per_block: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latents: Float[Array, "b t h w z"], cache: Cache | None = None) -> tuple[Array, Cache]:
        caches = _Caches(cache)
        x = caches(CausalConv3d(self.channels[-1], self.dtype, name="conv_in"), latents)
        for j in range(2):
            x = caches(ResnetBlock(self.channels[-1], self.groups, self.dtype, name=f"mid_resnet_{j}"), x, latents)
        for i, features in enumerate(reversed(self.channels)):
            for j in range(self.layers_per_block + 1):
                x = caches(ResnetBlock(features, self.groups, self.dtype, name=f"up_{i}_resnet_{j}"), x, latents)
            if i < len(self.channels) - 1:
                x = double(x, time=i < 2)
                x = SpatialConv(features, dtype=self.dtype, name=f"up_{i}_upsample")(x)
        x = nn.silu(SpatialNorm(self.groups, self.dtype, name="norm_out")(x, latents))
        x = caches(CausalConv3d(3, self.dtype, name="conv_out"), x)
        return x, caches.new


class VAE(nn.Module):
    """The autoencoder; time is halved at the first two levels. The public one is in configs/models.py."""

    channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    groups: int
    dtype: Any = jnp.float32

    def setup(self):
        self.encoder = Encoder(self.channels, self.layers_per_block, self.latent_channels, self.groups, self.dtype)
        self.decoder = Decoder(self.channels, self.layers_per_block, self.groups, self.dtype)

    def encode(
        self, x: Float[Array, "b f h w 3"], cache: Cache | None = None
    ) -> tuple[Float[Array, "b t h1 w1 z"], Float[Array, "b t h1 w1 z"], Cache]:
        """Posterior mean and log-variance (clamped to [-30, 20]) of one chunk, and the cache for the next."""
        moments, cache = self.encoder(x, cache)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30, 20), cache

    def decode(
        self, latents: Float[Array, "b t h1 w1 z"], cache: Cache | None = None
    ) -> tuple[Float[Array, "b f h w 3"], Cache]:
        """Pixels of one chunk of (unscaled) latents, not clamped, and the cache for the next."""
        return self.decoder(latents, cache)

    def __call__(
        self, x: Float[Array, "b f h w 3"], key: jax.Array | None = None
    ) -> tuple[Float[Array, "b f h w 3"], Array, Array]:
        """Reconstruct whole clips: (reconstruction, mean, logvar). Samples the posterior with `key`, else uses its mean."""
        mean, logvar, _ = self.encode(x)
        latents = mean if key is None else sample_posterior(mean, logvar, key)
        return self.decode(latents)[0], mean, logvar


def sample_posterior(mean: Array, logvar: Array, key: jax.Array) -> Array:
    """mean + std * N(0, 1), float32."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, jnp.float32)


@functools.partial(jax.jit, static_argnames="vae")
def _encode_chunk(vae: VAE, params: Any, x: Array, cache: Cache | None) -> tuple[Array, Array, Cache]:
    return vae.apply({"params": params}, x, cache, method="encode")


@functools.partial(jax.jit, static_argnames="vae")
def _decode_chunk(vae: VAE, params: Any, latents: Array, cache: Cache | None) -> tuple[Array, Cache]:
    return vae.apply({"params": params}, latents, cache, method="decode")


def _tiles(height: int, width: int, sample: tuple[int, int], *, decode: bool) -> dict[str, tuple[int, int]] | None:
    """Sizes for video.tiled, derived as the reference does: tile = half the sample size, overlaps 1/6 and 1/5 (spec 3.7)."""
    pixel = (sample[0] // 2, sample[1] // 2)
    latent = (pixel[0] // video.SPACE_FACTOR, pixel[1] // video.SPACE_FACTOR)
    overlap = (1 / 6, 1 / 5)
    tile, out = (latent, pixel) if decode else (pixel, latent)
    if height <= tile[0] and width <= tile[1]:
        return None
    stride = tuple(int(n * (1 - o)) for n, o in zip(tile, overlap, strict=True))
    extent = tuple(int(n * o) for n, o in zip(out, overlap, strict=True))
    keep = tuple(n - e for n, e in zip(out, extent, strict=True))
    for axis, s, k in zip(("height", "width"), stride, keep, strict=True):
        in_pixels, kept = (s * video.SPACE_FACTOR, k) if decode else (s, k * video.SPACE_FACTOR)
        if in_pixels != kept:
            raise InputError(
                f"tiles of {pixel[0]}x{pixel[1]} pixels step {in_pixels} but keep {kept} along the {axis}, so the result "
                "would have another size: choose a tile_sample_size such as (480, 720)"
            )
    return dict(tile=tile, stride=stride, extent=extent, keep=keep)


def encode(
    vae: VAE,
    params: Any,
    x: Float[Array, "b f h w 3"],
    *,
    chunk: int | None = 8,
    tile_sample_size: tuple[int, int] | None = None,
) -> tuple[Float[Array, "b t h1 w1 z"], Float[Array, "b t h1 w1 z"]]:
    """Encode clips chunk by chunk with the causal cache.

    Args:
      x: pixels in [-1, 1]; f = 1, 4k or 4k + 1 frames.
      chunk: pixel frames per chunk, 8 in every public pipeline (the first takes the remainder too); None encodes the
        whole clip at once. GroupNorm pools over the chunk, so another size gives other numbers.
      tile_sample_size: (height, width) the tile sizes are derived from, 480x720 in the public config; None: no tiling.

    Returns: posterior mean and log-variance, float32, t = (f - 1) / 4 + 1.
    """

    def whole(part: Array) -> Array:
        cache, moments = None, []
        for start, stop in video.chunk_bounds(part.shape[1], chunk or part.shape[1]):
            mean, logvar, cache = _encode_chunk(vae, params, part[:, start:stop], cache)
            moments.append(jnp.concatenate([mean, logvar], axis=-1))
        return jnp.concatenate(moments, axis=1)

    tiles = tile_sample_size and _tiles(x.shape[2], x.shape[3], tile_sample_size, decode=False)
    mean, logvar = jnp.split(video.tiled(whole, x, **tiles) if tiles else whole(x), 2, axis=-1)
    return mean, logvar


def decode(
    vae: VAE,
    params: Any,
    latents: Float[Array, "b t h1 w1 z"],
    *,
    chunk: int | None = 2,
    tile_sample_size: tuple[int, int] | None = None,
) -> Float[Array, "b f h w 3"]:
    """Decode (unscaled) latents chunk by chunk; arguments as in `encode`, chunk in latent frames."""

    def whole(part: Array) -> Array:
        cache, frames = None, []
        for start, stop in video.chunk_bounds(part.shape[1], chunk or part.shape[1]):
            pixels, cache = _decode_chunk(vae, params, part[:, start:stop], cache)
            frames.append(pixels)
        return jnp.concatenate(frames, axis=1)

    tiles = tile_sample_size and _tiles(latents.shape[2], latents.shape[3], tile_sample_size, decode=True)
    return video.tiled(whole, latents, **tiles) if tiles else whole(latents)
