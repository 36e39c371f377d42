"""The record schema, shared by writer and reader.

A record folder holds one tensorflow-datasets builder written as array_record shards, plus a manifest:

    FOLDER/manifest.json                                      counts and digests, written last
    FOLDER/{clips,latents}/{version}/dataset_info.json, features.json, *.array_record-*

TensorFlow is not needed. Video is stored as encoded mp4 bytes (`tfds.features.Video` needs TensorFlow), and tensors
with several unknown dims are compressed (tensorflow-datasets allows them only so).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from cogvideox_jax.core.errors import InputError

MANIFEST = "manifest.json"

# tensorflow-datasets reports every step at INFO and draws bars; the tasks have their own progress
tfds.disable_progress_bar()
logging.get_absl_logger().addFilter(
    lambda record: record.levelno >= WARNING or Path(tfds.__file__).parent not in Path(record.pathname).parents
)


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Ask no server: the original looks for every new data set in a public bucket."""


class _Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One split, `train`, of examples handed over in `examples`."""

    FEATURES: Mapping[str, Any]
    WRITTEN_BY: str
    examples: Iterable[dict]

    def _info(self) -> tfds.core.DatasetInfo:
        return _Info(builder=self, features=tfds.features.FeaturesDict(dict(self.FEATURES)))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for example in self.examples:
            yield example["clip_id"], example

    def _log_download_bytes(self) -> None:
        """Print no banner: nothing is downloaded, and the task reports its own progress."""

    def _log_download_done(self) -> None:
        """Print no banner."""


def _compressed(*shape: int | None) -> tfds.features.Tensor:
    return tfds.features.Tensor(shape=shape, dtype=np.float32, encoding=tfds.features.Encoding.ZLIB)


class Clips(_Records, skip_registration=True):
    """Captioned clips: `video` is an h264 mp4 of `num_frames` = 4k + 1 frames, `scores` is JSON, name -> number."""

    VERSION = tfds.core.Version("1.0.0")
    WRITTEN_BY = "prepare"
    FEATURES = {  # noqa: RUF012 (read only)
        "clip_id": tfds.features.Text(),
        "video": tfds.features.Tensor(shape=(), dtype=np.object_),
        "num_frames": np.int64,
        "height": np.int64,
        "width": np.int64,
        "fps": np.float32,
        "source": tfds.features.Text(),
        "start_seconds": np.float32,
        "end_seconds": np.float32,
        "caption": tfds.features.Text(),
        "scores": tfds.features.Text(),
    }


class Latents(_Records, skip_registration=True):
    """VAE posteriors (`mean`, `logvar`: t h w c) and the caption's text embeddings (`context`: l d)."""

    VERSION = tfds.core.Version("1.0.0")
    WRITTEN_BY = "encode"
    FEATURES = {  # noqa: RUF012 (read only)
        "clip_id": tfds.features.Text(),
        "caption": tfds.features.Text(),
        "source": tfds.features.Text(),
        "mean": _compressed(None, None, None, None),
        "logvar": _compressed(None, None, None, None),
        "context": _compressed(None, None),
    }


_BUILDERS = {"clips": Clips, "latents": Latents}


def write_clips(folder: Path, examples: Iterable[dict]) -> int:
    """Writes clip records (the keys of `Clips.FEATURES`; clip_id unique) and returns how many.

    All or nothing: `folder` appears, or replaces an older record folder, only when every example is written. An
    exception raised by `examples` comes out unchanged. No example at all, or a folder that holds something else, is an
    InputError.
    """
    return _write(Path(folder), Clips, examples)


def write_latents(folder: Path, examples: Iterable[dict]) -> int:
    """Writes latent records (the keys of `Latents.FEATURES`); the same promises as `write_clips`."""
    return _write(Path(folder), Latents, examples)


def _write(folder: Path, builder_class: type[_Records], examples: Iterable[dict]) -> int:
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} exists and is not a record folder: choose another place, or remove it")
    # Beside the target, hence on the same file system: the last step is one rename. A killed run leaves only this
    # folder, which the next run clears.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    summary = {"num_records": 0, "min_num_frames": None}
    digests: list[str] = []

    def counted() -> Iterator[dict]:
        for example in examples:
            summary["num_records"] += 1
            frames = int(example["num_frames"]) if "num_frames" in example else len(example["mean"])
            summary["min_num_frames"] = min(frames, summary["min_num_frames"] or frames)
            digests.append(_digest(example))
            yield example
        if not summary["num_records"]:
            raise InputError(f"{folder}: nothing to write, not one example was given")

    try:
        builder = builder_class(data_dir=os.fspath(partial), file_format="array_record")
        builder.examples = counted()
        builder.download_and_prepare(
            download_dir=os.fspath(partial / "downloads"),
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
        shutil.rmtree(partial / "downloads", ignore_errors=True)
        shards = sorted(partial.glob("*/*/*.array_record-*"))
        contents = {
            "builder": builder.name,
            "version": str(builder.version),
            **summary,
            "digest": hashlib.sha256("".join(sorted(digests)).encode()).hexdigest(),
            "shards": {path.relative_to(partial).as_posix(): path.stat().st_size for path in shards},
        }
        (partial / MANIFEST).write_text(json.dumps(contents, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary["num_records"]


def _digest(example: dict) -> str:
    """Digest of an example's values. One of the shard files would be of no use: protobuf writes the keys of a record in
    an order that changes from process to process."""
    digest = hashlib.sha256()
    for key in sorted(example):
        value = example[key]
        if isinstance(value, str):
            value = value.encode()
        if not isinstance(value, bytes):
            array = np.asarray(value)
            value = f"{array.dtype}{array.shape}".encode() + array.tobytes()
        digest.update(f"{key} {len(value)} ".encode() + value)
    return digest.hexdigest()


def manifest(folder: Path, builder: str = "") -> dict:
    """What a folder holds: {"builder", "version", "num_records", "min_num_frames", "digest", "shards": {name: bytes}}.

    min_num_frames is the length of the shortest clip (of latents: in latent frames).

    With `builder` ("clips" or "latents") it must hold that kind. Raises InputError, naming the task that writes it.
    """
    folder = Path(folder)
    wanted = [_BUILDERS[builder]] if builder else list(_BUILDERS.values())
    remedy = "run the task " + " or ".join(f'"{b.WRITTEN_BY}"' for b in wanted) + " to write it"
    if not folder.is_dir():
        raise InputError(f"record folder {folder} does not exist: {remedy}")
    try:
        found = json.loads((folder / MANIFEST).read_text())
        found_builder, version, shards = found["builder"], found["version"], found["shards"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is not a record folder (no readable {MANIFEST}): {remedy}") from None
    if found_builder not in [b.name for b in wanted]:
        raise InputError(f"{folder} holds {found_builder!r} records, not {wanted[0].name!r}: {remedy}")
    if version != str(_BUILDERS[found_builder].VERSION):
        raise InputError(
            f"{folder} has schema version {version}, not {_BUILDERS[found_builder].VERSION}: {remedy} again"
        )
    for name, size in shards.items():
        # a truncated array_record file may otherwise read as an empty one
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise InputError(f"{folder / name} is missing or not {size} bytes long: {remedy} again")
    return found


def fingerprint(folder: Path) -> dict:
    """Identifies what a record folder holds: {"builder", "num_records", "digest"}, the same whenever the same examples
    were written. Reads the manifest only."""
    found = manifest(folder)
    return {key: found[key] for key in ("builder", "num_records", "digest")}


class Source:
    """Random access to the records of one folder: len(source), source[i] -> dict. Texts come as str, video as bytes."""

    def __init__(self, folder: Path, builder: str = ""):
        found = manifest(folder, builder)
        self.builder_name: str = found["builder"]
        written = tfds.builder_from_directory(Path(folder) / found["builder"] / found["version"])
        self._source = written.as_data_source(split="train")  # pyright: ignore[reportCallIssue]
        if len(self._source) != found["num_records"]:
            raise InputError(f"{folder} holds {len(self._source)} records, its manifest says {found['num_records']}")
        features = _BUILDERS[self.builder_name].FEATURES
        self._texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._source[index]
        return record | {key: record[key].decode() for key in self._texts}


def read(folder: Path, builder: str = "") -> Source:
    """Opens a record folder. A missing, foreign, truncated or outdated one is an InputError naming the task to run."""
    return Source(folder, builder)
