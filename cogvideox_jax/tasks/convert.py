"""Public checkpoints -> Orbax trees, and runs -> diffusers folders. The direction follows from the source."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.convert import folder as folders
from cogvideox_jax.models.convert import t5x, table, trees
from cogvideox_jax.models.convert.table import FLOATS
from cogvideox_jax.models.transformer import Transformer
from cogvideox_jax.train import checkpoint, metrics
from cogvideox_jax.train.workdir import read_config, read_json, tuples, write_json

MODEL = "model.json"
STAGES = ("vae", "encode", "diffusion")
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
    networks: dict[str, Path]
    tokenizer: Path
    max_text_tokens: int


def check(config: ConfigDict, workdir: Path) -> None:
    """Refuse what is no checkpoint, what is damaged as far as headers tell, and a disk that is too small."""
    if config.dtype != "keep" and config.dtype not in _DTYPES:
        raise InputError(f"config.dtype={config.dtype!r}: choose keep, {', '.join(_DTYPES)}")
    if config.weights not in ("ema", "params"):
        raise InputError(f"config.weights={config.weights!r}: choose ema or params")
    if config.sampler not in folders.SAMPLERS:
        raise InputError(f"config.sampler={config.sampler!r}: choose one of {', '.join(folders.SAMPLERS)}")
    if config.max_shard_bytes < 1:
        raise InputError(f"config.max_shard_bytes={config.max_shard_bytes}: expected a size above zero")
    plan = examine(config)
    if isinstance(plan, Import):
        needed = plan.num_bytes
    else:
        needed = 0
        for kind, path in plan.networks.items():
            tree = trees.open_tree(path)
            folders.check_params(kind, plan.pieces[kind]["model"], tree, str(path))
            needed += trees.count_bytes(tree, _DTYPES.get(config.dtype))
    parent = next(path for path in (workdir, *workdir.resolve().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(
            f"--workdir={workdir} has {free / 1e9:.1f} GB left, {needed / 1e9:.1f} GB are needed: free some"
        )


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
    if (source / MODEL).is_file():
        return _export_imported(source)
    if all((source / stage / "config.json").is_file() for stage in STAGES):
        return _export_run(source, config)
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


def _export_imported(source: Path) -> Export:
    pieces = tuples(read_json(source / MODEL, made_by="the convert task"))
    missing = [name for name in ("pipeline", "scheduler", *folders.NETWORKS) if name not in pieces]
    if missing:
        raise InputError(f"{source / MODEL} lacks {', '.join(missing)}: only a whole pipeline's import can be exported")
    networks = {kind: source / kind for kind in folders.NETWORKS}
    return Export(pieces, networks, source / "tokenizer", pieces["transformer"]["model"]["max_text_tokens"])


def _export_run(source: Path, config: ConfigDict) -> Export:
    """The pieces of a run: each stage's config, the scale that encode measured, and the newest checkpoints."""
    vae = read_config(source / "vae", made_by="the train_vae task")
    encode = read_config(source / "encode", made_by="the encode task")
    diffusion = read_config(source / "diffusion", made_by="the train_diffusion task")
    stats = read_json(source / "encode" / "stats.json", made_by="the encode task")
    size = {"sample_height": encode["height"], "sample_width": encode["width"]}
    model = Transformer(**diffusion["model"])
    image = model.in_channels != model.out_channels
    pieces = {
        "pipeline": "CogVideoXImageToVideoPipeline" if image else "CogVideoXPipeline",
        "scheduler": {
            "sampler": config.sampler,
            "snr_shift_scale": diffusion["snr_shift_scale"],
            "timestep_spacing": "trailing",
        },
        "transformer": {
            "model": diffusion["model"],
            **folders.pixel_sizes(encode["num_frames"], encode["height"], encode["width"]),
        },
        "vae": {
            "model": vae["model"],
            "scaling_factor": stats["scaling_factor"],
            "invert_scale_latents": False,
            **size,
        },
        "text_encoder": {"model": encode["text_encoder"]["model"]},
    }
    networks = {
        "transformer": checkpoint.newest_item(source / "diffusion", config.weights),
        "vae": checkpoint.newest_item(source / "vae", config.weights),
        "text_encoder": source / "encode" / "text_encoder",
    }
    vocabulary = Path(encode["vocabulary"])
    if not vocabulary.is_file():
        raise InputError(
            f"{source / 'encode'} was made with the vocabulary {vocabulary}, which is not there: put it back"
        )
    return Export(pieces, networks, vocabulary, encode["max_text_tokens"])


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
    """Import into workdir/{transformer,vae,text_encoder}, tokenizer and model.json, or export to workdir/diffusers."""
    plan = examine(config)
    if isinstance(plan, Import):
        return _import(plan, workdir)
    return _export(plan, workdir, config)


def _import(plan: Import, workdir: Path) -> dict[str, Any]:
    done = _Counter(plan.num_tensors)
    parameters = {}
    for path in workdir.glob("*.orbax-checkpoint-tmp*"):  # of an interrupted run
        shutil.rmtree(path)
    for kind, network in plan.networks.items():
        tree = network(done)
        leaves = jax.tree.leaves(tree)
        parameters[kind] = sum(leaf.size for leaf in leaves)
        if (workdir / kind).exists():  # written whole before an interruption
            done.skip(sum(leaf.shape[0] if leaf.stacked else 1 for leaf in leaves))
        else:
            trees.write_tree(workdir / kind, tree)
    if plan.tokenizer:
        folders.copy_tokenizer(plan.tokenizer, workdir / "tokenizer")
    write_json(workdir / MODEL, plan.pieces)
    return {"direction": "import", "num_tensors": plan.num_tensors, "parameters": parameters}


def _export(plan: Export, workdir: Path, config: ConfigDict) -> dict[str, Any]:
    target, whole = workdir / "diffusers.tmp", workdir / "diffusers"
    if whole.exists():  # all but the last line of an interrupted run
        shutil.rmtree(whole)
    entries = {kind: folders.NETWORKS[kind].entries(plan.pieces[kind]["model"]) for kind in plan.networks}
    num_tensors = sum(len(rows) for rows in entries.values())
    done = _Counter(num_tensors)
    for kind, path in plan.networks.items():
        if (target / kind).exists():  # written whole before an interruption
            done.skip(len(entries[kind]))
            continue
        part = workdir / f"{kind}.tmp"
        shutil.rmtree(part, ignore_errors=True)
        folders.write_network(
            kind,
            part,
            plan.pieces[kind],
            trees.open_tree(path),
            dtype=_DTYPES.get(config.dtype),
            max_shard_bytes=config.max_shard_bytes,
            done=done,
        )
        target.mkdir(exist_ok=True)
        part.rename(target / kind)
    target.mkdir(exist_ok=True)
    if plan.tokenizer.is_dir():
        folders.copy_tokenizer(plan.tokenizer, target / "tokenizer")
    else:
        folders.write_tokenizer(plan.tokenizer, target / "tokenizer", plan.max_text_tokens)
    folders.write_pipeline_files(target, plan.pieces)
    target.rename(whole)
    return {"direction": "export", "num_tensors": num_tensors, "folder": str(whole)}
