"""Full-size networks by shape alone: the public models' parameter and tensor counts (spec section 0)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox_jax.models import t5, transformer, vae
from cogvideox_jax.models.convert import t5 as t5_names
from cogvideox_jax.models.convert import transformer as transformer_names
from cogvideox_jax.models.convert import vae as vae_names
from configs import models


def count(shapes) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("variant", "parameters", "tensors"),
    [
        ("2b", 1_693_783_872, 736),
        ("5b", 5_570_283_072, 1024),
        ("5b-i2v", 5_625_087_552, 1025),
        ("1.5-5b", 5_570_676_352, 1024),
        ("1.5-5b-i2v", 5_571_594_880, 1028),
    ],
)
def test_transformer(variant, parameters, tensors):
    model = transformer.Transformer(**models.TRANSFORMERS[variant])
    shapes = jax.eval_shape(lambda key: transformer.init(model, key, (4, 60, 90)), jax.random.key(0))
    assert count(shapes) == parameters
    names = {entry.theirs for entry in transformer_names.diffusers_names(model)}
    assert len(names) == tensors
    tokens = transformer.num_tokens(model, (42, 96, 170) if model.patch_size_t == 2 else (13, 60, 90))
    assert tokens == (85_904 if model.patch_size_t == 2 else 17_776)


def test_vae():
    model = vae.VAE(**models.VAES["cogvideox"])
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 5, 16, 16, 3))), jax.random.key(0))["params"]
    assert count(shapes["encoder"]) == 92_215_456
    assert count(shapes["decoder"]) == 123_368_451
    assert len({entry.theirs for entry in vae_names.diffusers_names(model)}) == 436


def test_t5():
    model = t5.T5Encoder(**models.T5["xxl"])
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 8), jnp.int32)), jax.random.key(0))["params"]
    assert count(shapes) == 4_762_310_656
    assert len({entry.theirs for entry in t5_names.huggingface_names(model)}) == 1 + 1 + 24 * 9 + 1
