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
from cogvideox_jax.layers.norm import GroupNorm, SpatialNorm
from cogvideox_jax.parallel import halo
from cogvideox_jax.parallel.halo import Frames
from cogvideox_jax.parallel.sharding import REPLICATED, constrain

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
    def __call__(self, x: Frames, latents: Frames | None, cache: Cache | None = None) -> tuple[Frames, Cache]:
        caches = _Caches(cache)

        def norm(y: Frames, name: str) -> Frames:
            if latents is None:
                return GroupNorm(self.groups, self.dtype, name=name)(y)
            return SpatialNorm(self.groups, self.dtype, name=name)(y, latents)

        y = caches(CausalConv3d(self.features, self.dtype, name="conv1"), _silu(norm(x, "norm1")))
        y = caches(CausalConv3d(self.features, self.dtype, name="conv2"), _silu(norm(y, "norm2")))
        if jax.tree.leaves(x)[0].shape[-1] != self.features:
            x = jax.tree.map(PointwiseConv(self.features, self.dtype, name="shortcut"), x)
        return jax.tree.map(jnp.add, x, y), caches.new


def _silu(x: Frames) -> Frames:
    return jax.tree.map(nn.silu, x)


def _blocks(
    coder: "Encoder | Decoder", features: int, names: list[str], x: Frames, latents: Frames | None, caches: _Caches
) -> Frames:
    """Residual blocks of `coder`, one after the other, all but the first of equal shapes.

    With coder.remat those of equal shapes are one loop over their stacked weights, which is compiled once instead of once a
    block, and whose backward pass computes each block again from its input. There are no caches then.
    """
    fields = dict(features=features, groups=coder.groups, dtype=coder.dtype)
    if not coder.remat or coder.is_initializing():
        for name in names:
            x = caches(ResnetBlock(**fields, name=name), x, latents)
        return x

    def body(x: Frames, weights: Any) -> tuple[Frames, None]:
        return ResnetBlock(**fields, parent=None).apply({"params": weights}, x, latents)[0], None

    weights = [coder.variables["params"][name] for name in names]
    if weights and jax.tree.leaves(x)[0].shape[-1] != features:
        x, _ = jax.checkpoint(body)(x, weights.pop(0))
    if weights:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
        x, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), x, stacked)
    return x


def pool_time(x: Frames) -> Frames:
    """Average pairs of frames; the first frame of a clip is kept as it is (spec 3.4)."""
    return halo.after_first(lambda rest: (rest[:, 0::2] + rest[:, 1::2]) / 2, x)


def double(x: Frames, *, time: bool) -> Frames:
    """Repeat in space, and in time all frames but the first of a clip (spec 3.4)."""
    x = jax.tree.map(lambda part: jnp.repeat(jnp.repeat(part, 2, axis=2), 2, axis=3), x)
    return halo.after_first(lambda rest: jnp.repeat(rest, 2, axis=1), x) if time else x


def narrow_posterior(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Bias of the encoder's last layer: means start at 0, log-variances at -6.

    With both at zero the noise of the posterior drowns the means until they have grown, which costs a short run its start.
    """
    del key
    return jnp.where(jnp.arange(shape[0]) < shape[0] // 2, 0, -6).astype(dtype)


class Encoder(nn.Module):
    """Pixels (b, f, h, w, 3) -> posterior moments (mean and log-variance concatenated on channels)."""

    channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    groups: int
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Frames, cache: Cache | None = None) -> tuple[Frames, Cache]:
        caches = _Caches(cache)
        x = caches(CausalConv3d(self.channels[0], self.dtype, name="conv_in"), x)
        for i, features in enumerate(self.channels):
            names = [f"down_{i}_resnet_{j}" for j in range(self.layers_per_block)]
            if i == len(self.channels) - 1:
                names += ["mid_resnet_0", "mid_resnet_1"]
            x = _blocks(self, features, names, x, None, caches)
            if i < len(self.channels) - 1:
                x = pool_time(x) if i < 2 else x
                x = jax.tree.map(SpatialConv(features, stride=2, dtype=self.dtype, name=f"down_{i}_downsample"), x)
        x = _silu(GroupNorm(self.groups, self.dtype, name="norm_out")(x))
        x = caches(CausalConv3d(2 * self.latent_channels, self.dtype, bias_init=narrow_posterior, name="conv_out"), x)
        return x, caches.new


class Decoder(nn.Module):
    """Latents (b, t, h, w, z) -> pixels, every norm conditioned on the latents themselves."""

    channels: tuple[int, ...]
    layers_per_block: int
    groups: int
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, latents: Frames, cache: Cache | None = None) -> tuple[Frames, Cache]:
        caches = _Caches(cache)
        x = caches(CausalConv3d(self.channels[-1], self.dtype, name="conv_in"), latents)
        for i, features in enumerate(reversed(self.channels)):
            names = ["mid_resnet_0", "mid_resnet_1"] if i == 0 else []
            names += [f"up_{i}_resnet_{j}" for j in range(self.layers_per_block + 1)]
            x = _blocks(self, features, names, x, latents, caches)
            if i < len(self.channels) - 1:
                x = double(x, time=i < 2)
                x = jax.tree.map(SpatialConv(features, dtype=self.dtype, name=f"up_{i}_upsample"), x)
        x = _silu(SpatialNorm(self.groups, self.dtype, name="norm_out")(x, latents))
        x = caches(CausalConv3d(3, self.dtype, name="conv_out"), x)
        return x, caches.new


class VAE(nn.Module):
    """The autoencoder; time is halved at the first two levels. The public one is in configs/models.py.

    Its methods take whole clips, or frames that parallel.halo has split over `sequence`, and answer in kind.

    Fields:
      remat: for training large clips (see `_blocks`): the backward pass computes each residual block again instead of keeping
        what is inside, and equal blocks compile once. Whole clips only: there are no caches.
    """

    channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    groups: int
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self):
        fields = dict(dtype=self.dtype, remat=self.remat)
        self.encoder = Encoder(self.channels, self.layers_per_block, self.latent_channels, self.groups, **fields)
        self.decoder = Decoder(self.channels, self.layers_per_block, self.groups, **fields)

    def encode(self, x: Frames, cache: Cache | None = None) -> tuple[Frames, Frames, Cache]:
        """One chunk of pixels (b, f, h, w, 3): posterior mean and log-variance, clamped to [-30, 20], both float32
        (b, t, h1, w1, z), and the cache for the next chunk."""
        if self.remat and cache is not None:
            raise ValueError("with remat there are no caches: encode whole clips, or without remat")
        moments, cache = self.encoder(x, cache)
        mean = jax.tree.map(lambda part: part[..., : self.latent_channels].astype(jnp.float32), moments)
        logvar = jax.tree.map(lambda part: part[..., self.latent_channels :].astype(jnp.float32), moments)
        return mean, jax.tree.map(lambda part: jnp.clip(part, -30, 20), logvar), cache

    def decode(self, latents: Frames, cache: Cache | None = None) -> tuple[Frames, Cache]:
        """Pixels (b, f, h, w, 3) of one chunk of (unscaled) latents, not clamped, and the cache for the next."""
        if self.remat and cache is not None:
            raise ValueError("with remat there are no caches: decode whole clips, or without remat")
        return self.decoder(latents, cache)

    def __call__(self, x: Frames, key: jax.Array | None = None) -> tuple[Frames, Frames, Frames]:
        """Reconstruct whole clips: (reconstruction, mean, logvar). Samples the posterior with `key`, else uses its mean."""
        mean, logvar, _ = self.encode(x)
        latents = mean if key is None else sample_posterior(mean, logvar, key)
        return self.decode(latents)[0], mean, logvar


def sample_posterior(mean: Frames, logvar: Frames, key: jax.Array) -> Frames:
    """mean + std * N(0, 1), float32."""
    noise = halo.draw(lambda shape: jax.random.normal(key, shape, jnp.float32), mean)
    return jax.tree.map(lambda m, l, n: m + jnp.exp(0.5 * l) * n, mean, logvar, noise)


def gathered(params: Any) -> Any:
    """Parameters whole on each device before they are used: left to itself the compiler may move frames instead."""
    return jax.tree.map(lambda leaf: constrain(leaf, REPLICATED), params)


@functools.partial(jax.jit, static_argnames=("vae", "apart"))
def _encode_chunk(vae: VAE, params: Any, x: Array, cache: Cache | None, *, apart: bool) -> tuple[Array, Cache]:
    frames = halo.split(x, video.TIME_FACTOR, first=cache is None) if apart else x
    mean, logvar, cache = vae.apply({"params": gathered(params)}, frames, cache, method="encode")
    moments = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), mean, logvar)
    return halo.join(moments), cache


@functools.partial(jax.jit, static_argnames=("vae", "apart"))
def _decode_chunk(vae: VAE, params: Any, latents: Array, cache: Cache | None, *, apart: bool) -> tuple[Array, Cache]:
    frames = halo.split(latents, 1, first=cache is None) if apart else latents
    pixels, cache = vae.apply({"params": gathered(params)}, frames, cache, method="decode")
    return halo.join(pixels), cache


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


def _in_parts(
    function: Callable[..., tuple[Array, Cache]],
    vae: VAE,
    params: Any,
    x: Array,
    *,
    unit: int,
    chunk: int | None,
    tiles: dict[str, tuple[int, int]] | None,
    slicing: bool,
    done: Callable[[Array], None],
) -> Array:
    """`function` on each sample (with slicing), on each tile of it, on each chunk in time of that."""

    bounds = video.chunk_bounds(x.shape[1], chunk or x.shape[1])
    # the cache is of one kind from the first chunk to the last, and an even first chunk has no first frame of its own
    apart = bounds[0][1] % 2 == 1 and all(halo.divides(stop - start, unit, first=start == 0) for start, stop in bounds)

    def whole(part: Array) -> Array:
        cache, outputs = None, []
        for start, stop in bounds:
            output, cache = function(vae, params, part[:, start:stop], cache, apart=apart)
            outputs.append(output)
            done(output)
        return jnp.concatenate(outputs, axis=1)

    samples = jnp.split(x, x.shape[0]) if slicing else [x]
    return jnp.concatenate([video.tiled(whole, sample, **tiles) if tiles else whole(sample) for sample in samples])


def encode(
    vae: VAE,
    params: Any,
    x: Float[Array, "b f h w 3"],
    *,
    chunk: int | None = 8,
    tile_sample_size: tuple[int, int] | None = None,
    slicing: bool = False,
    done: Callable[[Array], None] = lambda output: None,
) -> tuple[Float[Array, "b t h1 w1 z"], Float[Array, "b t h1 w1 z"]]:
    """Encode clips chunk by chunk with the causal cache.

    Args:
      x: pixels in [-1, 1]; f = 1, 4k or 4k + 1 frames.
      chunk: pixel frames per chunk, 8 in every public pipeline (the first takes the remainder too); None encodes the
        whole clip at once. GroupNorm pools over the chunk, so another size gives other numbers.
      tile_sample_size: (height, width) the tile sizes are derived from, 480x720 in the public config; None: no tiling.
      slicing: one sample of the batch after the other, which takes less memory and gives the same numbers.
      done: is called with the result of each chunk of each tile, for progress; it may not be computed yet.

    Under a mesh the frames of each chunk are split over `sequence` where they divide in every chunk: after the first frame a
    multiple of 4 (in `decode` of 1) on each device, so whole clips of 1 + 4 k x sequence frames do, and public chunks over
    sequence=2. Else every device of `sequence` computes all frames.

    Returns: posterior mean and log-variance, float32, t = (f - 1) / 4 + 1.
    Raises InputError for a tile size whose tiles would not fit together.
    """
    tiles = tile_sample_size and _tiles(x.shape[2], x.shape[3], tile_sample_size, decode=False)
    parts = dict(unit=video.TIME_FACTOR, chunk=chunk, tiles=tiles, slicing=slicing, done=done)
    mean, logvar = jnp.split(_in_parts(_encode_chunk, vae, params, x, **parts), 2, axis=-1)
    return mean, logvar


def decode(
    vae: VAE,
    params: Any,
    latents: Float[Array, "b t h1 w1 z"],
    *,
    chunk: int | None = 2,
    tile_sample_size: tuple[int, int] | None = None,
    slicing: bool = False,
    done: Callable[[Array], None] = lambda output: None,
) -> Float[Array, "b f h w 3"]:
    """Decode (unscaled) latents chunk by chunk; arguments as in `encode`, chunk in latent frames."""
    tiles = tile_sample_size and _tiles(latents.shape[2], latents.shape[3], tile_sample_size, decode=True)
    parts = dict(unit=1, chunk=chunk, tiles=tiles, slicing=slicing, done=done)
    return _in_parts(_decode_chunk, vae, params, latents, **parts)
