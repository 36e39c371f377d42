"""The Grain chains: record folder -> batches. The batch of a step is a pure function of (records, seed, step)."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.core.video import latent_frames
from data import records, transforms

Batch = dict[str, np.ndarray]

# A video element is megabytes, and Grain's default of 16 threads x 500 elements would fill the host's memory.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
# Decoded windows kept per loader: a tiny data set is seen thousands of times (a large one leaves this idle).
_CACHE_BYTES = 64 * 2**20


def check_clips(folder: Path, num_frames: int) -> None:
    """Refuses (InputError) a `num_frames` that is not 4k+1 or exceeds the shortest clip, and a folder without clips."""
    latent_frames(num_frames)
    shortest = records.manifest(folder, "clips")["min_num_frames"]
    if shortest < num_frames:
        raise InputError(
            f"num_frames={num_frames} is more than the shortest clip of {folder} has ({shortest}):"
            f" lower num_frames, or prepare again with min_frames={num_frames}"
        )


def check_text(folder: Path, max_text_tokens: int, text_dim: int) -> None:
    """Refuses (InputError) latent records whose text embeddings have another length or width."""
    tokens, width = records.read(folder, "latents")[0]["context"].shape
    if (tokens, width) != (max_text_tokens, text_dim):
        raise InputError(
            f"{folder} was encoded with {tokens} text tokens of width {width}, the model takes max_text_tokens="
            f'{max_text_tokens} of text_dim={text_dim}: change config.model, or run the task "encode" again'
        )


def vae_batches(
    folder: Path,
    *,
    num_frames: int,
    height: int,
    width: int,
    batch_size: int,
    seed: int,
    start_step: int,
    rows: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
    """Batches {"video": float32 (b, num_frames, height, width, 3) in [-1, 1]} from step `start_step` on, without end.

    Each epoch is a new shuffle. A clip longer than `num_frames` gives a random window; the picture is scaled to cover
    height x width and cut to its centre. `rows` of each batch are loaded, all by default. InputError when num_frames is
    not 4k+1 or exceeds the shortest clip.
    """
    check_clips(folder, num_frames)
    source = records.read(folder, "clips")

    @functools.lru_cache(maxsize=max(1, _CACHE_BYTES // (num_frames * height * width * 3)))
    def window(video: bytes, start: int) -> np.ndarray:
        return transforms.resize_crop(transforms.decode(video, range(start, start + num_frames)), height, width)

    def load(index: int, rng: np.random.Generator) -> Batch:
        clip = source[index]
        start = int(rng.integers(clip["num_frames"] - num_frames + 1))
        return {"video": transforms.normalize(window(clip["video"], start))}

    return _batches(len(source), load, batch_size=batch_size, seed=seed, start_step=start_step, rows=rows)


def diffusion_batches(
    folder: Path, *, batch_size: int, seed: int, start_step: int, rows: Sequence[int] | np.ndarray | None = None
) -> Iterator[Batch]:
    """Batches of latent records from step `start_step` on, without end; each epoch is a new shuffle.

    {"mean", "logvar": float32 (b, t, h, w, c), "context": float32 (b, l, d), "index": int32 (b,)}, where index is the
    record's place in the folder. T5 embeds the padding too, so the text is taken as encoded: see
    `check_text`. `rows` of each batch are loaded, all by default.
    """
    source = records.read(folder, "latents")

    def load(index: int, rng: np.random.Generator) -> Batch:
        del rng
        record = source[index]
        return {key: record[key] for key in ("mean", "logvar", "context")} | {"index": np.array(index, np.int32)}

    return _batches(len(source), load, batch_size=batch_size, seed=seed, start_step=start_step, rows=rows)


class _Rows(grain.MapDataset):
    """Of every `batch_size` elements of an endless data set, those at `rows`: what one process of several loads."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + int(self._rows[row])]


def _batches(
    num_records: int,
    load: Callable[[int, np.random.Generator], Batch],
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    rows: Sequence[int] | np.ndarray | None,
) -> Iterator[Batch]:
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    chain = (
        grain.MapDataset.range(num_records)
        .seed(seed)
        .shuffle()
        .repeat()  # before batch: a data set smaller than a batch fills it, and no epoch drops its tail
        .random_map(load)
    )
    mine = _Rows(chain, batch_size, rows).batch(len(rows), drop_remainder=True)
    batches = iter(mine.to_iter_dataset(_READ))
    batches.set_state({"next_index": start_step})
    return batches


def fingerprint(folder: Path) -> dict:
    """Identifies the data for a checkpoint: {"builder", "num_records", "digest"}; the digest covers every value."""
    return records.fingerprint(folder)
