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
from cogvideox_jax.pipeline import Stored, find_network, restore
from cogvideox_jax.train import checkpoint, metrics
from cogvideox_jax.train.workdir import write_json
from data import pipeline, records, transforms


def check(config: ConfigDict, workdir: Path) -> None:
    """Refuse sizes that do not work and inputs that are not there."""
    video.latent_shape(config.num_frames, config.height, config.width)
    pipeline.check_clips(Path(config.records), config.num_frames)
    find_network("vae", config.vae)
    if config.text_encoder.source:
        find_network("text_encoder", config.text_encoder.source)
    transforms.Tokenizer(config.vocabulary, config.max_text_tokens)
    meshes.start(config.mesh.simulated_devices)
    meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence)


def _text_encoder(config: ConfigDict, workdir: Path) -> Stored:
    """The one that the config names, or one with random weights, kept in the workdir."""
    if config.text_encoder.source:
        return find_network("text_encoder", config.text_encoder.source)
    model, folder = t5.T5Encoder(**config.text_encoder.model), workdir / "text_encoder"
    if not folder.exists():
        ids = np.zeros((1, config.max_text_tokens), np.int32)
        checkpoint.save_tree(folder, model.init(jax.random.key(config.text_encoder.seed), ids)["params"])
    return Stored({"model": config.text_encoder.model}, folder)


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Write workdir/records, workdir/stats.json and, where none is given, workdir/text_encoder.

    The scaling factor is that of an imported VAE, or 1 / std of the latents.
    """
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence)
    source = records.read(Path(config.records), "clips")
    tokenizer = transforms.Tokenizer(config.vocabulary, config.max_text_tokens)
    autoencoder = find_network("vae", config.vae)
    vae_model = vae.VAE(**autoencoder.piece["model"])
    # a public VAE comes with the scale that its denoisers were trained at, and its users encode in chunks of 8
    known_scale = autoencoder.piece.get("scaling_factor")
    chunk_frames = config.chunk_frames if config.chunk_frames >= 0 else 8 if known_scale else 0
    with meshes.use(mesh):
        vae_params = restore(autoencoder.tree, mesh)
        text_encoder = _text_encoder(config, workdir)
        text_model = t5.T5Encoder(**text_encoder.piece["model"])
        text_params = restore(text_encoder.tree, mesh)
        progress = metrics.Progress(len(source), "encode clip")
        squares: list[float] = []

        def examples() -> Iterator[dict[str, Any]]:
            for index in range(len(source)):
                clip = source[index]
                frames = transforms.decode(clip["video"], range(config.num_frames))
                pixels = transforms.normalize(transforms.resize_crop(frames, config.height, config.width))
                mean, logvar = vae.encode(vae_model, vae_params, pixels[None], chunk=chunk_frames or None)
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
    scaling_factor = known_scale or statistics.fmean(squares) ** -0.5
    write_json(workdir / "stats.json", {"scaling_factor": scaling_factor, "chunk_frames": chunk_frames or None})
    return {"num_records": count, "scaling_factor": scaling_factor}
