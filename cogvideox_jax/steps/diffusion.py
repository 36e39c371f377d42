"""Training the denoiser: v-prediction with explicit uniform timesteps and text dropout (paper section 3; spec 4)."""

import functools
from collections.abc import Callable
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
from cogvideox_jax.parallel.sharding import BATCH, PARTS, constrain
from cogvideox_jax.train.state import TrainState, apply_gradients

Batch = dict[str, Array]


def positions(
    model: Transformer, latent_shape: tuple[int, int, int], *, rule: str, base: tuple[int, int]
) -> Float[np.ndarray, "n 3"]:
    """Positions of the video tokens of latents (t, h, w); rule and base (rows, columns) as in core.rope.grid_positions."""
    t, h, w = latent_shape
    return grid_positions(t // model.patch_size_t, h // model.patch_size, w // model.patch_size, rule=rule, base=base)


def draw(
    batch: Batch,
    key: jax.Array,
    *,
    scaling_factor: float,
    snr_shift_scale: float,
    timestep_sampling: str,
    text_dropout: float,
) -> dict[str, Array]:
    """All that is random in a step, for the whole batch: what the network sees and what it should say.

    Args:
      batch: {"mean", "logvar"}: the VAE's posterior (b, t, h, w, c), unscaled; {"context"}: (b, s, d).
      scaling_factor: latents of the denoiser = posterior sample x this.
      timestep_sampling: a name of core.timesteps.SAMPLERS.
      text_dropout: share of samples whose text embeddings are replaced by zeros, the unconditional branch (spec 4.4).

    Returns: {"noisy", "velocity": (b, t, h, w, c), "context": (b, s, d), "timesteps": (b,)}, float32.
    """
    mean = constrain(batch["mean"], BATCH)
    key_posterior, key_time, key_noise, key_drop = jax.random.split(key, 4)
    clean = sample_posterior(mean, batch["logvar"], key_posterior) * scaling_factor
    t = timesteps.SAMPLERS[timestep_sampling](key_time, clean.shape[0])
    alpha = jnp.asarray(schedule.alphas_cumprod(snr_shift_scale=snr_shift_scale), jnp.float32)[t]
    noise = jax.random.normal(key_noise, clean.shape, jnp.float32)
    keep = jax.random.uniform(key_drop, (clean.shape[0], 1, 1)) >= text_dropout
    return {
        "noisy": schedule.add_noise(clean, noise, alpha),
        "velocity": schedule.velocity(clean, noise, alpha),
        "context": jnp.where(keep, constrain(batch["context"], BATCH), 0),
        "timesteps": t.astype(jnp.float32),
    }


def objective(
    params: Any, model: Transformer, drawn: dict[str, Array], grid: Float[Array, "n 3"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean over samples of the squared error of the velocity.

    Args:
      drawn: what `draw` gives, of a batch or of a part of one.
      grid: positions of the video tokens (`positions`).
    """
    prediction = model.apply({"params": params}, drawn["noisy"], drawn["context"], drawn["timesteps"], grid)
    return jnp.mean(losses.mse_per_sample(prediction, drawn["velocity"])), {}


def accumulated(
    gradient: Callable[[dict[str, Array]], tuple[Any, Any]], drawn: dict[str, Array], parts: int
) -> tuple[Any, Any]:
    """Mean over `parts` equal parts of the batch of what `gradient` gives (a pair of trees), one part after the other.

    Every part takes its rows from all devices, so that nothing moves between them.
    """
    if parts == 1:
        return gradient(drawn)

    def split(x: Array) -> Array:
        return constrain(jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), PARTS)

    def add(total: Any, part: dict[str, Array]) -> tuple[Any, None]:
        part = jax.tree.map(lambda x: constrain(x, BATCH), part)
        return jax.tree.map(lambda a, b: a + b / parts, total, gradient(part)), None

    split_batch = jax.tree.map(split, drawn)
    first = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], split_batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    return jax.lax.scan(add, zeros, split_batch)[0]


@functools.partial(
    jax.jit,
    static_argnames=(
        "model", "optimizer", "ema_decay", "accumulate", "scaling_factor", "snr_shift_scale", "timestep_sampling",
        "text_dropout",
    ),
    donate_argnames="state",
)  # fmt: skip
def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    grid: Float[Array, "n 3"],
    *,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulate: int,
    scaling_factor: float,
    snr_shift_scale: float,
    timestep_sampling: str,
    text_dropout: float,
) -> tuple[TrainState, dict[str, Array]]:
    """One update. `key` is the run's; the step's own is folded from it, so a step is a function of (state, batch, key).

    `accumulate` parts of the batch go through the network one after the other; the update is that of the whole batch.
    """
    drawn = draw(
        batch,
        jax.random.fold_in(key, state.step),
        scaling_factor=scaling_factor,
        snr_shift_scale=snr_shift_scale,
        timestep_sampling=timestep_sampling,
        text_dropout=text_dropout,
    )

    def gradient(part: dict[str, Array]) -> tuple[Any, Any]:
        return jax.value_and_grad(objective, has_aux=True)(state.params, model, part, grid)

    (loss, logs), gradients = accumulated(gradient, drawn, accumulate)
    state, grad_norm = apply_gradients(state, gradients, optimizer, ema_decay=ema_decay)
    return state, {"loss": loss, "grad_norm": grad_norm, **logs}
