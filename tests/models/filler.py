"""Deterministic values for goldens that need no checkpoint (spec 11.1)."""

import numpy as np


def fill(shape: tuple[int, ...], index: int) -> np.ndarray:
    n = np.arange(int(np.prod(shape)), dtype=np.int64)
    return (((7919 * n + 104729 * index + 17) % 2003) / 2003 - 0.5).reshape(shape)


def state_dict(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights for the keys of a diffusers state dict, numbered in lexicographic order."""
    tensors = {}
    for index, key in enumerate(sorted(shapes)):
        u = fill(shapes[key], index)
        *parents, kind = key.split(".")
        is_norm = any("norm" in p for p in parents[-1:]) and kind == "weight" and parents[-1] != "linear"
        value = 0.5 * u if u.ndim == 2 else 0.3 * u
        if u.ndim == 1:
            value = 1 + 0.2 * u if is_norm else 0.04 * u
        tensors[key] = value.astype(np.float32)
    return tensors


def inputs(shape: tuple[int, ...], index: int) -> np.ndarray:
    return (2 * fill(shape, index)).astype(np.float32)


def summary(x: np.ndarray) -> list[float]:
    """Mean, L2 norm, largest magnitude, first four and last four elements, in row-major order."""
    flat = np.asarray(x, np.float64).ravel()
    return [flat.mean(), np.linalg.norm(flat), np.abs(flat).max(), *flat[:4], *flat[-4:]]
