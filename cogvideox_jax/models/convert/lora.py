"""LoRA files as diffusers and peft write them for CogVideoX (spec 2.12, 4.9) <-> the tree of models.lora.

    pytorch_lora_weights.safetensors
      transformer.transformer_blocks.{i}.attn1.{to_q,to_k,to_v,to_out.0}.lora_{A,B}.weight     A (rank, in), B (out, rank)
      its metadata: lora_adapter_metadata, JSON of peft's LoraConfig, each key after "transformer."

A file without that metadata has scale 1. In the metadata, what would change the numbers and is not supported is refused, as is
a key that nobody knows, unless it is off.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models import lora
from cogvideox_jax.models.convert import table
from cogvideox_jax.models.convert.files import listing, open_file, parse_json, write_tensors
from cogvideox_jax.models.transformer import Transformer

BASENAME = "pytorch_lora_weights"
METADATA_KEY = "lora_adapter_metadata"
PREFIX = "transformer."
MAX_ALPHA = 1_000_000  # far above any that is used
NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
# what other systems' files hold, by a part of the tensor's name
FOREIGN = {
    "lora_magnitude_vector": "DoRA is not supported: train a plain LoRA",
    "dora_scale": "DoRA is not supported: train a plain LoRA",
    ".lokr_": "LoKr is not supported: train a plain LoRA",
    ".bias": "biases of a LoRA are not supported: train it with lora_bias=False",
    "text_encoder": "the text encoder is fixed in CogVideoX: save the LoRA of the transformer alone",
    ".lora_up": "this is not diffusers' format for CogVideoX: convert it to lora_A and lora_B",
    ".lora.up": "this is not peft's format: load it in diffusers and save it again",
}
# of LoraConfig: what matters to training only, or is said by the tensors themselves
IGNORED = (
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
# the other ways to start one change the base weights too, or the arithmetic
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


class Info(NamedTuple):
    """What a file says of its LoRA. `models.lora.scaled(tree, info.scale)` is what its maker trained."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def diffusers_names(num_layers: int, targets: Iterable[str] = lora.TARGETS) -> list[table.Entry]:
    """Both tensors of every target and layer."""
    return [
        table.Entry(
            f"blocks/attention/{target}/{ours}",
            f"{PREFIX}transformer_blocks.{layer}.attn1.{NAMES[target]}.{theirs}.weight",
            "linear",
            layer,
        )
        for layer in range(num_layers)
        for target in targets
        for ours, theirs in (("a", "lora_A"), ("b", "lora_B"))
    ]


def _find(source: Path) -> Path:
    if not source.is_dir():
        return source
    path = source / f"{BASENAME}.safetensors"
    # a pickle of that name is refused as one
    pickle = source / f"{BASENAME}.bin"
    if not path.exists() and not pickle.exists():
        raise InputError(f"{source} holds no {path.name}: give its folder, or a .safetensors file")
    return path if path.exists() else pickle


def _shown(name: str) -> str:
    """A foreign name for a message of one line."""
    return (name if name.isprintable() else ascii(name))[:200]


def _check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
    known = set(known)
    unknown = [_shown(name) for name in names if name not in known]
    for part, reason in FOREIGN.items():
        found = [name for name in unknown if part in name]
        if found:
            raise InputError(f"{where} holds {listing(found)}: {reason}")
    if unknown:
        raise InputError(
            f"{where} holds {listing(unknown, known)}, expected the LoRA of {', '.join(NAMES.values())} in this model's "
            "layers: save it for these modules alone, or choose its model"
        )


def _rank(entries: list[table.Entry], tensors: Mapping[str, Any], where: str) -> int:
    """The one rank of all tensors that are there; what else may be wrong with them is found by table.check."""
    first: dict[int, str] = {}
    for entry in entries:
        shape = tensors[entry.theirs].shape if entry.theirs in tensors else ()
        if len(shape) == 2:
            first.setdefault(shape[0] if entry.ours.endswith("/a") else shape[1], entry.theirs)
    if len(first) > 1:
        (one, name), (other, name2) = list(first.items())[:2]
        raise InputError(f"{where}: {name} has rank {one} and {name2} has {other}: save it with one rank for all")
    rank = next(iter(first), 0)
    if rank < 1:
        raise InputError(f"{where}: its tensors have no rank: they are no LoRA")
    return rank


def _alpha(metadata: Mapping[str, str], rank: int, path: Path) -> float:
    """What the metadata says of the scale, which is alpha / rank; every other key must leave the numbers alone."""
    text = metadata.get(METADATA_KEY)
    if not text:
        return float(rank)
    where = f"{METADATA_KEY} of {path}"
    config = parse_json(text, where)

    def refused(name: str, value: Any, expected: str) -> InputError:
        return InputError(f"{where}: {_shown(name)} = {_shown(repr(value))}, expected {expected}")

    alpha, rslora = None, False
    for name, value in config.items():
        key = name.removeprefix(PREFIX)
        if key == name:
            raise refused(name, value, f"names after {PREFIX} only: save the LoRA of the transformer alone")
        if key == "r":
            if type(value) is not int or value != rank:
                raise refused(name, value, f"{rank}, the rank of the tensors: save it again")
        elif key == "lora_alpha":
            if type(value) not in (int, float) or not 0 < value <= MAX_ALPHA:
                raise refused(name, value, f"a number above zero, at most {MAX_ALPHA}")
            alpha = float(value)
        elif key == "use_rslora":
            if type(value) is not bool:
                raise refused(name, value, "true or false")
            rslora = value
        elif key == "peft_type":
            if value not in ("LORA", None):
                raise refused(name, value, "LORA: other adapters are not supported")
        elif key == "bias":
            if value not in ("none", None):
                raise refused(name, value, "none: biases of a LoRA are not supported")
        elif key == "init_lora_weights":
            if not any(value is start or (value == start and isinstance(value, str)) for start in STARTS):
                raise refused(name, value, "true: this start changes the base model's weights, which the file has not")
        elif key not in IGNORED and value:
            raise refused(name, value, "nothing: this is not supported, train a plain LoRA without it")
    for key in ("r", "lora_alpha"):
        if f"{PREFIX}{key}" not in config:
            raise InputError(f"{where}: {PREFIX}{key} is missing: save it again")
    # rank-stabilised LoRA scales by alpha / sqrt(rank)
    return alpha * rank**0.5 if rslora else alpha


def read(source: Path, model: Transformer) -> tuple[dict[str, Any], Info]:
    """A LoRA from a file, or from a folder that holds one: (tree in float32, not scaled; what the file says of it).

    Without metadata alpha is the rank: scale 1, as diffusers takes it. Where the file is for rank-stabilised LoRA, alpha is
    the one that gives the same scale. Raises InputError for whatever is not a LoRA of the attention of this model.
    """
    path = _find(Path(source))
    tensors, metadata = open_file(path)
    where = str(path)
    entries = diffusers_names(model.num_layers)
    _check_names(tensors, [entry.theirs for entry in entries], where)
    there = {entry.ours.split("/")[2] for entry in entries if entry.theirs in tensors}
    targets = tuple(name for name in lora.TARGETS if name in there)
    if not targets:
        raise InputError(f"{where} holds no tensors: it is no LoRA")
    entries = diffusers_names(model.num_layers, targets)
    rank = _rank(entries, tensors, where)
    alpha = _alpha(metadata, rank, path)
    shapes = lora.shapes(model, rank, targets)
    tree = table.leaves(entries, tensors, shapes, source=where, dtype=np.float32)
    return jax.tree.map(np.asarray, tree), Info(rank, alpha, targets)


def write(target: Path, tree: Mapping[str, Any], alpha: float, *, dtype: Any = np.float32) -> Path:
    """Write a LoRA so that diffusers' load_lora_weights reads it with its scale.

    Args:
      target: a .safetensors file, or a folder, made where it is missing.
      tree: not scaled; all its targets have one rank.
      alpha: the scale is alpha / rank; the rank where the tree is scaled already.
      dtype: of the tensors.

    Returns: the file.
    """
    found = lora.pairs(tree)
    ranks = {name: a.shape[2] for name, (a, _) in found.items()}
    layers = {a.shape[0] for a, _ in found.values()}
    if len(set(ranks.values())) > 1 or len(layers) > 1:
        listed = ", ".join(f"{name} {tuple(a.shape)}" for name, (a, _) in found.items())
        raise InputError(f"a LoRA's file has one rank and as many layers for all targets, a is: {listed}")
    if not 0 < alpha <= MAX_ALPHA:
        raise InputError(f"the LoRA's alpha is {alpha}, expected a number above zero, at most {MAX_ALPHA}")
    target = Path(target)
    is_file = target.suffix == ".safetensors" and not target.is_dir()
    folder, basename = (target.parent, target.stem) if is_file else (target, BASENAME)
    config = {
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else float(alpha),
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": next(iter(ranks.values())),
        "target_modules": [NAMES[name] for name in found],
        "use_rslora": False,
    }
    text = json.dumps({f"{PREFIX}{key}": value for key, value in config.items()}, indent=2, sort_keys=True)
    arrays = jax.tree.map(np.asarray, lora.tree_of(found))
    entries = diffusers_names(layers.pop(), found)
    layout = table.layout(entries, arrays, dtype)
    # in one file, however large: diffusers looks for no parts
    limit = sum(spec.nbytes for spec in layout.values())
    return write_tensors(
        folder,
        layout,
        table.to_tensors(entries, arrays, dtype=dtype),
        basename=basename,
        max_shard_bytes=limit,
        metadata={"format": "pt", METADATA_KEY: text},
    )[0]
