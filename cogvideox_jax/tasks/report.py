"""One self-contained HTML page and summary.json about a run directory."""

import base64
import io
import statistics
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from cogvideox_jax.train.metrics import read_metrics
from cogvideox_jax.train.workdir import read_json, write_json
from data import transforms
from data.pictures import filmstrip

STAGES = ("prepare", "vae", "encode", "diffusion", "generate", "evaluate")


def check(config: ConfigDict, workdir: Path) -> None:
    """Every stage must have finished."""
    for stage in STAGES:
        read_json(workdir / stage / "done.json", made_by=f"the stage with --workdir={workdir / stage}")


def curve(rows: list[dict[str, float]], key: str, *, log: bool, width: int = 420, height: int = 190) -> dict[str, Any]:
    """Geometry of one curve for the page's SVG: axis labels, and points in its coordinates."""
    left, bottom, top = 52, 24, 10
    steps = np.array([row["step"] for row in rows], float)
    values = np.array([row[key] for row in rows], float)
    scaled = np.log10(np.maximum(values, 1e-12)) if log else values
    low, high = float(scaled.min()), float(scaled.max())
    span = (high - low) or 1.0
    x = left + (steps - steps[0]) / max(steps[-1] - steps[0], 1) * (width - left - 8)
    y = top + (high - scaled) / span * (height - top - bottom)
    ticks = [
        (top + (1 - f) * (height - top - bottom), f"{10 ** (low + f * span) if log else low + f * span:.3g}")
        for f in (0, 0.5, 1)
    ]
    return {
        "key": key,
        "width": width,
        "height": height,
        "left": left,
        "points": " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)),
        "y_ticks": ticks,
        "x_ticks": [(float(x[i]), f"{steps[i]:.0f}") for i in (0, -1)],
        "last": f"{values[-1]:.4g}",
        "log": log,
    }


def _data_uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()


def _clip(folder: Path, index: int, row: dict[str, Any]) -> dict[str, Any]:
    videos = {
        kind: _data_uri(folder / f"{index:03d}_{kind}.mp4", "video/mp4")
        for kind in ("original", "reconstruction", "generated")
    }
    strips = []
    for kind in videos:
        strips.append(filmstrip(transforms.decode(folder / f"{index:03d}_{kind}.mp4")))
    picture = io.BytesIO()
    Image.fromarray(np.concatenate(strips)).save(picture, "PNG")
    strip = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    return {**row, "videos": videos, "strip": strip, "own": row["nearest"] == row["clip_id"]}


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Write workdir/report.html, workdir/samples.png (generated beside original) and workdir/summary.json."""
    done = {stage: read_json(workdir / stage / "done.json", made_by=stage) for stage in STAGES}
    evaluation = read_json(workdir / "evaluate" / "evaluation.json", made_by="the evaluate task")
    funnel = read_json(workdir / "prepare" / "funnel.json", made_by="the prepare task")
    vae_rows = read_metrics(workdir / "vae" / "metrics.jsonl")
    diffusion_rows = read_metrics(workdir / "diffusion" / "metrics.jsonl")
    summary = {
        "reconstruction_psnr_db": evaluation["reconstruction_psnr_db"],
        "caption_accuracy": evaluation["caption_accuracy"],
        "num_clips": evaluation["num_clips"],
        # the median: a compilation or a pause does not move it
        "seconds_per_step": {
            stage: statistics.median(row["step_seconds"] for row in rows)
            for stage, rows in (("vae", vae_rows), ("diffusion", diffusion_rows))
        },
        "peak_memory_mb": max(row["peak_memory_mb"] for row in done.values()),
        "stage_seconds": {stage: row["seconds"] for stage, row in done.items()},
    }
    curves = [
        ("VAE: reconstruction + KL loss", curve(vae_rows, "loss", log=True)),
        ("VAE: PSNR of the training batch, dB", curve(vae_rows, "psnr_db", log=False)),
        ("Denoiser: velocity loss", curve(diffusion_rows, "loss", log=True)),
    ]
    clips = [_clip(workdir / "evaluate", i, row) for i, row in enumerate(evaluation["clips"])]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((Path(__file__).parent / "report.html.jinja").read_text())
    page = template.render(summary=summary, done=done, funnel=funnel, curves=curves, clips=clips, name=workdir.name)
    temporary = workdir / "report.html.tmp"
    temporary.write_text(page)
    temporary.replace(workdir / "report.html")
    _samples(workdir / "evaluate", len(clips), workdir / "samples.png")
    write_json(workdir / "summary.json", summary)
    return summary


def _samples(folder: Path, count: int, path: Path) -> None:
    """A grid, two clips a row: original above, generated below, three frames each."""
    cells = []
    for i in range(count):
        rows = [filmstrip(transforms.decode(folder / f"{i:03d}_{kind}.mp4"), 3) for kind in ("original", "generated")]
        cells.append(np.pad(np.concatenate(rows), ((0, 6), (0, 6), (0, 0)), constant_values=255))
    if len(cells) % 2:
        cells.append(np.full_like(cells[0], 255))
    grid = np.concatenate([np.concatenate(cells[i : i + 2], axis=1) for i in range(0, len(cells), 2)])
    picture = Image.fromarray(grid)
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)
