"""Small diffusers folders, written without the code under test: the configs are the reference's own (manifests/), shrunk."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cogvideox_jax.models.convert import folder, table

MANIFESTS = Path(__file__).parent / "manifests"
VARIANTS = ("2b", "5b", "5b_i2v", "1.5_5b", "1.5_5b_i2v")
VOCABULARY = Path(__file__).parents[2] / "data" / "vocab" / "t5_spiece.model"
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int8": "I8", "int64": "I64"}


def manifest(name: str) -> dict[str, Any]:
    return json.loads((MANIFESTS / f"{name}.json").read_text())


def config(name: str, **changes: Any) -> dict[str, Any]:
    """config.json as the reference wrote it."""
    found = {key: value for key, value in manifest(name)["config"].items() if not key.startswith("_")}
    if name.startswith("t5"):
        found |= {"model_type": "t5", "architectures": ["T5EncoderModel"], "is_encoder_decoder": True}
    else:
        kind = "AutoencoderKLCogVideoX" if name == "vae" else "CogVideoXTransformer3DModel"
        found |= {"_class_name": kind, "_diffusers_version": "0.42.1"}
    return found | changes


def tiny_transformer(variant: str) -> dict[str, Any]:
    """One of the five, 32 wide."""
    full = config(f"transformer_{variant}")
    small = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "in_channels": full["in_channels"] // 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 12,
        "max_text_seq_length": 6,
        "sample_height": 8,
        "sample_width": 12,
        "sample_frames": 9,
    }
    if full["ofs_embed_dim"]:
        small["ofs_embed_dim"] = 8
    return full | small


def tiny_vae(**changes: Any) -> dict[str, Any]:
    small = {"block_out_channels": [8, 16, 16, 32], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
    return config("vae") | small | changes


def tiny_t5() -> dict[str, Any]:
    return config("t5_v1_1_xxl_encoder", d_model=12, d_kv=8, d_ff=20, num_layers=2, num_heads=2)


def safetensors(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """The format, from its description."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, array in tensors.items():
        stop = len(data) + array.nbytes
        dtype = NAMES[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), stop]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def read(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """name -> (dtype, shape, bytes) of a file, or of all the files of a folder."""
    if path.is_dir():
        return {name: row for part in sorted(path.glob("*.safetensors")) for name, row in read(part).items()}
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    data = raw[8 + length :]
    return {name: (row["dtype"], row["shape"], data[slice(*row["data_offsets"])]) for name, row in header.items()}


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Values of which none is zero or one: norms and biases count."""
    rng = np.random.default_rng(seed)
    return {name: (rng.normal(size=shape) * 0.3 + 0.1).astype(dtype) for name, shape in shapes.items()}


def write_network(
    folder: Path, basename: str, settings: dict[str, Any], tensors: dict[str, np.ndarray], *, shards: int = 1
) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    if shards == 1:
        (folder / f"{basename}.safetensors").write_bytes(safetensors(tensors, {"format": "pt"}))
        return
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"{basename}-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        (folder / file).write_bytes(safetensors(part, {"format": "pt"}))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
    (folder / f"{basename}.safetensors.index.json").write_text(json.dumps(index))


def scheduler(**changes: Any) -> dict[str, Any]:
    return {
        "_class_name": "CogVideoXDDIMScheduler",
        "_diffusers_version": "0.30.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "snr_shift_scale": 3.0,
        "steps_offset": 0,
        "timestep_spacing": "linspace",
        "trained_betas": None,
    } | changes


INDEX = {
    "_class_name": "CogVideoXPipeline",
    "_diffusers_version": "0.30.0.dev0",
    "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLCogVideoX"],
}


def write_pipeline(root: Path, variant: str = "2b", dtype: Any = ml_dtypes.bfloat16, *, shards: int = 2) -> Path:
    """A whole pipeline's folder with random weights."""
    settings = {"transformer": tiny_transformer(variant), "vae": tiny_vae(), "text_encoder": tiny_t5()}
    for seed, (kind, values) in enumerate(settings.items()):
        network = folder.NETWORKS[kind]
        fields = network.read(values, "test")["model"]
        specs = table.layout(network.entries(fields), network.shapes(fields))
        tensors = random_tensors({name: spec.shape for name, spec in specs.items()}, dtype, seed)
        write_network(root / kind, network.basename, values, tensors, shards=shards if kind != "vae" else 1)
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler()))
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "spiece.model").write_bytes(VOCABULARY.read_bytes())
    (root / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    index = dict(INDEX)
    if variant.endswith("i2v"):
        index["_class_name"] = "CogVideoXImageToVideoPipeline"
    (root / "model_index.json").write_text(json.dumps(index))
    return root
