"""Prompts -> videos: an mp4 each and a contact sheet."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cogvideox_jax.core import samplers, video
from cogvideox_jax.core.errors import InputError
from cogvideox_jax.core.schedule import alphas_cumprod
from cogvideox_jax.models import t5, transformer, vae
from cogvideox_jax.parallel import mesh as meshes
from cogvideox_jax.steps.generate import denoise
from cogvideox_jax.train import checkpoint, metrics
from cogvideox_jax.train.workdir import read_config, read_json, write_json
from data import records, transforms
from data.pictures import contact_sheet


def check(config: ConfigDict, workdir: Path) -> None:
    """Refuse sizes that do not work, prompts and models that are not there."""
    latent_shape = video.latent_shape(config.num_frames, config.height, config.width)
    stored = read_config(Path(config.diffusion), made_by="the train_diffusion task")
    read_config(Path(config.vae), made_by="the train_vae task")
    read_json(Path(config.encoded) / "stats.json", made_by="the encode task")
    if config.sampler not in samplers.SAMPLERS:
        raise InputError(f"config.sampler={config.sampler!r}: choose one of {', '.join(samplers.SAMPLERS)}")
    prompts(config)
    meshes.start(config.mesh.simulated_devices)
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence)
    model = transformer.Transformer(**stored["model"])
    tokens = transformer.num_tokens(model, latent_shape)
    # the conditional and the unconditional half share the batch
    meshes.check_divisible(mesh, batch_size=2 * config.batch_size, tokens=tokens)


def prompts(config: ConfigDict) -> list[str]:
    """config.prompts, one per line of the file, or every caption of the encoded records where it is empty."""
    if not config.prompts:
        source = records.read(Path(config.encoded) / "records", "latents")
        return [source[i]["caption"] for i in range(len(source))]
    try:
        lines = [line.strip() for line in Path(config.prompts).read_text().splitlines()]
    except OSError as error:
        raise InputError(
            f"config.prompts={config.prompts}: {error.strerror}; give a text file, one prompt a line"
        ) from None
    if not any(lines):
        raise InputError(f"config.prompts={config.prompts} holds no prompt: write one a line")
    return [line for line in lines if line]


class Generator:
    """The trained networks of one run, ready to sample: text encoder, denoiser (moving average) and VAE."""

    def __init__(self, config: ConfigDict, mesh: Any):
        encoded = read_config(Path(config.encoded), made_by="the encode task")
        diffusion = read_config(Path(config.diffusion), made_by="the train_diffusion task")
        self._config = config
        self._tokenizer = transforms.Tokenizer(encoded["vocabulary"], encoded["max_text_tokens"])
        self._text_model = t5.T5Encoder(**encoded["text_encoder"]["model"])
        self._text_params = checkpoint.restore_tree(Path(config.encoded) / "text_encoder", mesh)
        self._model = transformer.Transformer(**diffusion["model"])
        self._params = checkpoint.restore_item(Path(config.diffusion), "ema", mesh)
        self._vae = vae.VAE(**read_config(Path(config.vae), made_by="the train_vae task")["model"])
        self._vae_params = checkpoint.restore_item(Path(config.vae), "ema", mesh)
        stats = read_json(Path(config.encoded) / "stats.json", made_by="the encode task")
        self._scaling_factor = stats["scaling_factor"]
        alphas = alphas_cumprod(snr_shift_scale=diffusion["snr_shift_scale"])
        self._coefficients = samplers.SAMPLERS[config.sampler](alphas, config.num_inference_steps)
        self._scales = samplers.guidance_scales(
            config.guidance_scale, self._coefficients.timesteps, dynamic=config.dynamic_guidance
        )
        self._latent_shape = video.latent_shape(config.num_frames, config.height, config.width)

    def __call__(self, texts: list[str], keys: jax.Array) -> np.ndarray:
        """One video per text: uint8 (b, f, h, w, 3). Every batch is filled up to config.batch_size, so one program serves."""
        size = self._config.batch_size
        filled = texts + [""] * (size - len(texts))
        context = t5.encode(self._text_model, self._text_params, self._tokenizer(filled))
        latents = denoise(
            self._params,
            context,
            np.zeros(context.shape, np.float32),
            jax.numpy.concatenate([keys, jax.random.split(jax.random.key(0), size)])[:size],
            self._coefficients,
            self._scales,
            model=self._model,
            latent_shape=self._latent_shape,
        )
        pixels = vae.decode(
            self._vae, self._vae_params, latents / self._scaling_factor, chunk=self._config.chunk_latents or None
        )
        pixels = np.asarray(pixels)[: len(texts)]
        if not np.isfinite(pixels).all():
            raise FloatingPointError("the generated video is not finite: the checkpoint's weights are broken")
        return transforms.denormalize(pixels)


def sample_keys(seed: int, first: int, count: int) -> jax.Array:
    """One key per prompt, from the seed and the prompt's number alone."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(first, first + count))


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Write workdir/NNN.mp4 for each prompt, workdir/videos.json and workdir/contact_sheet.png."""
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence)
    texts, rows = prompts(config), []
    progress = metrics.Progress(len(texts), "generate video")
    with meshes.use(mesh):
        generate = Generator(config, mesh)
        for first in range(0, len(texts), config.batch_size):
            part = texts[first : first + config.batch_size]
            for i, frames in enumerate(generate(part, sample_keys(config.seed, first, len(part))), start=first):
                (workdir / f"{i:03d}.mp4").write_bytes(transforms.encode_video(frames, config.fps))
                rows.append((texts[i], frames))
            progress.update(len(rows))
    contact_sheet(rows).save(workdir / "contact_sheet.png")
    write_json(workdir / "videos.json", [{"file": f"{i:03d}.mp4", "prompt": text} for i, (text, _) in enumerate(rows)])
    return {"num_videos": len(rows)}
