"""Losses as pure functions; reductions in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def reconstruction_l1(video: Float[Array, "b t h w c"], reconstruction: Float[Array, "b t h w c"]) -> Float[Array, ""]:
    """Mean absolute error over all elements."""
    return jnp.mean(jnp.abs(video.astype(jnp.float32) - reconstruction.astype(jnp.float32)))


def kl_divergence(mean: Float[Array, "b ..."], logvar: Float[Array, "b ..."]) -> Float[Array, ""]:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats per latent element, averaged over all of them."""
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    return 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)


def mse_per_sample(prediction: Float[Array, "b ..."], target: Float[Array, "b ..."]) -> Float[Array, "b"]:
    """Mean squared error of each sample. On velocity it equals SAT's weighted x0 loss exactly (spec 4.2)."""
    error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


def clipped_mse(video: Float[Array, "b ..."], reconstruction: Float[Array, "b ..."]) -> Float[Array, "b"]:
    """Mean squared error of each sample, its reconstruction clipped to [-1, 1]."""
    return mse_per_sample(jnp.clip(reconstruction.astype(jnp.float32), -1, 1), video)


def psnr_of(mse: Float[Array, "..."]) -> Float[Array, "..."]:
    """Peak signal to noise ratio in dB of values in [-1, 1] (peak to peak 2), at most 106."""
    return 10 * jnp.log10(4 / jnp.maximum(mse, 1e-10))


def psnr(video: Float[Array, "b ..."], reconstruction: Float[Array, "b ..."]) -> Float[Array, "b"]:
    """Peak signal to noise ratio in dB of each sample, clipped first."""
    return psnr_of(clipped_mse(video, reconstruction))
