"""Numpy functions between files and arrays: decode and encode video, choose frames, resize, normalise, tokenise."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import sentencepiece
from absl import logging
from av.container import InputContainer
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.core.video import latent_frames

# A text file named x.mp4 can make FFmpeg open other files (concat), listen on a socket (SDP) or fetch a URL. Only real
# containers are let in, and only from the file system.
_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file"}
_TIMEOUT_SECONDS = 30.0
# Several threads, and x264's mbtree on AVX-512 (it reads memory that nobody wrote), give other bytes on each run.
_EXACT = {"threads": "1", "x264-params": "no-mbtree=1:cpu-independent=1"}
_MAX_PIXELS = 8192 * 4352  # a small file may declare a huge picture, and each frame of it is allocated


class VideoInfo(NamedTuple):
    """What a file holds: frames as counted, not as its header claims; fps from their times; duration in seconds."""

    num_frames: int
    height: int
    width: int
    fps: float
    duration: float


def _name(source: str | Path | bytes) -> str:
    return f"encoded video of {len(source)} bytes" if isinstance(source, bytes) else str(source)


@contextlib.contextmanager
def open_video(source: str | Path | bytes) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Opens a video file, or the bytes of one, as (container, video stream): the only place that does.

    What FFmpeg cannot read, on opening or inside the `with` block, becomes an InputError that names the file.
    """
    name = _name(source)
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        with av.open(file, "r", options=_OPTIONS, timeout=_TIMEOUT_SECONDS) as container:
            if not container.streams.video:
                raise InputError(f"{name} has no video stream: remove it or replace it by a video")
            stream = container.streams.video[0]
            if stream.width * stream.height > _MAX_PIXELS:
                size = f"{stream.width}x{stream.height}"
                raise InputError(f"{name} declares {size} pixels, more than {_MAX_PIXELS}: scale it down first")
            if isinstance(source, bytes):
                stream.thread_count = 1  # clips are small and already read by several threads
            yield container, stream
    except InputError:
        raise
    except (FFmpegError, EOFError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name} cannot be read as a video ({reason}): replace it or remove it") from error


def probe(source: str | Path | bytes) -> VideoInfo:
    """Measures a video without decoding it, by reading its packets: headers are often wrong about counts and rates."""
    times = []
    with open_video(source) as (container, stream):
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                times.append(packet.pts if packet.pts is not None else packet.dts)
        declared = float(stream.average_rate or 0)
        known = [t for t in times if t is not None]
        seconds = (max(known) - min(known)) * stream.time_base if known else 0
        fps = float((len(times) - 1) / seconds) if seconds and len(known) == len(times) else declared
        if not times or not fps:
            raise InputError(f"{_name(source)} holds no timed frames: replace it or remove it")
        return VideoInfo(len(times), stream.height, stream.width, fps, len(times) / fps)


def frames(source: str | Path | bytes) -> Iterator[av.VideoFrame]:
    """Yields every decoded frame, in order and not yet converted. A damaged frame is an InputError."""
    with open_video(source) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise InputError(f"{_name(source)} is damaged at frame {index}: replace it or remove it")
            yield frame


def decode(source: str | Path | bytes, indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """Decodes a video, or its frames at `indices` (any order, repeats allowed), to uint8 RGB (t, h, w, 3)."""
    convert = VideoReformatter()  # one for all frames: it keeps its tables, which cost more than a small picture
    if indices is None:
        pictures = [convert.reformat(frame, format="rgb24").to_ndarray() for frame in frames(source)]
        if not pictures:
            raise InputError(f"{_name(source)} holds no frames: replace it or remove it")
        return np.stack(pictures)
    wanted = np.asarray(indices, dtype=int)
    if not wanted.size or wanted.min() < 0:
        raise ValueError(f"indices must be one or more numbers of at least 0, got {wanted}")
    chosen, last, count = {}, wanted.max(), 0
    keep = set(wanted.tolist())
    for count, frame in enumerate(frames(source), start=1):
        if count - 1 in keep:
            chosen[count - 1] = convert.reformat(frame, format="rgb24").to_ndarray()
        if count > last:
            break
    if count <= last:
        raise InputError(f"{_name(source)} has only {count} frames, frame {last} was asked for: replace the file")
    return np.stack([chosen[i] for i in wanted.tolist()])


def encode_video(pictures: np.ndarray, fps: float, crf: int = 17) -> bytes:
    """Encodes uint8 RGB (t, h, w, 3) as an h264 mp4 (yuv420p). Sizes must be even; `crf` 0 (best) to 51 (smallest).

    Equal input gives equal bytes, on any processor.
    """
    _, height, width, _ = pictures.shape
    if height % 2 or width % 2:
        raise InputError(f"h264 video needs even sizes, got {height}x{width}: make height and width even")
    file = io.BytesIO()
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(file, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), **_EXACT})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def choose_frames(num_source: int, source_fps: float, num_frames: int, fps: float, start: int = 0) -> np.ndarray:
    """Picks `num_frames` = 4k + 1 frames at `fps` out of `num_source` at `source_fps`, from source frame `start` on.

    Returns source indices (num_frames,), int64. A span that runs past the source is an InputError.
    """
    latent_frames(num_frames)  # refuses what is not 4k + 1
    indices = start + np.round(np.arange(num_frames) * (source_fps / fps)).astype(np.int64)
    if start < 0 or indices[-1] >= num_source:
        raise InputError(
            f"{num_frames} frames at {fps:g} fps from frame {start} on need source frame {indices[-1]}, but there are"
            f" {num_source}: lower num_frames or raise fps"
        )
    return indices


def resize_crop(pictures: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales uint8 (t, h, w, 3) to cover height x width, aspect kept, and cuts the centre: uint8 (t, height, width, 3).

    Bicubic with antialias: Pillow widens the filter when reducing, so that fine patterns do not alias.
    """
    _, h, w, _ = pictures.shape
    if (h, w) == (height, width):
        return pictures
    scale = min(h / height, w / width)
    crop_h, crop_w = height * scale, width * scale
    box = ((w - crop_w) / 2, (h - crop_h) / 2, (w + crop_w) / 2, (h + crop_h) / 2)
    return np.stack(
        [np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC, box=box)) for p in pictures]
    )


def read_image(path: Path) -> np.ndarray:
    """A picture file as uint8 RGB (h, w, 3), turned as its camera held it. One that cannot be read is an InputError."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP")) as picture:
            if picture.width * picture.height > _MAX_PIXELS:
                size = f"{picture.width}x{picture.height}"
                raise InputError(f"{path} declares {size} pixels, more than {_MAX_PIXELS}: scale it down first")
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as a picture ({reason}): give a PNG, JPEG, WebP or BMP file") from None


def normalize(pictures: np.ndarray) -> np.ndarray:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return pictures.astype(np.float32) / np.float32(127.5) - np.float32(1)


def denormalize(video: np.ndarray) -> np.ndarray:
    """float [-1, 1] (clipped) -> uint8 [0, 255], rounded: the inverse of `normalize`."""
    return np.round((np.clip(np.asarray(video, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


class Tokenizer:
    """T5's tokenizer on a sentencepiece model: pieces, then eos (1), then pad (0) up to `max_tokens`."""

    pad_id, eos_id = 0, 1

    def __init__(self, model: str | Path | bytes, max_tokens: int):
        """Opens a model's file, or takes its bytes; a missing or unreadable one is an InputError."""
        try:
            content = model if isinstance(model, bytes) else Path(model).read_bytes()
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (OSError, RuntimeError) as error:
            name, reason = "this" if isinstance(model, bytes) else model, " ".join(str(error).split())
            raise InputError(f"{name} is not a readable sentencepiece model ({reason}): give T5's") from error
        self.max_tokens = max_tokens
        self.vocab_size = self._pieces.vocab_size()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns int32 ids (len(texts), max_tokens). A longer text is cut before its eos, with a warning."""
        ids = np.full((len(texts), self.max_tokens), self.pad_id, np.int32)
        for row, pieces in zip(ids, self._pieces.encode(list(texts)), strict=True):
            cut = len(pieces) - (self.max_tokens - 1)
            if cut > 0:
                logging.warning("caption cut by %d of %d tokens (max_tokens=%d)", cut, len(pieces) + 1, self.max_tokens)
                pieces = pieces[: self.max_tokens - 1]
            row[: len(pieces) + 1] = [*pieces, self.eos_id]
        return ids
