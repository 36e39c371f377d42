"""From a shot to clips: which frames, at which size, and whether they move."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.core.video import TIME_FACTOR
from data import transforms


def clip_indices(
    shot: tuple[int, int],
    source_fps: float,
    *,
    fps: float,
    num_frames: int,
    min_frames: int,
    trim_frames: int,
    max_clips: int,
) -> list[np.ndarray]:
    """Source frame numbers of each clip of a shot (start, end): up to `max_clips`, apart and evenly placed.

    `trim_frames` source frames are left out at both ends (cuts are found to a frame or two). A clip has `num_frames`
    frames at `fps`, or, where the shot is shorter, the most that fit and are 4k+1. Fewer than `min_frames`: no clip.
    """
    start, usable = shot[0] + trim_frames, shot[1] - shot[0] - 2 * trim_frames
    for length in range(num_frames, min_frames - 1, -TIME_FACTOR):
        relative = np.round(np.arange(length) * (source_fps / fps)).astype(np.int64)
        span = int(relative[-1]) + 1
        if span <= usable:
            count = min(max_clips, usable // span)
            spare = usable - count * span
            starts = [start + k * span + (k + 1) * spare // (count + 1) for k in range(count)]
            return [transforms.choose_frames(shot[1], source_fps, length, fps, s) for s in starts]
    return []


def cut(video: Path, clips: Sequence[np.ndarray], short_side: int) -> Iterator[np.ndarray]:
    """Decodes clips, given as source frame numbers in rising order, in one pass: uint8 (t, h, w, 3) each.

    The shorter side becomes `short_side`, both sides even. One clip is in memory at a time, already reduced.
    """
    waiting = list(clips)
    if not waiting:
        return
    convert, pictures = VideoReformatter(), []
    for index, frame in enumerate(transforms.frames(video)):
        repeats = int(np.sum(waiting[0] == index))
        if repeats:
            picture = convert.reformat(frame, format="rgb24").to_ndarray()[None]
            picture = transforms.resize_crop(picture, *fit_size(frame.height, frame.width, short_side))
            pictures += [picture] * repeats
        if len(pictures) == len(waiting[0]):
            yield np.concatenate(pictures)
            waiting, pictures = waiting[1:], []
            if not waiting:
                return
    raise InputError(f"{video} ends before frame {waiting[0][-1]}: replace it or remove it")


def fit_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the aspect of the input, the shorter side `short_side` and the other rounded to even."""
    scale = short_side / min(height, width)
    return max(short_side, round(height * scale / 2) * 2), max(short_side, round(width * scale / 2) * 2)


def motion_score(pictures: np.ndarray) -> float:
    """How much a clip moves: mean absolute difference of consecutive frames, in grey levels (0 to 255).

    On a small picture, uint8 (t, h, w, 3) -> 64x64 grey, so that noise and compression do not count as motion.
    """
    grey = [np.asarray(Image.fromarray(p).convert("L").resize((64, 64), Image.Resampling.BOX), float) for p in pictures]
    return float(np.mean(np.abs(np.diff(grey, axis=0)))) if len(grey) > 1 else 0.0
