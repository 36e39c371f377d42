"""The autoencoder against diffusers: whole, in chunks and in tiles."""

import numpy as np
import pytest

from cogvideox_jax.models import vae
from cogvideox_jax.models.convert import configs
from tests.models import folders as samples
from tests.parity.reference import close, config_of, float64, params_of, randomise

pytestmark = pytest.mark.parity

SIZES = {
    "four levels": dict(sample_height=96, sample_width=80),
    "other widths": dict(
        block_out_channels=[8, 8, 24, 16],
        layers_per_block=2,
        latent_channels=6,
        norm_num_groups=8,
        sample_height=96,
        sample_width=80,
    ),
}


@pytest.fixture(scope="module", params=[(size, seed) for size in SIZES for seed in (0, 1)], ids=str)
def pair(request, libraries):
    """(their module, our network, our parameters)."""
    size, seed = request.param
    module = libraries.diffusers.AutoencoderKLCogVideoX.from_config(samples.tiny_vae(**SIZES[size])).eval()
    randomise(module, seed)
    piece = configs.vae_from(config_of(module), "module")
    return module, vae.VAE(**piece["model"]), params_of("vae", piece["model"], module)


def moments(libraries, module, pixels: np.ndarray) -> np.ndarray:
    with libraries.torch.no_grad():
        found = module.encode(libraries.torch.from_numpy(pixels)).latent_dist
    return np.concatenate([found.mean.numpy(), found.logvar.numpy()], axis=1)


def encode(libraries, pair, frames, hw, tiles=None):
    """(ours, theirs, their input)."""
    module, model, params = pair
    pixels = np.random.default_rng(frames).uniform(-1, 1, size=(1, 3, frames, *hw)).astype(np.float32)
    module.use_tiling = bool(tiles)
    expected = moments(libraries, module, pixels)
    got = vae.encode(model, params, pixels.transpose(0, 2, 3, 4, 1), tile_sample_size=tiles)
    return np.concatenate([np.asarray(x) for x in got], axis=-1).transpose(0, 4, 1, 2, 3), expected, pixels


def decode(libraries, pair, frames, hw, tiles=None):
    """(ours, theirs, their input)."""
    module, model, params = pair
    torch = libraries.torch
    latents = np.random.default_rng(frames).normal(size=(1, model.latent_channels, frames, *hw)).astype(np.float32)
    module.use_tiling = bool(tiles)
    with torch.no_grad():
        expected = module.decode(torch.from_numpy(latents)).sample.numpy()
    got = vae.decode(model, params, latents.transpose(0, 2, 3, 4, 1), tile_sample_size=tiles)
    return np.asarray(got).transpose(0, 4, 1, 2, 3), expected, latents


@pytest.mark.parametrize("frames", [1, 8, 9, 17, 49])
def test_encode_in_chunks(libraries, pair, frames):
    got, expected, pixels = encode(libraries, pair, frames, (32, 24))
    exact = None
    if frames == 9:  # one length says what float32 costs
        with float64(libraries.torch, pair[0]) as wide:
            exact = moments(libraries, wide, pixels.astype(np.float64))
    close(got, expected, f"encode {frames}", exact=exact)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 13])
def test_decode_in_chunks(libraries, pair, frames):
    got, expected, latents = decode(libraries, pair, frames, (4, 3))
    exact = None
    if frames == 3:
        with float64(libraries.torch, pair[0]) as wide:
            exact = wide.decode(libraries.torch.from_numpy(latents).double()).sample.numpy()
    close(got, expected, f"decode {frames}", exact=exact)


def test_encode_in_tiles(libraries, pair):
    close(*encode(libraries, pair, 9, (64, 80), (96, 80))[:2], "encode 9 in tiles")


def test_decode_in_tiles(libraries, pair):
    close(*decode(libraries, pair, 3, (8, 10), (96, 80))[:2], "decode 3 in tiles")


def test_wrong_variants_are_caught(libraries, pair):
    """The bound is no formality: encoding whole clips instead of chunks is far above it."""
    module, model, params = pair
    pixels = np.random.default_rng(0).uniform(-1, 1, size=(1, 3, 17, 32, 24)).astype(np.float32)
    with libraries.torch.no_grad():
        module.use_tiling = False
        expected = module.encode(libraries.torch.from_numpy(pixels)).latent_dist.mean.numpy()
    whole, _ = vae.encode(model, params, pixels.transpose(0, 2, 3, 4, 1), chunk=None)
    with pytest.raises(AssertionError, match="of the rms"):
        close(np.asarray(whole).transpose(0, 4, 1, 2, 3), expected, "whole")
