"""Training the VAE: objective, step and evaluation (paper section 2.1; spec 3.11)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from cogvideox_jax.core import losses
from cogvideox_jax.core.video import TIME_FACTOR
from cogvideox_jax.models.vae import VAE, gathered
from cogvideox_jax.parallel import halo
from cogvideox_jax.parallel.sharding import BATCH, constrain
from cogvideox_jax.train.state import TrainState, apply_gradients


def objective(
    params: Any, vae: VAE, video: Float[Array, "b f h w 3"], key: jax.Array, *, kl_weight: float
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean absolute error plus weighted KL, with its parts as logs. Frames that divide are split over `sequence`."""
    frames = halo.split(video, TIME_FACTOR)
    reconstruction, mean, logvar = vae.apply({"params": gathered(params)}, frames, key)
    l1 = halo.frame_mean(losses.reconstruction_l1, frames, reconstruction)
    kl = halo.frame_mean(losses.kl_divergence, mean, logvar)
    psnr = jnp.mean(losses.psnr_of(halo.clip_mean(losses.clipped_mse, frames, reconstruction)))
    return l1 + kl_weight * kl, {"l1": l1, "kl": kl, "psnr_db": psnr}


@functools.partial(jax.jit, static_argnames=("vae", "optimizer", "kl_weight", "ema_decay"), donate_argnames="state")
def train_step(
    state: TrainState,
    batch: dict[str, Array],
    key: jax.Array,
    *,
    vae: VAE,
    optimizer: optax.GradientTransformation,
    kl_weight: float,
    ema_decay: float,
) -> tuple[TrainState, dict[str, Array]]:
    """One update from {"video": (b, f, h, w, 3) in [-1, 1]}. `key` is the run's; the step's own is folded from it."""
    video = constrain(batch["video"], BATCH)
    grad = jax.value_and_grad(objective, has_aux=True)
    (loss, logs), gradients = grad(state.params, vae, video, jax.random.fold_in(key, state.step), kl_weight=kl_weight)
    state, grad_norm = apply_gradients(state, gradients, optimizer, ema_decay=ema_decay)
    return state, {"loss": loss, "grad_norm": grad_norm, **logs}


@functools.partial(jax.jit, static_argnames="vae")
def reconstruct(params: Any, video: Float[Array, "b f h w 3"], *, vae: VAE) -> tuple[Array, Float[Array, "b"]]:
    """Reconstruction from the posterior mean, clipped to [-1, 1], and each clip's PSNR in dB."""
    reconstruction, _, _ = vae.apply({"params": gathered(params)}, halo.split(video, TIME_FACTOR))
    reconstruction = jnp.clip(halo.join(reconstruction), -1, 1)
    return reconstruction, losses.psnr(video, reconstruction)
