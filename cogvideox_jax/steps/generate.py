"""Sampling: the whole denoising loop as one compiled program (spec section 5)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cogvideox_jax.core import samplers
from cogvideox_jax.models.transformer import Transformer
from cogvideox_jax.steps.diffusion import positions


def _normals(keys: jax.Array, step: int | Array, shape: tuple[int, ...]) -> Array:
    """Noise per sample from the sample's own key, so that a video depends neither on its batch nor on the mesh."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32))(keys)


@functools.partial(jax.jit, static_argnames=("model", "latent_shape"))
def denoise(
    params: Any,
    context: Float[Array, "b s d"],
    unconditional: Float[Array, "b s d"],
    keys: jax.Array,
    coefficients: samplers.Coefficients,
    scales: Float[Array, "num_steps"],
    *,
    model: Transformer,
    latent_shape: tuple[int, int, int],
) -> Float[Array, "b t h w c"]:
    """Latents (scaled) from noise.

    Args:
      context, unconditional: text embeddings of the prompt and of the unconditional branch (zeros for models trained
        here, spec 4.4).
      keys: one PRNG key per sample.
      coefficients: a sampler's table; all rows arrays of length num_steps.
      scales: guidance per step (samplers.guidance_scales).
      latent_shape: (t, h, w).
    """
    both = jnp.concatenate([unconditional, context])
    shape = (*latent_shape, model.out_channels)
    noise = _normals(keys, 0, shape)
    grid = positions(model, latent_shape)

    def step(state: samplers.SamplerState, inputs: Any) -> tuple[samplers.SamplerState, None]:
        index, row, scale = inputs
        latents = jnp.concatenate([state.sample, state.sample])
        t = jnp.full((latents.shape[0],), row.timesteps, jnp.float32)
        prediction = model.apply({"params": params}, latents, both, t, grid)
        velocity = samplers.guide(*jnp.split(prediction, 2), scale)
        return samplers.sampler_step(state, velocity, row, _normals(keys, index + 1, shape)), None

    rows = jax.tree.map(jnp.asarray, coefficients)
    state, _ = jax.lax.scan(
        step, samplers.SamplerState(noise, jnp.zeros_like(noise)), (jnp.arange(len(scales)), rows, jnp.asarray(scales))
    )
    return state.sample
