"""Whole pipelines from given noise: text to video and image to video, four steps, against diffusers' own loops."""

import contextlib
import dataclasses
import importlib

import numpy as np
import pytest
from PIL import Image

from cogvideox_jax.pipeline import Pipeline, sample_keys
from cogvideox_jax.steps import generate
from tests.models import folders as samples
from tests.parity.reference import error
from tests.parity.test_folder import write

pytestmark = pytest.mark.parity

BOUND = 1e-3  # of the rms
FRAMES, HEIGHT, WIDTH, STEPS = 17, 64, 96, 4
PROMPTS = ["a cat on a sofa", "the sea"]
KEYS = sample_keys(3, 0, len(PROMPTS))


def close(got, expected, what: str) -> None:
    found = error(got, expected)
    print(f"{what}: {found:.1e} of the rms")
    assert found <= BOUND, f"{what}: {found:.2e} of the rms"


def torch_layout(x) -> np.ndarray:
    return np.array(x).transpose(0, 1, 4, 2, 3)


@contextlib.contextmanager
def given_noise(libraries, pipeline: Pipeline, patch: pytest.MonkeyPatch):
    """diffusers draws our noise: the initial one is passed as latents, the others come where it asks for them."""
    torch = libraries.torch
    scheduler = importlib.import_module("diffusers.schedulers.scheduling_dpm_cogvideox")
    posterior = importlib.import_module("diffusers.models.autoencoders.vae")
    draws = []

    def step_noise(shape, **kwargs):
        # the first step draws once; each later one twice, and uses the second
        index = 0 if not draws else (len(draws) + 1) // 2
        draws.append(shape)
        _, t, c, h, w = shape
        return torch.from_numpy(torch_layout(generate.step_noise(KEYS, index, (t, h, w, c))))

    images = iter(range(len(PROMPTS)))

    def image_noise(shape, **kwargs):
        _, c, t, h, w = shape
        noise = np.array(generate.image_noise(KEYS, (t, h, w, c)))[next(images)]
        return torch.from_numpy(noise[None].transpose(0, 4, 1, 2, 3))

    patch.setattr(scheduler, "randn_tensor", step_noise)
    patch.setattr(posterior, "randn_tensor", image_noise)
    yield


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("variant", samples.VARIANTS)
def test_four_steps(libraries, tmp_path, monkeypatch, variant, sampler):
    diffusers, torch = libraries.diffusers, libraries.torch
    folder = write(libraries, tmp_path, variant, "float32")
    ours = Pipeline.load(folder)
    ours = dataclasses.replace(ours, settings=dataclasses.replace(ours.settings, sampler=sampler))
    image_to_video = variant.endswith("i2v")
    name = "CogVideoXImageToVideoPipeline" if image_to_video else "CogVideoXPipeline"
    theirs = getattr(diffusers, name).from_pretrained(folder)
    scheduler = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}[sampler]
    theirs.scheduler = getattr(diffusers, scheduler).from_config(theirs.scheduler.config, timestep_spacing="trailing")
    theirs.set_progress_bar_config(disable=True)
    # one frame count that patches of two do not divide; the learned table has that of its own size
    frames = 9 if variant == "5b_i2v" else FRAMES
    latent_frames = (frames - 1) // 4 + 1
    padded = latent_frames + latent_frames % 2 if variant.startswith("1.5") else latent_frames
    shape = (padded, HEIGHT // 8, WIDTH // 8, ours.model.out_channels)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, size=(len(PROMPTS), HEIGHT, WIDTH, 3), dtype=np.uint8)
    extra = {"image": [Image.fromarray(p) for p in pictures]} if image_to_video else {}
    with given_noise(libraries, ours, monkeypatch):
        kept = theirs(
            prompt=PROMPTS,
            height=HEIGHT,
            width=WIDTH,
            num_frames=frames,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            use_dynamic_cfg=True,
            latents=torch.from_numpy(torch_layout(generate.initial_noise(KEYS, shape))),
            max_sequence_length=ours.model.max_text_tokens,
            output_type="latent",
            **extra,
        ).frames
    expected = kept.numpy()[:, padded - latent_frames :]
    image = None
    if image_to_video:
        noise = generate.image_noise(KEYS, (1, *shape[1:3], ours.vae.latent_channels))
        image = ours.encode_image(pictures.astype(np.float32) / 127.5 - 1, noise=noise)
    latents = ours.denoise(
        ours.encode_text(PROMPTS),
        latent_shape=(latent_frames, *shape[1:3]),
        keys=KEYS,
        negative=ours.encode_text([""]),
        image=image,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        dynamic_guidance="reference",
    )
    close(torch_layout(latents), expected, f"latents of {variant} {sampler}")

    with torch.no_grad():
        decoded = theirs.decode_latents(torch.from_numpy(expected)).numpy()
    close(np.asarray(ours.decode(latents)).transpose(0, 4, 1, 2, 3), decoded, f"pixels of {variant} {sampler}")

    videos = ours.generate(
        PROMPTS,
        num_frames=frames,
        height=HEIGHT,
        width=WIDTH,
        images=pictures if image_to_video else None,
        keys=KEYS,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        dynamic_guidance="reference",
    )
    pixels = np.round((np.clip(decoded.transpose(0, 2, 3, 4, 1), -1, 1) + 1) * 127.5)
    assert np.abs(videos.astype(int) - pixels).max() <= 1
