"""Scalars on disk and progress on the screen."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from absl import logging


class MetricsWriter:
    """Appends one JSON object per logged step to a file. Resuming at a step drops the rows after it.

    Of several processes one is `active`; the others write nothing.
    """

    def __init__(self, path: Path, *, resume_step: int = 0, active: bool = True):
        self._file = None
        if not active:
            return
        rows = read_metrics(path)
        kept = [row for row in rows if row["step"] <= resume_step]
        if len(kept) != len(rows) or not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
            temporary.replace(path)
        self._file = path.open("a")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write and flush one row; `step` counts finished steps."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **{k: float(v) for k, v in scalars.items()}}) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole rows of a metrics file; a last line cut by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Progress:
    """One line at most a second: what, how far, time left."""

    def __init__(self, total: int, what: str):
        self._total, self._what = total, what
        self._started, self._printed = time.monotonic(), 0.0
        self._first: tuple[float, int] | None = None

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total are finished; prints when a second has passed since the last line, and at the end.

        The time left is reckoned from the first call on, so that neither a compilation nor what an earlier process did
        counts as speed.
        """
        now = time.monotonic()
        first_time, first_done = self._first = self._first or (now, done)
        if done < self._total and now - self._printed < 1:
            return
        self._printed = now
        line = f"{self._what} {done}/{self._total} ({100 * done // max(self._total, 1)} %)"
        if done >= self._total:
            line += f", {duration(now - self._started)}"
        elif done > first_done:
            line += f", {duration((now - first_time) / (done - first_done) * (self._total - done))} left"
        logging.info("%s", line + (f": {note}" if note else ""))
