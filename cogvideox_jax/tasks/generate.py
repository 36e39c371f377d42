"""Prompts -> videos: an mp4 each and a contact sheet."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from cogvideox_jax.core import video
from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models import transformer
from cogvideox_jax.parallel import mesh as meshes
from cogvideox_jax.pipeline import Parts, Pipeline, locate, sample_keys
from cogvideox_jax.train import metrics
from cogvideox_jax.train.workdir import write_json
from data import records, transforms
from data.pictures import contact_sheet

OPTIONS = ("sampler", "position_rule", "unconditional", "image_latent_scale")  # "auto" is what the model was made with
SEPARATOR = "@@"  # between a prompt and its image, as in SAT's prompt files


class Request(NamedTuple):
    """What one video is made of; the image's path, or None."""

    prompt: str
    image: Path | None


def check(config: ConfigDict, workdir: Path) -> None:
    """Refuse sizes that do not work, prompts, images and models that are not there."""
    parts = find(config)
    model = transformer.Transformer(**parts.pieces["transformer"]["model"])
    t, h, w = video.latent_shape(config.num_frames, config.height, config.width, patch_size=model.patch_size)
    wants_image = model.in_channels != model.out_channels
    for request in requests(config):
        if wants_image != (request.image is not None):
            raise InputError(
                f"{config.pipeline} makes videos from {'images' if wants_image else 'text alone'}, the prompt "
                f"{request.prompt[:40]!r} has {'no' if wants_image else 'an'} image: write PROMPT"
                + (f"{SEPARATOR}IMAGE" if wants_image else "")
            )
        if request.image:
            transforms.read_image(request.image)
    if config.num_inference_steps < 1 or config.num_inference_steps > 1000:
        raise InputError(f"config.num_inference_steps={config.num_inference_steps}: choose 1 to 1000")
    if config.dynamic_guidance not in ("none", "reference", "ramp"):
        raise InputError(f"config.dynamic_guidance={config.dynamic_guidance!r}: choose none, reference or ramp")
    if config.compute_dtype not in ("float32", "bfloat16"):
        raise InputError(f"config.compute_dtype={config.compute_dtype!r}: choose float32 or bfloat16")
    meshes.start(config.mesh.simulated_devices)
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence)
    tokens = transformer.num_tokens(model, (t + -t % model.patch_size_t, h, w))
    # the conditional and the unconditional half share the batch
    branches = 2 if config.guidance_scale > 1 else 1
    meshes.check_divisible(mesh, batch_size=branches * config.batch_size, tokens=tokens)


def find(config: ConfigDict) -> Parts:
    """The model of config.pipeline, with the settings that the config names."""
    if config.weights not in ("ema", "params"):
        raise InputError(f"config.weights={config.weights!r}: choose ema or params")
    if not config.pipeline:
        raise InputError("config.pipeline is empty: give a run, an imported model or a diffusers folder")
    parts = locate(config.pipeline, weights=config.weights)
    changes: dict[str, Any] = {name: config[name] for name in OPTIONS if config[name] != "auto"}
    if config.chunk_latents >= 0:
        changes["chunk_latents"] = config.chunk_latents or None
    if config.tiling:
        sizes = parts.pieces["vae"]
        changes["tile_sample_size"] = (sizes["sample_height"], sizes["sample_width"])
    return parts._replace(settings=dataclasses.replace(parts.settings, **changes))


def requests(config: ConfigDict) -> list[Request]:
    """config.prompts, one per line of the file, or every caption of a run's encoded records where it is empty."""
    if not config.prompts:
        folder = Path(config.pipeline) / "encode" / "records"
        if not folder.is_dir():
            raise InputError(f"config.prompts is empty, and {config.pipeline} has no captions: give a text file")
        source = records.read(folder, "latents")
        return [Request(source[i]["caption"], None) for i in range(len(source))]
    try:
        lines = [line.strip() for line in Path(config.prompts).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config.prompts={config.prompts}: {error}; give a text file, one prompt a line") from None
    if not any(lines):
        raise InputError(f"config.prompts={config.prompts} holds no prompt: write one a line")
    parts = [line.partition(SEPARATOR) for line in lines if line]
    return [Request(prompt.strip(), Path(image.strip()) if mark else None) for prompt, mark, image in parts]


class Generator:
    """The model of a config, ready to sample in batches of one size, so that one program serves."""

    def __init__(self, config: ConfigDict, mesh: Any):
        self.pipeline = Pipeline.load(find(config), mesh=mesh, dtype=config.compute_dtype)
        self._config = config

    def __call__(self, wanted: list[Request], keys: jax.Array) -> np.ndarray:
        """One video per request, config.batch_size or fewer: uint8 (b, f, h, w, 3)."""
        config = self._config
        filled = wanted + [wanted[-1]] * (config.batch_size - len(wanted))
        images = None
        if wanted[0].image:
            pictures = [transforms.read_image(request.image) for request in filled]
            images = np.stack([transforms.resize_crop(p[None], config.height, config.width)[0] for p in pictures])
        videos = self.pipeline.generate(
            [request.prompt for request in filled],
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            images=images,
            negative_prompt=config.negative_prompt,
            keys=jax.numpy.concatenate([keys, jax.random.split(jax.random.key(0), config.batch_size)])[: len(filled)],
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            dynamic_guidance=config.dynamic_guidance,
        )
        return videos[: len(wanted)]


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Write workdir/NNN.mp4 for each prompt, workdir/videos.json and workdir/contact_sheet.png."""
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence)
    wanted, rows = requests(config), []
    progress = metrics.Progress(len(wanted), "generate video")
    generate = Generator(config, mesh)
    for first in range(0, len(wanted), config.batch_size):
        part = wanted[first : first + config.batch_size]
        for i, frames in enumerate(generate(part, sample_keys(config.seed, first, len(part))), start=first):
            (workdir / f"{i:03d}.mp4").write_bytes(transforms.encode_video(frames, config.fps))
            rows.append((wanted[i].prompt, frames))
        progress.update(len(rows))
    contact_sheet(rows).save(workdir / "contact_sheet.png")
    write_json(workdir / "videos.json", [{"file": f"{i:03d}.mp4", "prompt": text} for i, (text, _) in enumerate(rows)])
    return {"num_videos": len(rows)}
