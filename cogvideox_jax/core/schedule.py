"""The noise schedule and the conversions between velocity, clean sample and noise (paper section 2; spec 4.1, 4.2)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

NUM_TIMESTEPS = 1000


def alphas_cumprod(
    *, snr_shift_scale: float = 1.0, zero_terminal_snr: bool = True, num_timesteps: int = NUM_TIMESTEPS
) -> Float[np.ndarray, "t"]:
    """Cumulative alpha products of the scaled-linear betas .00085 -> .012, in float64.

    Args:
      snr_shift_scale: s in alpha <- alpha / (s + (1 - s) alpha), which divides the SNR by s (3 for 2B, 1 for 5B).
      zero_terminal_snr: rescale so that the last timestep is pure noise (arXiv 2305.08891).
      num_timesteps: length of the table.
    """
    betas = np.linspace(0.00085**0.5, 0.012**0.5, num_timesteps, dtype=np.float64) ** 2
    alphas = np.cumprod(1 - betas)
    alphas = alphas / (snr_shift_scale + (1 - snr_shift_scale) * alphas)
    if zero_terminal_snr:
        roots = np.sqrt(alphas)
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        alphas = roots**2
    return alphas


def _coefficients(alpha: Float[Array, "b"], ndim: int) -> tuple[Array, Array]:
    alpha = jnp.asarray(alpha, jnp.float32).reshape(-1, *[1] * (ndim - 1))
    return jnp.sqrt(alpha), jnp.sqrt(1 - alpha)


def add_noise(
    clean: Float[Array, "b ..."], noise: Float[Array, "b ..."], alpha: Float[Array, "b"]
) -> Float[Array, "b ..."]:
    """noisy = sqrt(alpha) clean + sqrt(1 - alpha) noise, in float32; alpha is one entry of the table per sample."""
    signal, sigma = _coefficients(alpha, clean.ndim)
    return signal * clean.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def velocity(
    clean: Float[Array, "b ..."], noise: Float[Array, "b ..."], alpha: Float[Array, "b"]
) -> Float[Array, "b ..."]:
    """What the network predicts: v = sqrt(alpha) noise - sqrt(1 - alpha) clean (arXiv 2202.00512)."""
    signal, sigma = _coefficients(alpha, clean.ndim)
    return signal * noise.astype(jnp.float32) - sigma * clean.astype(jnp.float32)


def clean_from_velocity(
    noisy: Float[Array, "b ..."], prediction: Float[Array, "b ..."], alpha: Float[Array, "b"]
) -> Float[Array, "b ..."]:
    """The clean sample that a predicted velocity implies: sqrt(alpha) noisy - sqrt(1 - alpha) v."""
    signal, sigma = _coefficients(alpha, noisy.ndim)
    return signal * noisy.astype(jnp.float32) - sigma * prediction.astype(jnp.float32)
