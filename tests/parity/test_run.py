"""A run's export in diffusers: the folder that the quickstart's last step writes gives the video that we generate ourselves."""

from pathlib import Path

import numpy as np
import pytest

from cogvideox_jax.pipeline import Pipeline, sample_keys
from cogvideox_jax.steps import generate
from tests.parity.test_pipelines import close, torch_layout
from tests.test_chain import ROOT, run  # noqa: F401  (a fixture: the whole chain at smoke size)

pytestmark = pytest.mark.parity

PROMPT = "a cup is put on a table"
KEYS = sample_keys(1, 0, 1)


def same_video(libraries, run: Path, exported: Path) -> None:  # noqa: F811
    torch = libraries.torch
    ours = Pipeline.load(run)
    theirs = libraries.diffusers.DiffusionPipeline.from_pretrained(exported)
    theirs.set_progress_bar_config(disable=True)
    frames = theirs.transformer.config.sample_frames
    height, width = theirs.vae.config.sample_height, theirs.vae.config.sample_width
    shape = ((frames - 1) // 4 + 1, height // 8, width // 8, ours.model.out_channels)
    context = ours.encode_text([PROMPT])
    arguments = dict(num_inference_steps=4, guidance_scale=3.0)
    with torch.no_grad():
        embedded, _ = theirs.encode_prompt(
            [PROMPT], do_classifier_free_guidance=False, max_sequence_length=ours.model.max_text_tokens
        )
    latents = theirs(
        prompt_embeds=embedded,
        # what stands for no prompt in our training, and has no words in diffusers
        negative_prompt_embeds=torch.zeros(tuple(context.shape)),
        height=height,
        width=width,
        num_frames=frames,
        max_sequence_length=ours.model.max_text_tokens,
        latents=torch.from_numpy(torch_layout(generate.initial_noise(KEYS, shape))),
        output_type="latent",
        **arguments,
    ).frames
    close(
        torch_layout(ours.denoise(context, latent_shape=shape[:3], keys=KEYS, **arguments)), latents, "latents of a run"
    )
    with torch.no_grad():
        decoded = theirs.decode_latents(latents).numpy().transpose(0, 2, 3, 4, 1)
    video = ours.generate([PROMPT], num_frames=frames, height=height, width=width, keys=KEYS, **arguments)
    assert video.std() > 1
    assert np.abs(video - np.round((np.clip(decoded, -1, 1) + 1) * 127.5)).max() <= 1


def test_the_chain_s_export(libraries, run):  # noqa: F811
    same_video(libraries, run, run / "export" / "diffusers")


@pytest.mark.skipif(not (ROOT / "runs/quickstart/export/done.json").exists(), reason="the quickstart has not run here")
def test_the_quickstart_s_export(libraries):
    same_video(libraries, ROOT / "runs/quickstart", ROOT / "runs/quickstart/export/diffusers")
