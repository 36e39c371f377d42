"""How well a run learned: reconstruction of its clips, and whether each caption generates its own clip."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cogvideox_jax.parallel import mesh as meshes
from cogvideox_jax.pipeline import sample_keys
from cogvideox_jax.steps.vae import reconstruct
from cogvideox_jax.tasks import generate
from cogvideox_jax.train import metrics
from cogvideox_jax.train.workdir import write_json
from data import pipeline, records, transforms


def check(config: ConfigDict, workdir: Path) -> None:
    """As for generation, and the clips must be there."""
    pipeline.check_clips(Path(config.records), config.num_frames)
    generate.check(config, workdir)


def nearest_clip(generated: np.ndarray, clips: np.ndarray) -> tuple[int, np.ndarray]:
    """Index of the clip with the smallest mean squared difference in pixels, and all distances.

    generated: uint8 (f, h, w, 3); clips: uint8 (n, f, h, w, 3). Distances are on the scale [0, 1] for pixels, (n,).
    """
    difference = (clips.astype(np.float32) - generated.astype(np.float32)) / 255
    distances = np.mean(difference**2, axis=(1, 2, 3, 4))
    return int(np.argmin(distances)), distances


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Write workdir/evaluation.json and, per clip, NNN_{original,reconstruction,generated}.mp4.

    caption_accuracy: share of captions whose generated video is nearest, in pixels, to the clip that the caption is of.
    """
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence)
    source = records.read(Path(config.records), "clips")
    clips = [source[i] for i in range(len(source))]
    videos = np.stack(
        [
            transforms.resize_crop(
                transforms.decode(clip["video"], range(config.num_frames)), config.height, config.width
            )
            for clip in clips
        ]
    )
    texts = [clip["caption"] for clip in clips]
    progress = metrics.Progress(len(clips), "evaluate clip")
    rows = []
    generator = generate.Generator(config, mesh)
    generated: list[np.ndarray] = []
    for first in range(0, len(texts), config.batch_size):
        part = [generate.Request(text, None) for text in texts[first : first + config.batch_size]]
        generated.extend(generator(part, sample_keys(config.seed, first, len(part))))
        progress.update(len(generated))
    with meshes.use(mesh):
        for i, clip in enumerate(clips):
            pixels = transforms.normalize(videos[i])[None]
            reconstruction, psnr = reconstruct(generator.pipeline.vae_params, pixels, vae=generator.pipeline.vae)
            nearest, distances = nearest_clip(generated[i], videos)
            for kind, frames in (
                ("original", videos[i]),
                ("reconstruction", transforms.denormalize(np.asarray(reconstruction[0]))),
                ("generated", generated[i]),
            ):
                (workdir / f"{i:03d}_{kind}.mp4").write_bytes(transforms.encode_video(frames, config.fps))
            rows.append(
                {
                    "clip_id": clip["clip_id"],
                    "caption": clip["caption"],
                    "psnr_db": float(psnr[0]),
                    "nearest": clips[nearest]["clip_id"],
                    "own_distance": float(distances[i]),
                    "nearest_other_distance": float(np.min(np.delete(distances, i))) if len(clips) > 1 else None,
                }
            )
    results = {
        "num_clips": len(rows),
        "reconstruction_psnr_db": float(np.mean([row["psnr_db"] for row in rows])),
        "caption_accuracy": float(np.mean([row["nearest"] == row["clip_id"] for row in rows])),
    }
    write_json(workdir / "evaluation.json", {**results, "clips": rows})
    return results
