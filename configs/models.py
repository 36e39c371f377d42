"""The networks' presets: what goes into config.model, field by field."""

from typing import Any

_5B = {"num_layers": 42, "num_heads": 48, "position": "rope"}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "2b": {"num_layers": 30, "num_heads": 30, "position": "sincos"},
    "5b": _5B,
    "5b-i2v": {**_5B, "position": "rope+learned", "in_channels": 32, "learned_grid": (13, 30, 45)},
    "1.5-5b": {**_5B, "patch_size_t": 2, "max_text_tokens": 224},
    "1.5-5b-i2v": {**_5B, "patch_size_t": 2, "in_channels": 32, "ofs_dim": 512, "max_text_tokens": 224},
    "tiny": {
        "num_layers": 4,
        "num_heads": 4,
        "position": "rope",
        "head_dim": 32,
        "time_dim": 128,
        "text_dim": 64,
        "max_text_tokens": 48,
    },
}
SNR_SHIFT = {"2b": 3.0, "5b": 1.0, "5b-i2v": 1.0, "1.5-5b": 1.0, "1.5-5b-i2v": 1.0, "tiny": 1.0}

VAES: dict[str, dict[str, Any]] = {
    "cogvideox": {"channels": (128, 256, 256, 512), "layers_per_block": 3, "latent_channels": 16, "groups": 32},
    "tiny": {"channels": (8, 16, 32, 64), "layers_per_block": 1, "latent_channels": 16, "groups": 2},
}

T5: dict[str, dict[str, Any]] = {
    "xxl": {"num_layers": 24, "width": 4096, "num_heads": 64, "head_dim": 64, "mlp_dim": 10240},
    "tiny": {"num_layers": 2, "width": 64, "num_heads": 4, "head_dim": 16, "mlp_dim": 128},
}
