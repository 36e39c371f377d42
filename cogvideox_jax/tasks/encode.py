"""Clip records -> latent records: the VAE's posterior and the caption's text embeddings."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cogvideox_jax.core import video
from cogvideox_jax.models import t5, vae
from cogvideox_jax.parallel import mesh as meshes
from cogvideox_jax.train import checkpoint, metrics
from cogvideox_jax.train.workdir import read_config, write_json
from data import pipeline, records, transforms


def check(config: ConfigDict, workdir: Path) -> None:
    """Refuse sizes that do not work and inputs that are not there."""
    video.latent_shape(config.num_frames, config.height, config.width)
    pipeline.check_clips(Path(config.records), config.num_frames)
    read_config(Path(config.vae), made_by="the train_vae task")
    transforms.Tokenizer(config.vocabulary, config.max_text_tokens)
    meshes.start(config.mesh.simulated_devices)
    meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence)


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Write workdir/records, workdir/text_encoder and workdir/stats.json (scaling_factor = 1 / std of the latents)."""
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence)
    source = records.read(Path(config.records), "clips")
    tokenizer = transforms.Tokenizer(config.vocabulary, config.max_text_tokens)
    text_model = t5.T5Encoder(**config.text_encoder.model)
    text_folder = workdir / "text_encoder"
    vae_model = vae.VAE(**read_config(Path(config.vae), made_by="the train_vae task")["model"])
    with meshes.use(mesh):
        vae_params = checkpoint.restore_item(Path(config.vae), "ema", mesh)
        if not text_folder.exists():
            ids = np.zeros((1, config.max_text_tokens), np.int32)
            checkpoint.save_tree(text_folder, text_model.init(jax.random.key(config.text_encoder.seed), ids)["params"])
        text_params = checkpoint.restore_tree(text_folder, mesh)
        progress = metrics.Progress(len(source), "encode clip")
        squares: list[float] = []

        def examples() -> Iterator[dict[str, Any]]:
            for index in range(len(source)):
                clip = source[index]
                frames = transforms.decode(clip["video"], range(config.num_frames))
                pixels = transforms.normalize(transforms.resize_crop(frames, config.height, config.width))
                mean, logvar = vae.encode(vae_model, vae_params, pixels[None], chunk=config.chunk_frames or None)
                context = t5.encode(text_model, text_params, tokenizer([clip["caption"]]))
                mean, logvar = np.asarray(mean[0]), np.asarray(logvar[0])
                squares.append(float(np.mean(mean**2 + np.exp(logvar))))
                progress.update(index + 1, clip["clip_id"])
                yield {
                    "clip_id": clip["clip_id"],
                    "caption": clip["caption"],
                    "source": clip["source"],
                    "mean": mean,
                    "logvar": logvar,
                    "context": np.asarray(context[0], np.float32),
                }

        count = records.write_latents(workdir / "records", examples())
    scaling_factor = statistics.fmean(squares) ** -0.5
    write_json(workdir / "stats.json", {"scaling_factor": scaling_factor})
    return {"num_records": count, "scaling_factor": scaling_factor}
