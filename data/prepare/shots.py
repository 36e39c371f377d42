"""Where one shot ends and the next begins."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from cogvideox_jax.core.errors import InputError
from data import transforms

_WIDTH = 256  # enough to see a cut, and many times cheaper than the full picture
_SHORTEST = 6  # frames; two cuts closer than this are one flash


def detector():
    """PySceneDetect's adaptive detector: a cut is a change that stands out from its neighbours, so a camera that moves
    fast throughout does not count. InputError when the package is absent."""
    try:
        from scenedetect.detectors import AdaptiveDetector  # extra `data`: only preparing needs it
    except ImportError as error:
        raise InputError(
            f"finding shots needs PySceneDetect and OpenCV ({error}): pip install 'cogvideox-jax[data]'"
        ) from error
    return AdaptiveDetector(min_scene_len=_SHORTEST)


def find_shots(video: Path, fps: float) -> list[tuple[int, int]]:
    """Shots of a video as (start, end) frame numbers, end exclusive: they cover it without gaps. `fps` as probed.

    The detector is fed from our own decoder: one safe way to open files, and frame numbers that agree with `decode`.
    """
    find = detector()
    from scenedetect import FrameTimecode

    cuts, count = [], 0
    for picture in _small(transforms.frames(video)):
        cuts += find.process_frame(FrameTimecode(count, fps), picture)
        count += 1
    if not count:
        raise InputError(f"{video} holds no frames: replace it or remove it")
    cuts += find.post_process(FrameTimecode(count - 1, fps))
    edges = [0, *(cut.frame_num for cut in cuts), count]
    return list(itertools.pairwise(edges))


def _small(frames: Iterator[av.VideoFrame]) -> Iterator[np.ndarray]:
    """Frames as uint8 BGR pictures (h, w, 3) of `_WIDTH`, aspect kept."""
    convert = VideoReformatter()
    for frame in frames:
        height = max(2, round(frame.height * _WIDTH / frame.width))
        yield convert.reformat(frame, width=_WIDTH, height=height, format="bgr24").to_ndarray()
