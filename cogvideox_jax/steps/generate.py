"""Sampling: the whole denoising loop as one compiled program (spec section 5)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cogvideox_jax.core import samplers
from cogvideox_jax.models.transformer import Transformer

OFS = 2.0  # what the released model with an ofs embedding was trained with (spec 4.5)
_IMAGE = 1_000_000  # stream of the image's noise; those of the loop are numbered from 0


def _normals(keys: jax.Array, stream: int | Array, shape: tuple[int, ...]) -> Array:
    """Noise per sample from the sample's own key, so that a video depends neither on its batch nor on the mesh."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), shape, jnp.float32))(keys)


def initial_noise(keys: jax.Array, shape: tuple[int, int, int, int]) -> Float[Array, "b t h w c"]:
    """What the loop starts from, N(0, 1): one key per sample, `shape` without the batch."""
    return _normals(keys, 0, shape)


def step_noise(keys: jax.Array, index: int | Array, shape: tuple[int, int, int, int]) -> Float[Array, "b t h w c"]:
    """What a stochastic sampler adds in step `index` = 0, 1, ..."""
    return _normals(keys, index + 1, shape)


def image_noise(keys: jax.Array, shape: tuple[int, int, int, int]) -> Float[Array, "b 1 h w c"]:
    """For the posterior of the image that a video begins with."""
    return _normals(keys, _IMAGE, shape)


@functools.partial(jax.jit, static_argnames=("model", "latent_shape"))
def denoise(
    params: Any,
    context: Float[Array, "b s d"],
    unconditional: Float[Array, "#b s d"] | None,
    keys: jax.Array,
    coefficients: samplers.Coefficients,
    scales: Float[Array, "num_steps"],
    grid: Float[Array, "n 3"],
    image: Float[Array, "b t h w c"] | None = None,
    lora: Any = None,
    *,
    model: Transformer,
    latent_shape: tuple[int, int, int],
) -> Float[Array, "b t h w c"]:
    """Latents (scaled) from noise.

    Args:
      context, unconditional: text embeddings of the prompts and of the unconditional branch (zeros for models trained
        here, spec 4.4; an empty or negative prompt in diffusers). None: no guidance, and half the work.
      keys: one PRNG key per sample.
      coefficients: a sampler's table; all rows arrays of length num_steps.
      scales: guidance per step (samplers.guidance_scales).
      grid: positions of the video tokens (steps.diffusion.positions).
      image: for image-to-video models: the first frame's latents, scaled, zeros after it.
      lora: low-rank weights beside `params` (models.lora), already scaled.
      latent_shape: (t, h, w), divisible by the model's patches.
    """
    branches = (
        context if unconditional is None else jnp.concatenate([jnp.broadcast_to(unconditional, context.shape), context])
    )
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    shape = (*latent_shape, model.out_channels)
    noise = initial_noise(keys, shape)
    ofs = jnp.full((branches.shape[0],), OFS) if model.ofs_dim else None

    def step(state: samplers.SamplerState, inputs: Any) -> tuple[samplers.SamplerState, None]:
        index, row, scale = inputs
        latents = state.sample if image is None else jnp.concatenate([state.sample, image], axis=-1)
        if unconditional is not None:
            latents = jnp.concatenate([latents, latents])
        t = jnp.full((latents.shape[0],), row.timesteps, jnp.float32)
        velocity = model.apply(variables, latents, branches, t, grid, ofs=ofs)
        if unconditional is not None:
            velocity = samplers.guide(*jnp.split(velocity, 2), scale)
        return samplers.sampler_step(state, velocity, row, step_noise(keys, index, shape)), None

    rows = jax.tree.map(jnp.asarray, coefficients)
    state, _ = jax.lax.scan(
        step, samplers.SamplerState(noise, jnp.zeros_like(noise)), (jnp.arange(len(scales)), rows, jnp.asarray(scales))
    )
    return state.sample
