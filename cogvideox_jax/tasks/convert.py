"""Public checkpoints -> Orbax trees, and runs -> diffusers folders. The direction follows from the source."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.convert import configs, disk, t5x, table, trees
from cogvideox_jax.models.convert import folder as folders
from cogvideox_jax.models.convert.table import FLOATS
from cogvideox_jax.pipeline import MODEL, STAGES, locate
from cogvideox_jax.train import metrics
from cogvideox_jax.train.workdir import read_json, write_json

_DTYPES = {dtype.name: dtype for dtype in FLOATS if dtype.itemsize < 8}


class Import(NamedTuple):
    """What comes in: the pieces of model.json, for each network a function that makes its lazy tree, and the tokenizer."""

    pieces: dict[str, Any]
    networks: dict[str, Callable[[Callable[[str], None]], Any]]  # of `done`
    num_tensors: int
    num_bytes: int
    tokenizer: Path | None


class Export(NamedTuple):
    """What goes out: the pieces, the tree of each network, and the tokenizer (a folder, or a sentencepiece model)."""

    pieces: dict[str, Any]
    networks: dict[str, Any]
    tokenizer: Path
    max_text_tokens: int


def check(config: ConfigDict, workdir: Path) -> None:
    """Refuse what is no checkpoint, what is damaged as far as headers tell, and a disk that is too small."""
    if config.dtype != "keep" and config.dtype not in _DTYPES:
        raise InputError(f"config.dtype={config.dtype!r}: choose keep, {', '.join(_DTYPES)}")
    if config.weights not in ("ema", "params"):
        raise InputError(f"config.weights={config.weights!r}: choose ema or params")
    if config.sampler not in configs.SAMPLERS:
        raise InputError(f"config.sampler={config.sampler!r}: choose one of {', '.join(configs.SAMPLERS)}")
    if config.max_shard_bytes < 1:
        raise InputError(f"config.max_shard_bytes={config.max_shard_bytes}: expected a size above zero")
    plan = examine(config)
    if isinstance(plan, Export):
        for kind, tree in plan.networks.items():
            folders.check_params(kind, plan.pieces[kind]["model"], tree, f"config.source={config.source}")
    disk.require("--workdir=", workdir, _needed(plan, config))


def _needed(plan: Import | Export, config: ConfigDict) -> int:
    """Bytes that will be written."""
    if isinstance(plan, Import):
        return plan.num_bytes
    dtype = _DTYPES.get(config.dtype)
    return sum(trees.count_bytes(tree, dtype) for tree in plan.networks.values())


def examine(config: ConfigDict) -> Import | Export:
    """What the source is, its configs read and its headers checked. Raises InputError."""
    source = Path(config.source)
    if not config.source or not source.exists():
        raise InputError(f"config.source={config.source!r} does not exist: give a checkpoint's folder or a run's")
    dtype = _DTYPES.get(config.dtype)
    if (source / "model_index.json").is_file():
        pieces, found = folders.read_pipeline(source)
        return _import_networks(pieces, found, dtype, source / "tokenizer")
    if t5x.find(source):
        return _import_t5x(source, dtype)
    if (source / MODEL).is_file() or all((source / stage / "config.json").is_file() for stage in STAGES):
        return _what_goes_out(source, config)
    if (source / "config.json").is_file():
        if "task" in read_json(source / "config.json", made_by="the task"):
            raise InputError(f"config.source={source} is one stage: give the folder that holds {', '.join(STAGES)}")
        kind = folders.kind_of(source)
        found = {kind: folders.open_network(kind, source)}
        return _import_networks({kind: found[kind].piece}, found, dtype, None)
    if source.is_file():
        raise InputError(f"config.source={source} is a file: give the folder that it lies in, with its config.json")
    raise InputError(
        f"config.source={source} is no diffusers folder (model_index.json or config.json), no t5x checkpoint (checkpoint_N) "
        f"and no run ({', '.join(STAGES)}): give one of these"
    )


def _import_networks(
    pieces: dict[str, Any], found: dict[str, folders.Source], dtype: np.dtype | None, tokenizer: Path | None
) -> Import:
    def lazy(kind: str, source: folders.Source) -> Callable[[Callable[[str], None]], Any]:
        network, fields = folders.NETWORKS[kind], source.piece["model"]
        return lambda done: table.leaves(
            network.entries(fields),
            source.tensors,
            network.shapes(fields),
            source=str(source.folder),
            dtype=dtype,
            done=done,
        )

    networks = {kind: lazy(kind, source) for kind, source in found.items()}
    for network in networks.values():
        network(lambda name: None)  # refuses mixed dtypes before anything is written
    num_bytes = 0
    for source in found.values():
        for tensor in source.tensors.values():
            num_bytes += tensor.nbytes // tensor.dtype.itemsize * (dtype or tensor.dtype).itemsize
    return Import(pieces, networks, sum(len(s.tensors) for s in found.values()), num_bytes, tokenizer)


def _import_t5x(source: Path, dtype: np.dtype | None) -> Import:
    fields, tree = t5x.read(source, dtype=dtype)
    count = sum(leaf.shape[0] if leaf.stacked else 1 for leaf in jax.tree.leaves(tree))
    networks = {"text_encoder": lambda done: t5x.read(source, dtype=dtype, done=done)[1]}
    return Import({"text_encoder": {"model": fields}}, networks, count, trees.count_bytes(tree), None)


def _what_goes_out(source: Path, config: ConfigDict) -> Export:
    parts = locate(source, weights=config.weights)
    pieces = dict(parts.pieces)
    if not (source / MODEL).is_file():  # a run, which has no scheduler of its own
        pieces["scheduler"] = pieces["scheduler"] | {"sampler": config.sampler}
    networks = {kind: trees.open_tree(tree) if isinstance(tree, Path) else tree for kind, tree in parts.trees.items()}
    return Export(pieces, networks, parts.tokenizer, pieces["transformer"]["model"]["max_text_tokens"])


class _Counter:
    """Progress by the tensor."""

    def __init__(self, total: int):
        self._progress, self._done = metrics.Progress(total, "convert tensor"), 0

    def __call__(self, name: str) -> None:
        self._done += 1
        self._progress.update(self._done, name)

    def skip(self, count: int) -> None:
        self._done += count


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Import into workdir/{transformer,vae,text_encoder}, tokenizer and model.json, or export to workdir/diffusers.

    Raises InputError when the disk fills up. Networks that are whole stay, and the next run goes on after them.
    """
    plan = examine(config)
    _clear(workdir)  # of a killed run
    with disk.writing("--workdir=", workdir, _needed(plan, config)):
        try:
            return _import(plan, workdir) if isinstance(plan, Import) else _export(plan, workdir, config)
        except BaseException:
            _clear(workdir)
            raise


def _clear(workdir: Path) -> None:
    """Remove what is half-written. The folders in an unfinished export are whole."""
    for path in [
        *workdir.glob("*.tmp"),
        *workdir.glob("diffusers.tmp/**/*.tmp"),
        *workdir.glob("*.orbax-checkpoint-tmp*"),
    ]:
        if path.is_dir() and path.name != "diffusers.tmp":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _import(plan: Import, workdir: Path) -> dict[str, Any]:
    done = _Counter(plan.num_tensors)
    parameters = {}
    for kind, network in plan.networks.items():
        tree = network(done)
        leaves = jax.tree.leaves(tree)
        parameters[kind] = sum(leaf.size for leaf in leaves)
        if (workdir / kind).exists():  # written whole before an interruption
            done.skip(sum(leaf.shape[0] if leaf.stacked else 1 for leaf in leaves))
        else:
            trees.write_tree(workdir / kind, tree)
    if plan.tokenizer:
        tokenizer = plan.tokenizer
        _whole(workdir, workdir / "tokenizer", lambda part: folders.copy_tokenizer(tokenizer, part))
    write_json(workdir / MODEL, plan.pieces)
    return {"direction": "import", "num_tensors": plan.num_tensors, "parameters": parameters}


def _whole(workdir: Path, target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder, unless an interrupted run has: it appears when it is whole."""
    if target.exists():
        return
    part = workdir / f"{target.name}.tmp"
    write(part)
    target.parent.mkdir(exist_ok=True)
    part.rename(target)


def _export(plan: Export, workdir: Path, config: ConfigDict) -> dict[str, Any]:
    target, whole = workdir / "diffusers.tmp", workdir / "diffusers"
    if whole.exists():  # all but the last line of an interrupted run
        shutil.rmtree(whole)
    entries = {kind: folders.NETWORKS[kind].entries(plan.pieces[kind]["model"]) for kind in plan.networks}
    num_tensors = sum(len(rows) for rows in entries.values())
    done = _Counter(num_tensors)

    def network(kind: str, part: Path) -> None:
        folders.write_network(
            kind,
            part,
            plan.pieces[kind],
            plan.networks[kind],
            dtype=_DTYPES.get(config.dtype),
            max_shard_bytes=config.max_shard_bytes,
            done=done,
        )

    def tokenizer(part: Path) -> None:
        if plan.tokenizer.is_dir():
            folders.copy_tokenizer(plan.tokenizer, part)
        else:
            folders.write_tokenizer(plan.tokenizer, part, plan.max_text_tokens)

    for kind in plan.networks:
        if (target / kind).exists():
            done.skip(len(entries[kind]))
        _whole(workdir, target / kind, functools.partial(network, kind))
    _whole(workdir, target / "tokenizer", tokenizer)
    folders.write_pipeline_files(target, plan.pieces)
    target.rename(whole)
    return {"direction": "export", "num_tensors": num_tensors, "folder": str(whole)}
