"""Frame algebra, patches and tiles."""

import bisect
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from cogvideox_jax.core.errors import InputError

TIME_FACTOR = 4  # pixel frames per latent frame, after the first
SPACE_FACTOR = 8  # pixels per latent, along each side


def latent_frames(num_frames: int) -> int:
    """4k + 1 pixel frames -> k + 1 latent frames. Raises InputError for any other count."""
    if num_frames < 1 or num_frames % TIME_FACTOR != 1:
        low = max(num_frames - 1, 0) // TIME_FACTOR * TIME_FACTOR + 1
        raise InputError(
            f"num_frames={num_frames} is not 4k+1, which the causal VAE needs: use {low} or {low + TIME_FACTOR}"
        )
    return (num_frames - 1) // TIME_FACTOR + 1


def check_sequence(num_frames: int, sequence: int) -> None:
    """Refuse clips whose frames do not divide over a `sequence` axis of this size (InputError).

    Each device takes the same number of latent frames, the first one apart (spec 3.10).
    """
    latents = latent_frames(num_frames) - 1
    if latents % sequence == 0:
        return
    step = math.lcm(sequence, 2) * TIME_FACTOR  # even, for latent_shape wants odd counts of latent frames
    low = (num_frames - 1) // step * step + 1
    frames = [str(n) for n in (low, low + step) if n > 1]
    sizes = [n for n in range(1, latents + 1) if latents % n == 0]
    near = [str(n) for n in (max(n for n in sizes if n < sequence), *sizes[bisect.bisect(sizes, sequence) :][:1])]
    raise InputError(
        f"num_frames={num_frames} does not divide over sequence={sequence}: the {num_frames - 1} frames after the first must "
        f"be a multiple of {TIME_FACTOR * sequence}: use num_frames={' or '.join(frames)}, or sequence={' or '.join(near)}"
    )


def pixel_frames(num_latent_frames: int) -> int:
    """k + 1 latent frames -> 4k + 1 pixel frames."""
    return (num_latent_frames - 1) * TIME_FACTOR + 1


def latent_shape(num_frames: int, height: int, width: int, *, patch_size: int = 2) -> tuple[int, int, int]:
    """Latent (t, h, w) of a clip that is to be decoded again.

    Raises InputError where the VAE and the patching do not divide the size, or where t is even (spec 1.4).
    """
    step = SPACE_FACTOR * patch_size
    for name, size in (("height", height), ("width", width)):
        if size < step or size % step:
            low = max(size // step, 1) * step
            raise InputError(
                f"{name}={size} is not a multiple of {step} (8 for the VAE x {patch_size} for the patches): "
                f"use {low} or {low + step}"
            )
    frames = latent_frames(num_frames)
    if frames % 2 == 0:
        # the decoder knows the first frame of a clip, which stands for itself, by the odd length of its first chunk
        raise InputError(
            f"num_frames={num_frames} gives {frames} latent frames, and the VAE decodes only odd counts to the length "
            f"they came from: use {num_frames - TIME_FACTOR} or {num_frames + TIME_FACTOR}"
        )
    return frames, height // SPACE_FACTOR, width // SPACE_FACTOR


def patchify(
    latents: Float[Array, "b t h w c"], patch_size: int, patch_size_t: int = 1
) -> Float[Array, "b n features"]:
    """Cut into patches: tokens in the order t, row, column; features in the order (c, pt, ph, pw) (spec 2.3)."""
    return rearrange(
        latents,
        "b (t pt) (h ph) (w pw) c -> b (t h w) (c pt ph pw)",
        pt=patch_size_t,
        ph=patch_size,
        pw=patch_size,
    )


def unpatchify(
    tokens: Float[Array, "b n features"], t: int, h: int, w: int, patch_size: int, patch_size_t: int = 1
) -> Float[Array, "b t h w c"]:
    """Undo `patchify`; t, h, w are the latent's size, not the token grid's."""
    return rearrange(
        tokens,
        "b (t h w) (c pt ph pw) -> b (t pt) (h ph) (w pw) c",
        t=t // patch_size_t,
        h=h // patch_size,
        w=w // patch_size,
        pt=patch_size_t,
        ph=patch_size,
        pw=patch_size,
    )


def chunk_bounds(length: int, chunk: int) -> list[tuple[int, int]]:
    """Chunks along time: the first takes the remainder too (spec 3.6), so 49 by 8 is 9 + 5 x 8 and 13 by 2 is 3 + 5 x 2."""
    count = max(length // chunk, 1)
    rest = length % chunk if length >= chunk else length - chunk
    return [(0 if i == 0 else chunk * i + rest, chunk * (i + 1) + rest) for i in range(count)]


def blend(before: Array, after: Array, extent: int, axis: int) -> Array:
    """Cross-fade the first `extent` entries of `after` with the last ones of `before` along `axis` (spec 3.7)."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    weight = (np.arange(extent, dtype=np.float32) / extent).reshape(-1, *[1] * (after.ndim - axis - 1))
    head, rest = jnp.split(after, [extent], axis=axis)
    tail = jnp.split(before, [before.shape[axis] - extent], axis=axis)[1]
    return jnp.concatenate([tail * (1 - weight) + head * weight, rest], axis=axis)


def tiled(
    function: Callable[[Array], Array],
    x: Float[Array, "b t h w c"],
    *,
    tile: tuple[int, int],
    stride: tuple[int, int],
    extent: tuple[int, int],
    keep: tuple[int, int],
) -> Array:
    """Apply `function` to overlapping spatial tiles and blend the results (spec 3.7).

    Args:
      function: maps a tile (b, t, <=tile h, <=tile w, c) to its output at another scale.
      tile, stride: size and distance of the tiles, in input units (rows, columns).
      extent, keep: width of the cross-fade and the part of each tile that is kept, in output units.

    Vertical blending comes first (with the tile above, already blended), then horizontal (with the left one).
    """
    height, width = x.shape[2], x.shape[3]
    rows = [
        [function(x[:, :, i : i + tile[0], j : j + tile[1]]) for j in range(0, width, stride[1])]
        for i in range(0, height, stride[0])
    ]
    for i, row in enumerate(rows):
        for j in range(len(row)):
            if i > 0:
                row[j] = blend(rows[i - 1][j], row[j], extent[0], axis=2)
            if j > 0:
                row[j] = blend(row[j - 1], row[j], extent[1], axis=3)
    kept = [jnp.concatenate([part[:, :, : keep[0], : keep[1]] for part in row], axis=3) for row in rows]
    return jnp.concatenate(kept, axis=2)
