"""The steps of preparation, joined: a folder of raw videos in, records and a funnel out."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.core.video import TIME_FACTOR, latent_frames
from data import records, transforms
from data.prepare import captions, clips, shots

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")


def find_videos(folder: str | Path) -> list[Path]:
    """The videos that lie directly in `folder`, by name. InputError when there are none, or two of one name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"input={folder} is not a folder: give a folder of videos")
    videos = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not videos:
        raise InputError(f"input={folder} holds no videos ({' '.join(SUFFIXES)}): put some there")
    names: dict[str, Path] = {}
    for video in videos:
        other = names.setdefault(video.stem, video)
        if other is not video:  # clip ids and sidecars go by the name without its suffix
            raise InputError(f"{video} and {other.name} differ only in suffix: rename one")
    return videos


def check(
    folder: str | Path,
    *,
    fps: float,
    num_frames: int,
    min_frames: int,
    short_side: int,
    max_clips_per_shot: int,
    trim_frames: int,
    min_motion: float,
    crf: int,
) -> None:
    """Raises an InputError that names the setting or file and the remedy; writes nothing. Arguments as for `prepare`.

    Every video is opened and its first frame decoded, every sidecar read, and the shot detector imported.
    """
    latent_frames(num_frames)  # refuses what is not 4k+1
    rules = [
        (min_frames % TIME_FACTOR == 1, f"min_frames must be 4k+1 like num_frames, got {min_frames}"),
        (fps > 0, f"fps must be more than 0, got {fps}"),
        (min_frames <= num_frames, f"min_frames={min_frames} must be at most num_frames={num_frames}"),
        (short_side >= 16 and short_side % 2 == 0, f"short_side must be even and at least 16, got {short_side}"),
        (max_clips_per_shot >= 1, f"max_clips_per_shot must be at least 1, got {max_clips_per_shot}"),
        (trim_frames >= 0, f"trim_frames must be at least 0, got {trim_frames}"),
        (min_motion >= 0, f"min_motion must be at least 0, got {min_motion}"),
        (0 <= crf <= 51, f"crf must be 0 to 51, got {crf}"),
    ]
    for holds, message in rules:
        if not holds:
            raise InputError(message)
    shots.detector()
    for video in find_videos(folder):
        transforms.probe(video)
        transforms.decode(video, [0])
        captions.read_sidecar(video)


def prepare(
    folder: str | Path,
    out: Path,
    *,
    fps: float,
    num_frames: int,
    min_frames: int,
    short_side: int,
    max_clips_per_shot: int,
    trim_frames: int,
    min_motion: float,
    crf: int,
    on_progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> dict:
    """Cuts the videos of `folder` into captioned clips: `out`/records (clip records) and `out`/funnel.json.

    fps: frame rate of the clips. num_frames, min_frames: longest and shortest clip, both 4k+1. short_side: pixels.
    max_clips_per_shot, trim_frames (source frames left out at both ends of a shot): see `clips.clip_indices`.
    min_motion: grey levels, see `clips.motion_score`. crf: h264 quality. on_progress(done, total, video name) after
    each video.

    Returns the funnel: {"videos", "shots", "clips" (cut out of shots), "kept", "rejected": {reason: count}, "rejects":
    [{"source", "start_seconds", "end_seconds", "reason"}]}. Reasons: a shot is "too short" or its "frame rate too low";
    a clip has "no caption" or is "static". InputError when nothing is kept; then `out` has no records.
    """
    videos = find_videos(folder)
    rejected = {"too short": 0, "frame rate too low": 0, "no caption": 0, "static": 0}
    funnel = {"videos": len(videos), "shots": 0, "clips": 0, "kept": 0, "rejected": rejected, "rejects": []}

    def reject(video: Path, start: float, end: float, reason: str) -> None:
        funnel["rejected"][reason] += 1
        funnel["rejects"].append(
            {"source": video.name, "start_seconds": round(start, 3), "end_seconds": round(end, 3), "reason": reason}
        )

    def examples() -> Iterator[dict]:
        for done, video in enumerate(videos, start=1):
            yield from of_video(video)
            on_progress(done, len(videos), video.name)
        if not funnel["kept"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items() if count)
            raise InputError(
                f"input={folder}: no clip was kept ({reasons}): add sidecar captions or longer videos, or lower"
                " min_frames, fps or min_motion"
            )

    def of_video(video: Path) -> Iterator[dict]:
        source_fps = transforms.probe(video).fps
        spans = captions.read_sidecar(video)
        candidates: list[tuple[np.ndarray, float, float, str]] = []
        for shot in shots.find_shots(video, source_fps):
            funnel["shots"] += 1
            begin, end = shot[0] / source_fps, shot[1] / source_fps
            if source_fps < 0.99 * fps:  # 23.976 serves for 24; below that, frames would have to be shown twice
                reject(video, begin, end, "frame rate too low")
                continue
            found = clips.clip_indices(
                shot,
                source_fps,
                fps=fps,
                num_frames=num_frames,
                min_frames=min_frames,
                trim_frames=trim_frames,
                max_clips=max_clips_per_shot,
            )
            if not found:
                reject(video, begin, end, "too short")
            for indices in found:
                funnel["clips"] += 1
                begin, end = indices[0] / source_fps, (indices[-1] + 1) / source_fps
                caption = captions.choose_caption(spans, begin, end)
                if caption is None:
                    reject(video, begin, end, "no caption")
                else:
                    candidates.append((indices, begin, end, caption))
        pictures_of = clips.cut(video, [indices for indices, *_ in candidates], short_side)
        for (indices, begin, end, caption), pictures in zip(candidates, pictures_of, strict=True):
            motion = clips.motion_score(pictures)
            if motion < min_motion:
                reject(video, begin, end, "static")
                continue
            funnel["kept"] += 1
            yield {
                "clip_id": f"{video.stem}-{indices[0]:06d}",
                "video": transforms.encode_video(pictures, fps, crf),
                "num_frames": len(pictures),
                "height": pictures.shape[1],
                "width": pictures.shape[2],
                "fps": fps,
                "source": video.name,
                "start_seconds": begin,
                "end_seconds": end,
                "caption": caption,
                "scores": json.dumps({"motion": round(motion, 3)}),
            }

    out = Path(out)
    records.write_clips(out / "records", examples())
    # after the records: a kill in between leaves no funnel beside records of another run
    (out / "funnel.json").write_text(json.dumps(funnel, indent=1) + "\n")
    return funnel
