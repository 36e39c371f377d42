"""The denoiser against diffusers, all five variants."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from cogvideox_jax.core.rope import grid_positions
from cogvideox_jax.models.convert import configs
from cogvideox_jax.models.transformer import Transformer
from tests.models import folders as samples
from tests.parity.reference import close, config_of, float64, params_of, randomise

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
    piece = configs.transformer_from(config_of(module), "module")
    return module, piece, params_of("transformer", piece["model"], module)


def positions(piece: dict, grid: tuple[int, int, int]) -> np.ndarray:
    """diffusers' rule: 1.0 fits the grid into the training's, 1.5 counts."""
    if piece["model"]["patch_size_t"] > 1:
        return grid_positions(*grid, rule="integer")
    return grid_positions(*grid, rule="linspace", base=(piece["sample_height"] // 2, piece["sample_width"] // 2))


class Case(NamedTuple):
    """Both networks and what they are given; arrays in diffusers' layout (b, t, c, h, w)."""

    module: Any
    piece: dict[str, Any]
    params: Any
    latents: np.ndarray
    context: np.ndarray
    timesteps: np.ndarray
    ofs: np.ndarray | None
    rotary: Any
    positions: np.ndarray

    @property
    def model(self) -> Transformer:
        return Transformer(**self.piece["model"])


def case(libraries, variant: str, size: str, seed: int, frames=None, hw=None, text=None, batch=2) -> Case:
    """Random inputs of the size that the network was trained at, or of another one."""
    settings, trained_hw, trained_text = SIZES[size]
    # the learned table has the rows of its own size
    frames = frames or (4 if variant.startswith("1.5") else (settings.get("sample_frames", 9) - 1) // 4 + 1)
    hw, text = hw or trained_hw, text or trained_text
    module, piece, params = build(libraries, variant, size, seed)
    model = Transformer(**piece["model"])
    rng = np.random.default_rng(seed + 100)
    rotary = None
    if model.position != "sincos":
        owner = SimpleNamespace(transformer=module, vae_scale_factor_spatial=8)
        rotary = libraries.diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings(
            owner, hw[0] * 8, hw[1] * 8, frames, libraries.torch.device("cpu")
        )
    return Case(
        module,
        piece,
        params,
        latents=rng.normal(size=(batch, frames, model.in_channels, *hw)).astype(np.float32),
        context=rng.normal(size=(batch, text, model.text_dim)).astype(np.float32),
        timesteps=np.linspace(999, 37, batch).astype(np.int64),
        ofs=np.full((1,), 2.0, np.float32) if model.ofs_dim else None,
        rotary=rotary,
        positions=positions(piece, (frames // model.patch_size_t, hw[0] // 2, hw[1] // 2)),
    )


def theirs(torch, given: Case, module=None, latents=None, context=None, timesteps=None):
    """Their prediction as a tensor, of the case's inputs or of other tensors."""
    return (module or given.module)(
        torch.from_numpy(given.latents) if latents is None else latents,
        torch.from_numpy(given.context) if context is None else context,
        torch.from_numpy(given.timesteps) if timesteps is None else timesteps,
        ofs=None if given.ofs is None else torch.from_numpy(given.ofs),
        image_rotary_emb=given.rotary,
    ).sample


def in_float64(torch, given: Case) -> np.ndarray:
    with float64(torch, given.module) as module:
        latents, context = (torch.from_numpy(x).double() for x in (given.latents, given.context))
        return theirs(torch, given, module, latents, context).numpy()


def forward(libraries, given: Case) -> tuple[np.ndarray, np.ndarray]:
    """(ours, theirs)."""
    with libraries.torch.no_grad():
        expected = theirs(libraries.torch, given).numpy()
    got = jax.jit(given.model.apply)(
        {"params": given.params},
        given.latents.transpose(0, 1, 3, 4, 2),
        given.context,
        given.timesteps.astype(np.float32),
        given.positions,
        ofs=given.ofs,
    )
    return np.asarray(got).transpose(0, 1, 4, 2, 3), expected


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", samples.VARIANTS)
def test_forward(libraries, variant, size, seed):
    given = case(libraries, variant, size, seed)
    exact = in_float64(libraries.torch, given)
    close(*forward(libraries, given), f"transformer {variant} {size} seed {seed}", exact=exact)


@pytest.mark.parametrize("variant", ["2b", "5b", "1.5_5b", "1.5_5b_i2v"])
def test_other_lengths_and_sizes_than_the_training_s(libraries, variant):
    long = 6 if variant.startswith("1.5") else 5
    # the 2B model's table counts on all text tokens
    grids = [(2, (8, 12), 6 if variant == "2b" else 3), (long, (8, 12), 6)]
    # 1.5 takes a corner of the training grid, the others fit any grid into it
    grids += [(2, (6, 4), 6)] if variant.startswith("1.5") else [(1, (14, 6), 6), (3, (6, 16), 6)]
    for frames, hw, text in grids:
        given = case(libraries, variant, "landscape", 0, frames, hw, text)
        close(*forward(libraries, given), f"{variant} {frames}x{hw[0]}x{hw[1]}, {text} text tokens")
