"""diffusers' pipeline folders <-> our networks: which files there are (spec 1.1-1.5); configs.py says what is in the configs.

model_index.json            which pipeline, and a class for each folder
transformer/                config.json, diffusion_pytorch_model*.safetensors
vae/                        config.json, diffusion_pytorch_model*.safetensors
text_encoder/               config.json, model*.safetensors (transformers' T5)
tokenizer/                  spiece.model or tokenizer.json, tokenizer_config.json
scheduler/                  scheduler_config.json
"""

import functools
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models import t5, transformer, vae
from cogvideox_jax.models.convert import configs, table, tokenizer
from cogvideox_jax.models.convert import t5 as t5_names
from cogvideox_jax.models.convert import transformer as transformer_names
from cogvideox_jax.models.convert import vae as vae_names
from cogvideox_jax.models.convert.files import open_tensors, read_json, write_json, write_tensors

PIPELINES = ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline")
TOKENIZER_FILES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class Network(NamedTuple):
    """What is known of one network's folder: its config in both directions, its table, and its parameters' shapes."""

    basename: str  # of the weight files
    library: str
    class_name: str
    read: Callable[[Mapping[str, Any], str], dict[str, Any]]
    write: Callable[[Mapping[str, Any]], dict[str, Any]]
    model: Callable[..., Any]  # our network, of its fields
    names: Callable[[Any], list[table.Entry]]  # of our network
    init: Callable[[Any], Any]  # our network's parameters

    def entries(self, fields: Mapping[str, Any]) -> list[table.Entry]:
        """The name table of a network with these fields."""
        return self.names(self.model(**fields))

    def shapes(self, fields: Mapping[str, Any]) -> Any:
        """Our parameter tree of a network with these fields, as jax.ShapeDtypeStruct."""
        return _shapes(self.init, self.model(**fields))


@functools.lru_cache
def _shapes(init: Callable[[Any], Any], model: Any) -> Any:
    return jax.eval_shape(lambda: init(model))


def _init_transformer(model: transformer.Transformer) -> Any:
    # parameters do not depend on the size: the smallest that the learned table allows
    _, h, w = model.learned_grid
    size = (model.patch_size_t, (h or 1) * model.patch_size, (w or 1) * model.patch_size)
    return transformer.init(model, jax.random.key(0), size)


def _init_vae(model: vae.VAE) -> Any:
    return model.init(jax.random.key(0), jnp.zeros((1, 5, 16, 16, 3)))["params"]


def _init_t5(model: t5.T5Encoder) -> Any:
    return model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


NETWORKS = {
    "transformer": Network(
        "diffusion_pytorch_model",
        "diffusers",
        "CogVideoXTransformer3DModel",
        configs.transformer_from,
        configs.transformer_to,
        transformer.Transformer,
        transformer_names.diffusers_names,
        _init_transformer,
    ),
    "vae": Network(
        "diffusion_pytorch_model",
        "diffusers",
        "AutoencoderKLCogVideoX",
        configs.vae_from,
        configs.vae_to,
        vae.VAE,
        vae_names.diffusers_names,
        _init_vae,
    ),
    "text_encoder": Network(
        "model",
        "transformers",
        "T5EncoderModel",
        configs.t5_from,
        configs.t5_to,
        t5.T5Encoder,
        t5_names.huggingface_names,
        _init_t5,
    ),
}


class Source(NamedTuple):
    """A network in a folder, checked and ready to be read."""

    piece: dict[str, Any]  # {"model": fields, ...}
    tensors: Mapping[str, Any]
    folder: Path

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def kind_of(folder: Path) -> str:
    """Which network a folder with a config.json holds: transformer, vae or text_encoder. Raises InputError."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if name is None and config.get("model_type") == "t5":
        return "text_encoder"
    for kind, network in NETWORKS.items():
        if name == network.class_name:
            return kind
    known = ", ".join(network.class_name for network in NETWORKS.values())
    what = f"_class_name = {name!r}" if name else f"model_type = {config.get('model_type')!r}"
    raise InputError(f"{folder / 'config.json'}: {what}, expected one of {known}")


def open_network(kind: str, folder: Path) -> Source:
    """Read a network's config and headers, and check that its tensors are those of our network. Raises InputError."""
    network = NETWORKS[kind]
    piece = network.read(read_json(folder / "config.json"), str(folder / "config.json"))
    tensors = open_tensors(folder)
    fields = piece["model"]
    # before a table is made of a number that a config claims
    layers = fields.get("num_layers", fields.get("layers_per_block"))
    if layers > len(tensors):
        raise InputError(
            f"{folder / 'config.json'} says {layers} layers, the weights have {len(tensors)} tensors in all"
        )
    table.check(network.entries(fields), tensors, network.shapes(fields), source=str(folder))
    return Source(piece, tensors, folder)


def read_index(folder: Path) -> str:
    """The pipeline's class in model_index.json. Raises InputError where it, or one of its parts, is none of ours."""
    path = folder / "model_index.json"
    index = read_json(path)
    pipeline = configs.class_name(index, PIPELINES, str(path))
    expected = {kind: (network.class_name,) for kind, network in NETWORKS.items()}
    expected |= {"scheduler": tuple(configs.SAMPLERS.values()), "tokenizer": ("T5Tokenizer", "T5TokenizerFast")}
    for name, classes in expected.items():
        part = index.get(name)
        if not isinstance(part, list) or len(part) != 2 or part[1] not in classes:
            raise InputError(f"{path}: {name} = {part!r}, expected the class {' or '.join(classes)}")
        if not (folder / name).is_dir():
            raise InputError(f"{folder / name} is missing, {path.name} names it: give the complete folder")
    for name in sorted(index.keys() - expected.keys()):
        if not name.startswith("_"):
            raise InputError(f"{path}: unknown part {name} = {index[name]!r}: this pipeline is not one of CogVideoX's")
    return pipeline


def read_pipeline(folder: Path) -> tuple[dict[str, Any], dict[str, Source]]:
    """A whole pipeline's folder: (what model.json will say of it, its networks). Reads configs and headers only."""
    pipeline = read_index(folder)
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = configs.scheduler_from(read_json(path), str(path))
    tokenizer.vocabulary(folder / "tokenizer")
    sources = {kind: open_network(kind, folder / kind) for kind in NETWORKS}
    pieces = {kind: source.piece for kind, source in sources.items()}
    return {"pipeline": pipeline, "scheduler": scheduler, **pieces}, sources


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a T5 tokenizer; what else may lie there is left. A missing spiece.model is made of tokenizer.json."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "spiece.model").write_bytes(tokenizer.vocabulary(source))
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_tokenizer(vocabulary: Path, target: Path, max_text_tokens: int) -> None:
    """A tokenizer folder around a sentencepiece model, as T5Tokenizer reads it."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(vocabulary, target / "spiece.model")
    config = {
        "additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)],
        "clean_up_tokenization_spaces": True,
        "eos_token": "</s>",
        "extra_ids": 100,
        "legacy": True,
        "model_max_length": max_text_tokens,
        "pad_token": "<pad>",
        "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
    }
    write_json(target / "tokenizer_config.json", config)


def write_network(
    kind: str,
    folder: Path,
    piece: Mapping[str, Any],
    params: Any,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 10_000_000_000,
    done: Callable[[str], None] = lambda name: None,
) -> None:
    """Write one network's folder: config.json and its weights.

    Args:
      kind: transformer, vae or text_encoder.
      folder: to write; made where it is missing.
      piece: {"model": fields, ...} as the network's reader gives it.
      params: our tree, of arrays or of trees.StoredArray; one layer of one leaf is held at a time.
      dtype: of the tensors; None keeps each leaf's.
      max_shard_bytes: of one weight file.
      done: is called with each tensor's name when it is written.
    """
    network = NETWORKS[kind]
    fields = dict(piece["model"])
    entries = network.entries(fields)
    check_params(kind, fields, params, str(folder))

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in table.to_tensors(entries, params, dtype=dtype):
            yield name, array
            done(name)

    config = network.write(piece)
    layout = table.layout(entries, params, dtype)
    if kind == "text_encoder":
        config["dtype"] = next(iter(layout.values())).dtype.name
    write_tensors(folder, layout, tensors(), basename=network.basename, max_shard_bytes=max_shard_bytes)
    write_json(folder / "config.json", config)


def check_params(kind: str, fields: Mapping[str, Any], params: Any, where: str) -> None:
    """Refuse a tree that is not the network's (InputError lists up to ten leaves)."""

    def flat(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {"/".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}

    expected, got = flat(NETWORKS[kind].shapes(dict(fields))), flat(params)
    if expected != got:
        wrong = [
            f"{name} is {got.get(name, 'missing')}, expected {expected.get(name, 'none')}"
            for name in sorted(expected.keys() | got.keys())
            if expected.get(name) != got.get(name)
        ]
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise InputError(f"{where}: the parameters are not those of this {kind}: {'; '.join(wrong[:10])}{more}")


def write_pipeline_files(folder: Path, pieces: Mapping[str, Any]) -> None:
    """model_index.json and the scheduler's folder."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    scheduler = configs.scheduler_to(pieces["scheduler"])
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": pieces["pipeline"],
        "_diffusers_version": configs.DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "tokenizer": ["transformers", "T5Tokenizer"],
        **{kind: [network.library, network.class_name] for kind, network in NETWORKS.items()},
    }
    write_json(folder / "model_index.json", index)
