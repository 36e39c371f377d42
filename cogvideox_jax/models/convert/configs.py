"""What each config.json of a diffusers folder says, read into our networks' fields and written from them (spec 1.1-1.5).

A config is read key by key: what our networks can vary becomes a field, what they cannot must have the value that they have,
and a key that nobody knows is refused, because ignoring it could change the numbers.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.core.video import TIME_FACTOR, latent_frames
from cogvideox_jax.models import t5, transformer, vae

DIFFUSERS_VERSION = "0.42.1"  # whose classes and config keys these are
SAMPLERS = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}


class Free(NamedTuple):
    """A key that may have any value of the types; the first is diffusers' default."""

    default: Any
    types: tuple[type, ...]


_INT, _FLOAT, _BOOL = (int,), (int, float), (bool,)
# every key of the config, in diffusers' order: a plain value is the only one that our network has
TRANSFORMER_KEYS: dict[str, Any] = {
    "num_attention_heads": Free(30, _INT),
    "attention_head_dim": Free(64, _INT),
    "in_channels": Free(16, _INT),
    "out_channels": Free(16, _INT),
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "time_embed_dim": Free(512, _INT),
    "ofs_embed_dim": Free(None, (int, type(None))),
    "text_embed_dim": Free(4096, _INT),
    "num_layers": Free(30, _INT),
    "dropout": 0.0,
    "attention_bias": True,
    "sample_width": Free(90, _INT),
    "sample_height": Free(60, _INT),
    "sample_frames": Free(49, _INT),
    "patch_size": 2,
    "patch_size_t": Free(None, (int, type(None))),
    "temporal_compression_ratio": TIME_FACTOR,
    "max_text_seq_length": Free(226, _INT),
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "norm_elementwise_affine": True,
    "norm_eps": Free(1e-5, _FLOAT),
    "spatial_interpolation_scale": Free(1.875, _FLOAT),
    "temporal_interpolation_scale": 1.0,
    "use_rotary_positional_embeddings": Free(False, _BOOL),
    "use_learned_positional_embeddings": Free(False, _BOOL),
    "patch_bias": Free(True, _BOOL),
}
_DOWN, _UP = "CogVideoXDownBlock3D", "CogVideoXUpBlock3D"
VAE_KEYS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": [_DOWN] * 4,
    "up_block_types": [_UP] * 4,
    "block_out_channels": Free([128, 256, 256, 512], (list,)),
    "latent_channels": Free(16, _INT),
    "layers_per_block": Free(3, _INT),
    "act_fn": "silu",
    "norm_eps": 1e-6,
    "norm_num_groups": Free(32, _INT),
    "temporal_compression_ratio": TIME_FACTOR,
    "sample_height": Free(480, _INT),
    "sample_width": Free(720, _INT),
    "scaling_factor": Free(1.15258426, _FLOAT),
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": Free(True, (bool, int, float)),  # read by no CogVideoX pipeline
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "invert_scale_latents": Free(False, _BOOL),
}
# Keys of a transformers config that decide the encoder's arithmetic. The others (decoder, generation, versions) do not, and
# change from release to release: they are not looked at.
T5_KEYS: dict[str, Any] = {
    "model_type": "t5",
    "vocab_size": Free(32128, _INT),
    "d_model": Free(512, _INT),
    "d_kv": Free(64, _INT),
    "d_ff": Free(2048, _INT),
    "num_layers": Free(6, _INT),
    "num_heads": Free(8, _INT),
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}
SCHEDULER_KEYS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "v_prediction",
    "clip_sample_range": Free(1.0, _FLOAT),  # of clip_sample
    "sample_max_value": Free(1.0, _FLOAT),  # of thresholding, which these schedulers do not have
    # the published configs differ, and the published scripts all set trailing, which is what our samplers do
    "timestep_spacing": Free("trailing", (str,)),
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": Free(3.0, _FLOAT),
}
# diffusers' defaults, which a config that leaves a key out means, where they are not the published models' values
_SCHEDULER_DEFAULTS = {"clip_sample": True, "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
_SCHEDULER_DEFAULTS |= {"timestep_spacing": "leading"}
_T5_DEFAULTS = {"feed_forward_proj": "relu", "model_type": None}


def values(
    config: Mapping[str, Any],
    keys: Mapping[str, Any],
    where: str,
    *,
    defaults: Mapping[str, Any] | None = None,
    closed: bool = True,
) -> dict[str, Any]:
    """Every key's value, the default where the config leaves it out.

    Raises InputError naming the key and its value: an unknown key (where `closed`), another type, or a value that our
    network does not have.
    """
    for name in sorted(config.keys() - keys.keys()):
        if closed and not name.startswith("_"):
            near = difflib.get_close_matches(name, keys, 1)
            hint = f" (nearest: {near[0]})" if near else ""
            value = repr(config[name])[:80]
            raise InputError(f"{where}: unknown key {name} = {value}{hint}: remove it if it changes no number")
    found = {}
    for name, known in keys.items():
        free = known if isinstance(known, Free) else None
        default = (defaults or {}).get(name, free.default if free else known)
        value = config.get(name, default)
        if free is None and value != known:
            raise InputError(f"{where}: {name} = {repr(value)[:80]} is not supported, expected {known!r}")
        is_number = type(value) in (int, float)
        if free and (type(value) not in free.types or (is_number and not 0 < value < math.inf)):
            kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in free.types)
            above = ", above zero" if int in free.types else ""
            raise InputError(f"{where}: {name} = {repr(value)[:80]}, expected {kinds}{above}")
        found[name] = value
    return found


def class_name(config: Mapping[str, Any], expected: tuple[str, ...], where: str) -> str:
    """The class that a config names. Raises InputError where it is none of the expected ones."""
    name = config.get("_class_name")
    if name not in expected:
        raise InputError(f"{where}: _class_name = {name!r}, expected {' or '.join(expected)}")
    return name


def transformer_from(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """transformer/config.json -> {"model": fields of Transformer, "sample_height", "sample_width", "sample_frames"}.

    The sample sizes are the training's: height and width in latents, frames in pixels. diffusers fits its rotary positions
    to them, and the learned table of 5B-I2V has just that many rows.
    """
    class_name(config, ("CogVideoXTransformer3DModel",), where)
    v = values(config, TRANSFORMER_KEYS, where)
    if v["patch_size_t"] == 1:
        raise InputError(f"{where}: patch_size_t = 1 is not supported, expected null or 2: no public model has it")
    if v["ofs_embed_dim"] not in (None, v["time_embed_dim"]):
        raise InputError(
            f"{where}: ofs_embed_dim = {v['ofs_embed_dim']}, expected null or time_embed_dim, to which it is added"
        )
    if not v["patch_bias"] and v["patch_size_t"] is None:
        raise InputError(f"{where}: patch_bias = False is not supported with patch_size_t = null, expected True")
    rotary, learned = v["use_rotary_positional_embeddings"], v["use_learned_positional_embeddings"]
    if learned and (not rotary or v["patch_size_t"]):
        raise InputError(
            f"{where}: use_learned_positional_embeddings = True is supported only with rotary ones and without patch_size_t"
        )
    if learned and (v["sample_frames"] % TIME_FACTOR != 1 or v["sample_height"] % 2 or v["sample_width"] % 2):
        size = f"{v['sample_frames']}, {v['sample_height']}, {v['sample_width']}"
        raise InputError(
            f"{where}: sample_frames, sample_height, sample_width = {size}, expected 4k+1 and even numbers"
        )
    grid = (
        (latent_frames(v["sample_frames"]), v["sample_height"] // 2, v["sample_width"] // 2) if learned else (0, 0, 0)
    )
    fields = {
        "num_layers": v["num_layers"],
        "num_heads": v["num_attention_heads"],
        "position": "rope+learned" if learned else "rope" if rotary else "sincos",
        "head_dim": v["attention_head_dim"],
        "patch_size": v["patch_size"],
        "patch_size_t": v["patch_size_t"] or 1,
        "in_channels": v["in_channels"],
        "out_channels": v["out_channels"],
        "text_dim": v["text_embed_dim"],
        "max_text_tokens": v["max_text_seq_length"],
        "time_dim": v["time_embed_dim"],
        "ofs_dim": v["ofs_embed_dim"] or 0,
        "learned_grid": grid,
        "spatial_scale": v["spatial_interpolation_scale"],
        "epsilon": v["norm_eps"],
    }
    if v["attention_head_dim"] % 16:
        raise InputError(f"{where}: attention_head_dim = {v['attention_head_dim']}, expected a multiple of 16")
    return {"model": fields, **{name: v[name] for name in ("sample_height", "sample_width", "sample_frames")}}


def transformer_to(piece: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `transformer_from`: every key that diffusers writes."""
    model = transformer.Transformer(**piece["model"])
    if model.patch_size != 2:
        raise InputError(f"patch_size = {model.patch_size} cannot be exported, diffusers' layout here is that of 2")
    learned = model.position == "rope+learned"
    free = {
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.head_dim,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "time_embed_dim": model.time_dim,
        "ofs_embed_dim": model.ofs_dim or None,
        "text_embed_dim": model.text_dim,
        "num_layers": model.num_layers,
        "sample_width": model.learned_grid[2] * 2 if learned else piece["sample_width"],
        "sample_height": model.learned_grid[1] * 2 if learned else piece["sample_height"],
        "sample_frames": (model.learned_grid[0] - 1) * TIME_FACTOR + 1 if learned else piece["sample_frames"],
        "patch_size_t": model.patch_size_t if model.patch_size_t > 1 else None,
        "max_text_seq_length": model.max_text_tokens,
        "norm_eps": model.epsilon,
        "spatial_interpolation_scale": model.spatial_scale,
        "use_rotary_positional_embeddings": model.position != "sincos",
        "use_learned_positional_embeddings": learned,
        # the 1.5 files say false, although their patch embedding has a bias
        "patch_bias": model.patch_size_t == 1,
    }
    return _filled("CogVideoXTransformer3DModel", TRANSFORMER_KEYS, free)


def _filled(class_name: str, keys: Mapping[str, Any], free: Mapping[str, Any]) -> dict[str, Any]:
    config = {name: free.get(name, key.default if isinstance(key, Free) else key) for name, key in keys.items()}
    return {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION, **config}


_VAE_EXTRAS = ("scaling_factor", "invert_scale_latents", "sample_height", "sample_width")


def vae_from(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """vae/config.json -> {"model": fields of VAE, "scaling_factor", "invert_scale_latents", "sample_height", "sample_width"}.

    The sample size, in pixels, is what tile sizes are derived from.
    """
    class_name(config, ("AutoencoderKLCogVideoX",), where)
    v = values(config, VAE_KEYS, where)
    channels, groups = v["block_out_channels"], v["norm_num_groups"]
    if len(channels) != 4 or not all(type(c) is int and c > 0 and c % groups == 0 for c in channels):
        raise InputError(
            f"{where}: block_out_channels = {channels}, expected four multiples of norm_num_groups = {groups}"
        )
    fields = {
        "channels": tuple(channels),
        "layers_per_block": v["layers_per_block"],
        "latent_channels": v["latent_channels"],
        "groups": groups,
    }
    return {"model": fields, **{name: v[name] for name in _VAE_EXTRAS}}


def vae_to(piece: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `vae_from`."""
    model = vae.VAE(**piece["model"])
    free = {
        "block_out_channels": list(model.channels),
        "latent_channels": model.latent_channels,
        "layers_per_block": model.layers_per_block,
        "norm_num_groups": model.groups,
        **{name: piece[name] for name in _VAE_EXTRAS},
    }
    return _filled("AutoencoderKLCogVideoX", VAE_KEYS, free)


def t5_from(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """text_encoder/config.json -> {"model": fields of T5Encoder}."""
    v = values(config, T5_KEYS, where, defaults=_T5_DEFAULTS, closed=False)
    return {
        "model": {
            "num_layers": v["num_layers"],
            "width": v["d_model"],
            "num_heads": v["num_heads"],
            "head_dim": v["d_kv"],
            "mlp_dim": v["d_ff"],
            "vocab_size": v["vocab_size"],
        }
    }


def t5_to(piece: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `t5_from`, with the keys beside it that the published text encoders carry."""
    model = t5.T5Encoder(**piece["model"])
    free = {
        "vocab_size": model.vocab_size,
        "d_model": model.width,
        "d_kv": model.head_dim,
        "d_ff": model.mlp_dim,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
    }
    config = _filled("", T5_KEYS, free)
    del config["_class_name"], config["_diffusers_version"]
    return config | {
        "architectures": ["T5EncoderModel"],
        "classifier_dropout": 0.0,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "num_decoder_layers": model.num_layers,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def scheduler_from(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """scheduler_config.json -> {"sampler": "ddim" or "dpm", "snr_shift_scale", "timestep_spacing"}."""
    name = class_name(config, tuple(SAMPLERS.values()), where)
    v = values(config, SCHEDULER_KEYS, where, defaults=_SCHEDULER_DEFAULTS)
    if v["timestep_spacing"] not in ("trailing", "linspace", "leading"):
        raise InputError(
            f"{where}: timestep_spacing = {v['timestep_spacing']!r}, expected trailing, linspace or leading"
        )
    sampler = next(key for key, value in SAMPLERS.items() if value == name)
    return {"sampler": sampler, "snr_shift_scale": v["snr_shift_scale"], "timestep_spacing": v["timestep_spacing"]}


def scheduler_to(piece: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `scheduler_from`."""
    free = {name: piece[name] for name in ("snr_shift_scale", "timestep_spacing")}
    return _filled(SAMPLERS[piece["sampler"]], SCHEDULER_KEYS, free)
