"""Captions from sidecar files beside a video.

`NAME.txt`: the first line that is not empty is for the whole video. `NAME.json`, preferred where both exist: captions
by time span, [{"start": seconds, "end": seconds, "caption": "..."}, ...].
"""

import json
from pathlib import Path
from typing import NamedTuple

from cogvideox_jax.core.errors import InputError


class Span(NamedTuple):
    """A caption and the seconds of the video that it describes."""

    start: float
    end: float
    caption: str


def read_sidecar(video: Path) -> list[Span]:
    """The captions of a video; none when it has no sidecar. A malformed sidecar is an InputError."""
    spans_file, text_file = video.with_suffix(".json"), video.with_suffix(".txt")
    if spans_file.is_file():
        try:
            entries = json.loads(spans_file.read_text(encoding="utf-8"))
            spans = [Span(float(e["start"]), float(e["end"]), " ".join(str(e["caption"]).split())) for e in entries]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{spans_file} must be a list of {{"start": seconds, "end": seconds, "caption": text}}'
                f" ({type(error).__name__}: {error}): correct it"
            ) from error
        for span in spans:
            if not (0 <= span.start < span.end and span.caption):
                raise InputError(f"{spans_file}: an entry needs 0 <= start < end and a caption, got {tuple(span)}")
        return spans
    if text_file.is_file():
        try:
            lines = text_file.read_text(encoding="utf-8").splitlines()
        except ValueError as error:
            raise InputError(f"{text_file} is not UTF-8 text ({error}): save it as UTF-8") from error
        for line in lines:
            if line.strip():
                return [Span(0.0, float("inf"), " ".join(line.split()))]
        raise InputError(f"{text_file} is empty: write one caption line, or remove it")
    return []


def choose_caption(spans: list[Span], start: float, end: float) -> str | None:
    """The caption with the largest overlap with `start` to `end` (seconds); None when nothing overlaps."""

    def overlap(span: Span) -> float:
        return min(span.end, end) - max(span.start, start)

    best = max(spans, key=overlap, default=None)
    return best.caption if best and overlap(best) > 0 else None
