"""Positions of tokens in time and space: 3D rotary angles and 3D sin-cos tables.

Every token carries a position (t, row, column); nothing here knows a mesh or a model, so a packed row of clips is only a
longer list of positions.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

THETA = 10_000.0
RULES = ("integer", "linspace")


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Split of a head over (t, h, w): a quarter, three eighths, three eighths (spec 2.7; 64 -> 16, 24, 24)."""
    dims = (head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8)
    if sum(dims) != head_dim or any(d % 2 for d in dims):
        raise ValueError(f"head_dim must be a multiple of 16 for 3D rotary embedding, got {head_dim}")
    return dims


def grid_positions(
    t: int, h: int, w: int, *, rule: str = "integer", base: tuple[int, int] = (30, 45)
) -> Float[np.ndarray, "n 3"]:
    """Positions of a t x h x w grid of tokens, in the order t, row, column.

    Args:
      t, h, w: token counts (after patching).
      rule: "integer" counts 0, 1, 2, ... on every axis (SAT; also the paper's extrapolation to larger sizes).
        "linspace" fits (h, w) into the grid `base` keeping the aspect ratio, as diffusers' 1.0 pipelines do; its end-point
        formula is reproduced literally (spec 2.7).
      base: rows and columns of the training grid, used by "linspace" only.

    Returns: float32 (t*h*w, 3).
    """
    rows, columns = np.arange(h, dtype=np.float32), np.arange(w, dtype=np.float32)
    if rule == "linspace":
        base_h, base_w = base
        if h / w > base_h / base_w:
            fit_h, fit_w = base_h, round(base_h / h * w)
        else:
            fit_h, fit_w = round(base_w / w * h), base_w
        top, left = round((base_h - fit_h) / 2), round((base_w - fit_w) / 2)
        rows = np.linspace(top, (top + fit_h) * (h - 1) / h, h, dtype=np.float32)
        columns = np.linspace(left, (left + fit_w) * (w - 1) / w, w, dtype=np.float32)
    elif rule != "integer":
        raise ValueError(f"unknown position rule {rule!r}, expected one of {RULES}")
    times = np.arange(t, dtype=np.float32)
    return np.stack(np.meshgrid(times, rows, columns, indexing="ij"), axis=-1).reshape(-1, 3)


def rotary_angles(positions: Float[Array, "... n 3"], head_dim: int) -> Float[Array, "... n {head_dim//2}"]:
    """One angle per rotated pair, float32. A position of zero rotates by nothing, which is what text tokens get."""
    parts = []
    for axis, dim in enumerate(axis_dims(head_dim)):
        frequencies = THETA ** (-np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
        parts.append(positions[..., axis, None].astype(jnp.float32) * frequencies)
    return jnp.concatenate(parts, axis=-1)


def apply_rope(
    x: Float[Array, "b l heads d"], cos: Float[Array, "#b l d/2"], sin: Float[Array, "#b l d/2"]
) -> Float[Array, "b l heads d"]:
    """Rotate neighbouring pairs: (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin), in float32, result in x's dtype.

    The pairs are interleaved (0,1), (2,3), ... and not the two halves of the head (spec 2.7).
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def _sincos_1d(positions: np.ndarray, dim: int) -> np.ndarray:
    omega = THETA ** (-np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angles = positions.reshape(-1, 1) * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def sincos_table(t: int, h: int, w: int, dim: int, *, spatial_scale: float = 1.875) -> Float[np.ndarray, "n {dim}"]:
    """Fixed additive table of the 2B model (spec 2.4): dim/4 channels for t, then 3/8 each for the column and the row.

    Returns: float32 (t*h*w, dim), tokens in the order t, row, column.
    """
    if dim % 16:
        raise ValueError(f"the width of a 3D sin-cos table must be a multiple of 16, got {dim}")
    positions = grid_positions(t, h, w).astype(np.float64)
    columns, rows = positions[:, 2] / spatial_scale, positions[:, 1] / spatial_scale
    parts = [
        _sincos_1d(positions[:, 0], dim // 4),
        _sincos_1d(columns, 3 * dim // 8),
        _sincos_1d(rows, 3 * dim // 8),
    ]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def cos_sin(angles: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Cosine and sine of the angles, float32."""
    return jax.numpy.cos(angles), jax.numpy.sin(angles)
