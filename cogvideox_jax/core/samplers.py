"""Samplers as tables of coefficients and pure steps (spec 5.1-5.4).

Every coefficient is computed on the host in float64, infinities and all, so the compiled loop only multiplies and adds.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cogvideox_jax.core.schedule import NUM_TIMESTEPS


class Coefficients(NamedTuple):
    """One row per sampling step; all float32 but the int32 timesteps.

    A step is: clean = signal x - sigma v;  target = now clean + before previous clean;
    next x = keep x + pull target + spread z.
    """

    timesteps: np.ndarray
    signal: np.ndarray
    sigma: np.ndarray
    keep: np.ndarray
    pull: np.ndarray
    now: np.ndarray
    before: np.ndarray
    spread: np.ndarray


class SamplerState(NamedTuple):
    """What the loop carries: the sample and the last estimate of the clean sample, float32."""

    sample: Array
    clean: Array


def trailing_timesteps(num_steps: int, num_timesteps: int = NUM_TIMESTEPS) -> np.ndarray:
    """999, 979, ..., 19 for 50 steps: the last timestep, where the SNR is zero, is always visited."""
    return (np.round(np.arange(num_timesteps, 0, -num_timesteps / num_steps)) - 1).astype(np.int32)


def _table(alphas: np.ndarray, num_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not 1 <= num_steps <= len(alphas):
        raise ValueError(f"num_inference_steps must be between 1 and {len(alphas)}, got {num_steps}")
    timesteps = trailing_timesteps(num_steps, len(alphas))
    # the integer division is the reference's: where num_steps does not divide 1000 it is not the next visited timestep
    previous = timesteps - len(alphas) // num_steps
    return timesteps, alphas[timesteps], np.where(previous >= 0, alphas[np.maximum(previous, 0)], 1.0)


def ddim(alphas: np.ndarray, num_steps: int) -> Coefficients:
    """CogVideoX-DDIM (spec 5.2), trailing spacing. `alphas` is the whole table of schedule.alphas_cumprod."""
    timesteps, alpha, alpha_next = _table(alphas, num_steps)
    keep = np.sqrt((1 - alpha_next) / (1 - alpha))
    zeros = np.zeros(num_steps)
    rows = (np.sqrt(alpha), np.sqrt(1 - alpha), keep, np.sqrt(alpha_next) - np.sqrt(alpha) * keep)
    return Coefficients(timesteps, *(r.astype(np.float32) for r in (*rows, zeros + 1, zeros, zeros)))


def dpm(alphas: np.ndarray, num_steps: int, *, stochastic: bool = True) -> Coefficients:
    """SDE-DPM-Solver++(2M) as in CogVideoX (spec 5.3); stochastic=False gives its ODE form (VPODEDPMPP2M)."""
    timesteps, alpha, alpha_next = _table(alphas, num_steps)
    with np.errstate(divide="ignore", invalid="ignore"):
        lam, lam_next = (0.5 * (np.log(a) - np.log1p(-a)) for a in (alpha, alpha_next))
        step = lam_next - lam
        decay = np.exp(-(2 if stochastic else 1) * step)
        ratio = np.sqrt((1 - alpha_next) / (1 - alpha))
        keep = ratio * np.exp(-step) if stochastic else ratio
        pull = -np.expm1(-(2 if stochastic else 1) * step) * np.sqrt(alpha_next)
        spread = np.sqrt(1 - alpha_next) * np.sqrt(1 - decay) if stochastic else np.zeros(num_steps)
        r = (lam - np.concatenate([[np.nan], lam[:-1]])) / step
    # first step: nothing to extrapolate from; second: r is infinite; last: a where-mask would turn infinity into NaN
    second_order = np.isfinite(r) & np.isfinite(lam_next) & (r != 0)
    before = np.where(second_order, -0.5 / np.where(second_order, r, 1.0), 0.0)
    rows = (np.sqrt(alpha), np.sqrt(1 - alpha), keep, pull, 1 - before, before, spread)
    return Coefficients(timesteps, *(r.astype(np.float32) for r in rows))


SAMPLERS = {
    "ddim": ddim,
    "dpm": dpm,
    "dpm_ode": lambda alphas, num_steps: dpm(alphas, num_steps, stochastic=False),
}


def sampler_step(
    state: SamplerState, velocity: Float[Array, "b ..."], row: Coefficients, noise: Float[Array, "b ..."] | None
) -> SamplerState:
    """One step from a velocity prediction. `row` holds scalars; `noise` is N(0, 1), None where spread is zero."""
    clean = jnp.asarray(row.signal * state.sample - row.sigma * velocity.astype(jnp.float32))
    target = row.now * clean + row.before * state.clean
    sample = jnp.asarray(row.keep * state.sample + row.pull * target)
    if noise is not None:
        sample = sample + row.spread * noise
    return SamplerState(sample, clean)


def guide(unconditional: Array, conditional: Array, scale: Float[Array, ""] | float) -> Array:
    """Classifier-free guidance (arXiv 2207.12598) on the raw prediction, float32."""
    unconditional, conditional = unconditional.astype(jnp.float32), conditional.astype(jnp.float32)
    return unconditional + scale * (conditional - unconditional)


def guidance_scales(
    guidance_scale: float, timesteps: np.ndarray, *, dynamic: str = "none"
) -> Float[np.ndarray, "num_steps"]:
    """Guidance per step.

    Args:
      guidance_scale: the base value g.
      timesteps: the visited training timesteps.
      dynamic: "none" is g throughout. "reference" is 1 + g (1 - cos(pi ((N - t)/N)^5)) / 2 with t the training timestep and N
        the number of steps, verbatim from both references, oscillation included (spec 5.4). "ramp" puts the step index
        there instead, which is the smooth ramp that the name promises.
    """
    steps = len(timesteps)
    if dynamic == "none":
        return np.full(steps, guidance_scale, np.float32)
    if dynamic not in ("reference", "ramp"):
        raise ValueError(f"unknown dynamic guidance {dynamic!r}, expected none, reference or ramp")
    base = (steps - timesteps) / steps if dynamic == "reference" else np.arange(steps) / steps
    return (1 + guidance_scale * (1 - np.cos(np.pi * np.asarray(base, np.float64) ** 5)) / 2).astype(np.float32)
