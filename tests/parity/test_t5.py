"""The text encoder and its tokenizer against transformers."""

import json

import numpy as np
import pytest

from cogvideox_jax.models import t5
from cogvideox_jax.models.convert import configs, folder
from data.transforms import Tokenizer
from tests.models import folders as samples
from tests.parity.reference import close, float64, params_of, randomise

pytestmark = pytest.mark.parity

SIZES = {
    "small": dict(vocab_size=100, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=2),
    # heads times head_dim is not the width
    "wide": dict(vocab_size=64, d_model=48, d_kv=16, d_ff=64, num_layers=3, num_heads=5),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [9, 200])  # the longer one reaches the last position bucket
def test_encoder(libraries, size, seed, length):
    config = libraries.transformers.T5Config(feed_forward_proj="gated-gelu", **SIZES[size])
    module = libraries.transformers.T5EncoderModel(config).eval()
    randomise(module, seed)
    fields = configs.t5_from(json.loads(config.to_json_string(use_diff=False)), "module")["model"]
    model, params = t5.T5Encoder(**fields), params_of("text_encoder", fields, module)
    ids = np.random.default_rng(seed).integers(0, fields["vocab_size"], size=(2, length))
    mask = np.arange(length)[None] < np.array([[length - 3], [length // 2]])
    torch = libraries.torch
    for given in (None, mask):
        # without one transformers attends everywhere, as CogVideoX does
        asked = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": None if given is None else torch.from_numpy(given.astype(np.int64)),
        }
        with torch.no_grad():
            expected = module(**asked).last_hidden_state.numpy()
        with float64(torch, module) as wide:
            exact = wide(**asked).last_hidden_state.numpy()
        got = t5.encode(model, params, ids.astype(np.int32), given)
        what = f"T5 {size} seed {seed}, {length} tokens, {'no mask' if given is None else 'mask'}"
        close(got, expected, what, exact=exact)


def test_config(libraries):
    """What we write is read as the same encoder, and nothing in it is left to a default."""
    piece = configs.t5_from(samples.config("t5_v1_1_xxl_encoder"), "x")
    config = libraries.transformers.T5Config(**configs.t5_to(piece))
    for name, value in samples.manifest("t5_v1_1_xxl_encoder")["config"].items():
        assert getattr(config, name) == value, name
    assert (config.dense_act_fn, config.is_gated_act) == ("gelu_new", True)


def test_tokenizer(libraries, tmp_path):
    texts = [
        "A panda plays the guitar in a bamboo forest.",
        "",
        "  spaces   everywhere\tand a\nnew line ",
        "Größe, naïve café, 東京 and ½ — “quotes”",
        "word " * 60,
        "translate English to German: That is good.",
    ]
    folder.write_tokenizer(samples.VOCABULARY, tmp_path, 48)
    theirs = libraries.transformers.T5Tokenizer.from_pretrained(tmp_path)
    rows = theirs(texts, padding="max_length", max_length=48, truncation=True, add_special_tokens=True).input_ids
    np.testing.assert_array_equal(Tokenizer(samples.VOCABULARY, 48)(texts), rows)
