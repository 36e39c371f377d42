"""Cuts raw videos into captioned clips: see configs/prepare.py."""

import pathlib

import ml_collections

from cogvideox_jax.train import metrics
from data.prepare import pipeline


def check(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Raises InputError for a wrong setting or an unreadable input file; writes nothing. `workdir` is not used."""
    del workdir
    pipeline.check(str(config.input), **_settings(config))


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
    """Writes `workdir`/records and `workdir`/funnel.json, and returns the funnel's counts."""
    folder = str(config.input)
    progress = metrics.Progress(len(pipeline.find_videos(folder)), "prepare")
    funnel = pipeline.prepare(
        folder, workdir, **_settings(config), on_progress=lambda done, total, note: progress.update(done, note)
    )
    return {
        "num_videos": funnel["videos"],
        "num_shots": funnel["shots"],
        "num_clips": funnel["kept"],
        "rejected": funnel["rejected"],
    }


def _settings(config: ml_collections.ConfigDict) -> dict:
    return {
        "fps": config.fps,
        "num_frames": config.num_frames,
        "min_frames": config.min_frames,
        "short_side": config.short_side,
        "max_clips_per_shot": config.max_clips_per_shot,
        "trim_frames": config.trim_frames,
        "min_motion": config.min_motion,
        "crf": config.crf,
    }
