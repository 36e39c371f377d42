"""The denoiser against diffusers, all five variants."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cogvideox_jax.core.rope import grid_positions
from cogvideox_jax.models.convert import folder
from cogvideox_jax.models.transformer import Transformer
from tests.models import folders as samples
from tests.parity.reference import close, config_of, params_of, randomise

pytestmark = pytest.mark.parity

# (dimensions, latent h x w, text tokens); the second has portrait latents, three heads of 32 and other widths throughout
SIZES = {
    "landscape": (dict(num_attention_heads=2, attention_head_dim=16, num_layers=2), (8, 12), 6),
    "portrait": (
        dict(
            num_attention_heads=3,
            attention_head_dim=32,
            num_layers=3,
            time_embed_dim=24,
            text_embed_dim=20,
            max_text_seq_length=11,
            norm_eps=1e-6,
            sample_height=12,
            sample_width=6,
            sample_frames=5,
        ),
        (12, 6),
        11,
    ),
}


def build(libraries, variant: str, size: str, seed: int):
    config = samples.tiny_transformer(variant) | SIZES[size][0]
    if config["ofs_embed_dim"]:
        config["ofs_embed_dim"] = config["time_embed_dim"]
    module = libraries.diffusers.CogVideoXTransformer3DModel.from_config(config).eval()
    randomise(module, seed)
    piece = folder.transformer_from(config_of(module), "module")
    return module, piece, params_of("transformer", piece["model"], module)


def positions(piece: dict, grid: tuple[int, int, int]) -> np.ndarray:
    """diffusers' rule: 1.0 fits the grid into the training's, 1.5 counts."""
    if piece["model"]["patch_size_t"] > 1:
        return grid_positions(*grid, rule="integer")
    return grid_positions(*grid, rule="linspace", base=(piece["sample_height"] // 2, piece["sample_width"] // 2))


def forward(libraries, variant, size, seed, frames, hw, text):
    torch = libraries.torch
    module, piece, params = build(libraries, variant, size, seed)
    model = Transformer(**piece["model"])
    rng = np.random.default_rng(seed + 100)
    latents = rng.normal(size=(2, frames, model.in_channels, *hw)).astype(np.float32)
    context = rng.normal(size=(2, text, model.text_dim)).astype(np.float32)
    timesteps, ofs = np.array([999, 37]), np.full((1,), 2.0, np.float32)
    rotary = None
    if model.position != "sincos":
        owner = SimpleNamespace(transformer=module, vae_scale_factor_spatial=8)
        rotary = libraries.diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings(
            owner, hw[0] * 8, hw[1] * 8, frames, torch.device("cpu")
        )
    with torch.no_grad():
        expected = module(
            torch.from_numpy(latents),
            torch.from_numpy(context),
            torch.from_numpy(timesteps),
            ofs=torch.from_numpy(ofs) if model.ofs_dim else None,
            image_rotary_emb=rotary,
        ).sample.numpy()
    grid = (frames // model.patch_size_t, hw[0] // 2, hw[1] // 2)
    got = jax.jit(model.apply)(
        {"params": params},
        latents.transpose(0, 1, 3, 4, 2),
        context,
        timesteps.astype(np.float32),
        positions(piece, grid),
        ofs=ofs if model.ofs_dim else None,
    )
    return np.asarray(got).transpose(0, 1, 4, 2, 3), expected


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", samples.VARIANTS)
def test_forward(libraries, variant, size, seed):
    settings, hw, text = SIZES[size]
    # the learned table has the rows of its own size
    frames = 4 if variant.startswith("1.5") else (settings.get("sample_frames", 9) - 1) // 4 + 1
    close(*forward(libraries, variant, size, seed, frames, hw, text), f"{variant} {size} seed {seed}")


@pytest.mark.parametrize("variant", ["2b", "5b", "1.5_5b", "1.5_5b_i2v"])
def test_other_lengths_and_sizes_than_the_training_s(libraries, variant):
    long = 6 if variant.startswith("1.5") else 5
    # the 2B model's table counts on all text tokens
    grids = [(2, (8, 12), 6 if variant == "2b" else 3), (long, (8, 12), 6)]
    # 1.5 takes a corner of the training grid, the others fit any grid into it
    grids += [(2, (6, 4), 6)] if variant.startswith("1.5") else [(1, (14, 6), 6), (3, (6, 16), 6)]
    for frames, hw, text in grids:
        got, expected = forward(libraries, variant, "landscape", 0, frames, hw, text)
        close(got, expected, f"{variant} {frames}x{hw[0]}x{hw[1]}, {text} text tokens")
