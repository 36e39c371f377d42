"""Training the denoiser: v-prediction with explicit uniform timesteps and text dropout (paper section 3; spec 4)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from cogvideox_jax.core import losses, schedule, timesteps
from cogvideox_jax.core.rope import grid_positions
from cogvideox_jax.models.transformer import Transformer
from cogvideox_jax.models.vae import sample_posterior
from cogvideox_jax.parallel.sharding import BATCH, constrain
from cogvideox_jax.train.state import TrainState, apply_gradients

Batch = dict[str, Array]


def positions(model: Transformer, latent_shape: tuple[int, int, int]) -> Float[np.ndarray, "n 3"]:
    """Integer positions of the video tokens of latents (t, h, w)."""
    t, h, w = latent_shape
    return grid_positions(t // model.patch_size_t, h // model.patch_size, w // model.patch_size)


def objective(
    params: Any,
    model: Transformer,
    batch: Batch,
    key: jax.Array,
    *,
    scaling_factor: float,
    snr_shift_scale: float,
    timestep_sampling: str,
    text_dropout: float,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean over samples of the squared error of the velocity.

    Args:
      batch: {"mean", "logvar"}: the VAE's posterior (b, t, h, w, c), unscaled; {"context"}: (b, s, d).
      scaling_factor: latents of the denoiser = posterior sample x this.
      timestep_sampling: a name of core.timesteps.SAMPLERS.
      text_dropout: share of samples whose text embeddings are replaced by zeros, the unconditional branch (spec 4.4).
    """
    mean = constrain(batch["mean"], BATCH)
    key_posterior, key_time, key_noise, key_drop = jax.random.split(key, 4)
    clean = sample_posterior(mean, batch["logvar"], key_posterior) * scaling_factor
    t = timesteps.SAMPLERS[timestep_sampling](key_time, clean.shape[0])
    alpha = jnp.asarray(schedule.alphas_cumprod(snr_shift_scale=snr_shift_scale), jnp.float32)[t]
    noise = jax.random.normal(key_noise, clean.shape, jnp.float32)
    keep = jax.random.uniform(key_drop, (clean.shape[0], 1, 1)) >= text_dropout
    prediction = model.apply(
        {"params": params},
        schedule.add_noise(clean, noise, alpha),
        jnp.where(keep, constrain(batch["context"], BATCH), 0),
        t.astype(jnp.float32),
        positions(model, clean.shape[1:4]),
    )
    loss = losses.mse_per_sample(prediction, schedule.velocity(clean, noise, alpha))
    return jnp.mean(loss), {}


@functools.partial(
    jax.jit,
    static_argnames=(
        "model", "optimizer", "ema_decay", "scaling_factor", "snr_shift_scale", "timestep_sampling", "text_dropout"
    ),
    donate_argnames="state",
)  # fmt: skip
def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    scaling_factor: float,
    snr_shift_scale: float,
    timestep_sampling: str,
    text_dropout: float,
) -> tuple[TrainState, dict[str, Array]]:
    """One update. `key` is the run's; the step's own is folded from it, so a step is a function of (state, batch, key)."""
    (loss, logs), gradients = jax.value_and_grad(objective, has_aux=True)(
        state.params,
        model,
        batch,
        jax.random.fold_in(key, state.step),
        scaling_factor=scaling_factor,
        snr_shift_scale=snr_shift_scale,
        timestep_sampling=timestep_sampling,
        text_dropout=text_dropout,
    )
    state, grad_norm = apply_gradients(state, gradients, optimizer, ema_decay=ema_decay)
    return state, {"loss": loss, "grad_norm": grad_norm, **logs}
