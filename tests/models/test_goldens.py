"""Outputs of the reference on deterministic weights (spec 11.2, 11.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox_jax.core.rope import grid_positions
from cogvideox_jax.models import transformer, vae
from cogvideox_jax.models.convert import table
from cogvideox_jax.models.convert import transformer as transformer_names
from cogvideox_jax.models.convert import vae as vae_names
from tests.models.filler import inputs, state_dict, summary

TINY = dict(
    num_layers=2, num_heads=2, head_dim=16, in_channels=4, out_channels=4, time_dim=8, text_dim=12, max_text_tokens=6
)
TRANSFORMERS = {
    "A": (
        dict(position="sincos"),
        64,
        "4956846e-7 44.697601 2.979081 2.236107 .596258 1.911056 .680952 -.270241 -.951338 -.287653 -.879956",
    ),
    "B": (
        dict(position="rope"),
        64,
        ".0076231 19.007517 1.412414 .329158 .039169 -.293850 .555260 -.235288 -.451288 -.263598 -.735803",
    ),
    "C": (
        dict(position="rope+learned", in_channels=8, learned_grid=(3, 4, 4)),
        65,
        "-.0116405 40.284169 2.886629 -1.001406 1.230569 -.698453 .225084 .569243 -.520950 -.749504 .426167",
    ),
    "D": (
        dict(position="rope", patch_size_t=2),
        64,
        "-.0030308 31.318733 2.945329 .066064 -.075068 -.523003 .851239 .851373 .139745 -.065220 -.225767",
    ),
    "E": (
        dict(position="rope", patch_size_t=2, in_channels=8, ofs_dim=8),
        68,
        "-.0010757 50.325169 3.286353 -.388760 -1.068683 -.320077 .224929 .885045 -.342724 2.250704 -.309280",
    ),
}


def load(model, entries, init_shapes):
    """Fill the network through its name table, as if the tensors came from a file."""
    theirs = {
        key: value.shape
        for key, value in table.to_tensors(entries, jax.tree.map(lambda s: np.zeros(s.shape), init_shapes))
    }
    return table.to_params(entries, state_dict(theirs), init_shapes)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer(name):
    fields, num_tensors, golden = TRANSFORMERS[name]
    model = transformer.Transformer(**TINY | fields)
    frames = 4 if model.patch_size_t == 2 else 3
    shapes = jax.eval_shape(lambda key: transformer.init(model, key, (frames, 8, 8)), jax.random.key(0))
    entries = transformer_names.diffusers_names(model)
    assert len(entries) == num_tensors
    latents = inputs((2, frames, model.in_channels, 8, 8), 1000).transpose(0, 1, 3, 4, 2)
    out = model.apply(
        {"params": load(model, entries, shapes)},
        latents,
        inputs((2, 6, 12), 1001),
        jnp.array([999.0, 19.0]),
        # at the training size both position rules give the same grid
        grid_positions(frames // model.patch_size_t, 4, 4, rule="linspace", base=(4, 4)),
        ofs=jnp.full((1,), 2.0) if model.ofs_dim else None,
    )
    got = summary(np.asarray(out).transpose(0, 1, 4, 2, 3))
    np.testing.assert_allclose(got, [float(v) for v in golden.split()], atol=1e-4)


VAE = vae.VAE(channels=(8, 16, 16, 32), layers_per_block=1, latent_channels=4, groups=4)
VAE_GOLDENS = {
    "encode 1": "0680952e-7 5.377738 1.814063 .514203 1.439785 .738295 -.206199 -1.240735 .155192 .556870 -.201769",
    "encode 9": ".0279035 5.701369 1.269625 .236870 .055015 .048087 .113567 -1.211573 -.562596 -.700553 -.450768",
    "encode 17": "-.0341330 11.618399 2.161331 .022926 .044342 -.120495 .332994 .351723 -.043846 .443001 -.344436",
    "encode 17 whole": "-.0410309 11.002936 2.276824 -.040927 -.057640 -.145860 .040094 1.802236 .539122 .949415 -.529662",
    "decode 1": "-.0110332 2.938570 .308408 -.034018 -.052404 -.059203 -.061470 .019841 .019489 .017211 .019665",
    "decode 3": ".0061984 19.368808 1.151024 -.040204 -.074233 -.074033 -.073544 .082586 .056481 .027536 -.014014",
    "decode 5": ".0148236 25.666608 2.034194 .002692 -.002184 -.002824 -.004790 -.006771 -.006604 -.003314 .002582",
    "decode 3 large": ".0059437 83.583332 3.231038 .029973 .041117 .039066 .038998 .053330 .049924 .050009 .050171",
    "decode 3 tiled": ".0081798 88.694505 3.509906 .030123 .041680 .039027 .038908 .066884 .057892 .053369 .051450",
    "encode 9 tiled": "-.0221729 41.627803 4.192956 -.259996 -1.545947 -1.161741 .393084 1.197939 .518940 -.464724 .857260",
}


@pytest.fixture(scope="module")
def vae_params():
    shapes = jax.eval_shape(lambda key: VAE.init(key, jnp.zeros((1, 5, 16, 16, 3))), jax.random.key(0))["params"]
    entries = vae_names.diffusers_names(VAE)
    assert len(entries) == 244
    return load(VAE, entries, shapes)


@pytest.mark.parametrize("name", VAE_GOLDENS)
def test_vae(name, vae_params):
    kind, length, *how = name.split()
    length = int(length)
    large = "large" in how or "tiled" in how
    tiles = (96, 80) if "tiled" in how else None
    if kind == "encode":
        size = (64, 80) if large else (16, 24)
        pixels = inputs((1, 3, length, *size), 1002).transpose(0, 2, 3, 4, 1)
        chunk = None if "whole" in how else 8
        out = np.concatenate(vae.encode(VAE, vae_params, pixels, chunk=chunk, tile_sample_size=tiles), axis=-1)
    else:
        size = (8, 10) if large else (2, 3)
        latents = inputs((1, 4, length, *size), 1003).transpose(0, 2, 3, 4, 1)
        out = np.asarray(vae.decode(VAE, vae_params, latents, tile_sample_size=tiles))
    got = summary(out.transpose(0, 4, 1, 2, 3))
    np.testing.assert_allclose(got, [float(v) for v in VAE_GOLDENS[name].split()], atol=2e-4)
