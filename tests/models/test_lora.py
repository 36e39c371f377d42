"""LoRA: what is applied, what is merged and what is written agree, and what is not one of ours is refused by name."""

import functools
import json
import os
import pickle
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.core.rope import grid_positions
from cogvideox_jax.models import lora, transformer
from cogvideox_jax.models.convert import files
from cogvideox_jax.models.convert import lora as lora_files
from tests.models.folders import read as read_raw
from tests.models.folders import safetensors

FIELDS = dict(
    num_layers=3, num_heads=2, head_dim=16, in_channels=4, out_channels=4, time_dim=8, text_dim=12, max_text_tokens=6
)
MODEL = transformer.Transformer(**FIELDS)
WIDTH, LAYERS, RANK = 32, 3, 4
SIZE = (2, 4, 4)


def random_like(tree, seed: int):
    """Random leaves: zero gates and zero b would hide what is looked for, and so would heads that attend evenly."""
    rng = np.random.default_rng(seed)

    def values(path, leaf):
        x = rng.normal(size=leaf.shape)
        name = path[-1].key
        x = 1.5 + 0.3 * x if name == "scale" else 0.3 * x if name == "bias" else x / leaf.shape[-2] ** 0.5
        return jnp.asarray(x, jnp.float32)

    return jax.tree_util.tree_map_with_path(values, tree)


@pytest.fixture(scope="module")
def params():
    return random_like(jax.eval_shape(lambda: transformer.init(MODEL, jax.random.key(0), SIZE)), 0)


@pytest.fixture(scope="module")
def base(params):
    return forward({"params": params})


def random_lora(seed: int = 1, rank: int = RANK, targets=lora.TARGETS):
    return random_like(lora.shapes(MODEL, rank, targets), seed)


RNG = np.random.default_rng(9)
INPUTS = (
    RNG.normal(size=(2, *SIZE, 4)).astype(np.float32),
    RNG.normal(size=(2, 6, 12)).astype(np.float32),
    np.array([999.0, 37.0], np.float32),
    grid_positions(2, 2, 2, rule="integer"),
)


@functools.cache
def compiled(**fields):
    model = transformer.Transformer(**FIELDS | fields)
    return jax.jit(lambda variables: model.apply(variables, *INPUTS))


def forward(variables, **fields):
    return compiled(**fields)(variables)


def far(got, expected) -> float:
    return float(jnp.abs(got - expected).max() / jnp.sqrt(jnp.mean(expected**2)))


def test_the_parameters_are_those_without_lora(params):
    fresh = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), *INPUTS))
    assert set(fresh) == {"params"}
    assert jax.tree.structure(fresh["params"]) == jax.tree.structure(params)
    attention = fresh["params"]["blocks"]["attention"]
    for target in lora.TARGETS:
        found = {name: leaf.shape for name, leaf in attention[target].items()}
        assert found == {"kernel": (LAYERS, WIDTH, WIDTH), "bias": (LAYERS, WIDTH)}


def test_a_fresh_lora_changes_nothing_bit_for_bit(params, base):
    fresh = lora.init(jax.random.key(1), MODEL, RANK)
    np.testing.assert_array_equal(forward({"params": params, "lora": fresh}), base)
    assert far(forward({"params": params, "lora": random_lora()}), base) > 0.1


def test_a_starts_as_torch_starts_a_linear_layer():
    fresh = lora.init(jax.random.key(1), MODEL, 64)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), fresh) == jax.tree.map(
        lambda leaf: (leaf.shape, jnp.float32), lora.shapes(MODEL, 64)
    )
    bound = 1 / WIDTH**0.5
    layers = []
    for a, b in lora.pairs(fresh).values():
        assert not b.any()
        layers += list(np.asarray(a))
    for a in layers:
        assert bound * 0.99 < np.abs(a).max() <= bound
        assert abs(a.std() - bound / 3**0.5) < 0.03 * bound
    # every layer and every target has its own, which does not depend on the others
    assert len({a.tobytes() for a in layers}) == len(layers)
    (alone,) = lora.pairs(lora.init(jax.random.key(1), MODEL, 64, ("value",))).values()
    np.testing.assert_array_equal(alone[0], lora.pairs(fresh)["value"][0])


@pytest.mark.parametrize(
    ("targets", "remat"),
    [*(((name,), "nothing") for name in lora.TARGETS), *((lora.TARGETS, remat) for remat in transformer.REMAT)],
    ids=str,
)
def test_applied_is_merged(params, base, targets, remat):
    tree = random_lora(targets=targets)
    applied = forward({"params": params, "lora": tree}, remat=remat)
    merged = forward({"params": lora.merge(params, tree)}, remat=remat)
    assert far(applied, base) > 0.1
    assert far(applied, merged) < 2e-5


def test_the_sum_is_of_the_kernel_that_torch_would_have(params):
    tree = random_lora()
    merged = lora.merge(params, tree)
    for name, (a, b) in lora.pairs(tree).items():
        kernel = np.asarray(params["blocks"]["attention"][name]["kernel"], np.float64)
        for i in range(LAYERS):
            expected = kernel[i] + np.asarray(a[i], np.float64) @ np.asarray(b[i], np.float64)
            np.testing.assert_allclose(merged["blocks"]["attention"][name]["kernel"][i], expected, atol=1e-6)


def test_unmerge_restores(params):
    tree = random_lora(targets=("key", "out"))
    kept = jax.tree.map(jnp.copy, params)
    merged = lora.merge(params, tree)
    restored = lora.unmerge(merged, tree)
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    changed = 0
    for was, now, between, before in zip(*map(jax.tree.leaves, (params, restored, merged, kept)), strict=True):
        np.testing.assert_array_equal(was, before)  # nothing is changed in place
        np.testing.assert_allclose(now, was, atol=1e-6)
        changed += between is not was
    assert changed == 2  # the others are shared


def test_merge_sums_in_float32_and_keeps_the_dtype(params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tree = random_lora()
    merged = lora.merge(half, tree)
    for name, (a, b) in lora.pairs(tree).items():
        kernel = half["blocks"]["attention"][name]["kernel"].astype(jnp.float32)
        new = merged["blocks"]["attention"][name]["kernel"]
        assert new.dtype == jnp.bfloat16
        # one rounding, of the exact sum (a 256th part at most)
        exact = np.asarray(kernel, np.float64) + np.einsum("lir,lro->lio", *(np.asarray(x, np.float64) for x in (a, b)))
        np.testing.assert_allclose(np.asarray(new, np.float64), exact, rtol=2**-8, atol=1e-7)


def test_several_become_one(params):
    one, two = random_lora(1, 4, ("query", "value")), random_lora(2, 2, ("out", "value"))
    both = lora.combine([lora.scaled(one, 0.5), lora.scaled(two, -2.0)])
    assert {name: a.shape[2] for name, (a, _) in lora.pairs(both).items()} == {"query": 4, "value": 6, "out": 2}
    got = forward({"params": params, "lora": both})
    merged = lora.merge(lora.merge(params, lora.scaled(one, 0.5)), lora.scaled(two, -2.0))
    assert far(got, forward({"params": merged})) < 2e-5
    assert far(got, forward({"params": lora.merge(params, lora.scaled(one, 0.5))})) > 1e-2
    # the same one twice counts twice
    twice = lora.merge(params, lora.combine([one, one]))
    once = lora.merge(params, lora.scaled(one, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), twice, once)


def test_scaled_scales_the_product(params):
    tree = random_lora()
    for name, (a, b) in lora.pairs(lora.scaled(tree, 3.0)).items():
        was_a, was_b = lora.pairs(tree)[name]
        assert a is was_a
        np.testing.assert_array_equal(b, 3 * was_b)


SCALE = 0.7


def loss(variables, **fields):
    return jnp.mean(transformer.Transformer(**FIELDS | fields).apply(variables, *INPUTS) ** 2)


@pytest.fixture(scope="module")
def gradients(params):
    """Of the merged kernels."""
    merged = lora.merge(params, lora.scaled(random_lora(), SCALE))
    return jax.jit(jax.grad(lambda params: loss({"params": params})))(merged)["blocks"]["attention"]


@pytest.mark.parametrize("remat", transformer.REMAT)
def test_gradients_are_those_of_the_merged_kernel(params, gradients, remat):
    gradient = jax.jit(jax.grad(lambda tree: loss({"params": params, "lora": lora.scaled(tree, SCALE)}, remat=remat)))
    tree = random_lora()
    got = gradient(tree)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for name, (grad_a, grad_b) in lora.pairs(got).items():
        a, b = lora.pairs(tree)[name]
        kernel = SCALE * gradients[name]["kernel"]
        assert far(grad_a, jnp.einsum("lio,lro->lir", kernel, b)) < 1e-4
        assert far(grad_b, jnp.einsum("lir,lio->lro", a, kernel)) < 1e-4
    # at the start only b moves: b is zero, so a has no gradient
    start = gradient(lora.init(jax.random.key(0), MODEL, RANK))
    for grad_a, grad_b in lora.pairs(start).values():
        assert not grad_a.any()
        assert all(layer.any() for layer in grad_b)


def test_the_addition_is_in_the_compute_dtype(params):
    tree = random_lora()
    got = forward({"params": params, "lora": tree}, dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    assert far(got.astype(jnp.float32), forward({"params": params, "lora": tree})) < 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": None}, r"query has a None and b \(4, 32\), expected \(32, rank\)"),
        ({"b": None}, r"query has a \(32, 4\) and b None"),
        ({"a": (3, 32)}, r"query has a \(32,\) and b \(4, 32\)"),
        ({"a": (3, 31, 4)}, r"query has a \(31, 4\) and b \(4, 32\)"),
        ({"b": (3, 4, 1)}, r"query has a \(32, 4\) and b \(4, 1\), expected \(32, rank\) and \(rank, 32\)"),
        ({"b": (3, 1, 32)}, r"query has a \(32, 4\) and b \(1, 32\)"),
    ],
)
def test_a_layer_refuses_shapes_that_are_not_its_own(params, change, words):
    pair = {"a": jnp.ones((3, 32, 4)), "b": jnp.ones((3, 4, 32))}
    for part, shape in change.items():
        if shape is None:
            del pair[part]
        else:
            pair[part] = jnp.ones(shape)
    with pytest.raises(ValueError, match=f"the LoRA of blocks/attention/{words}"):
        jax.eval_shape(MODEL.apply, {"params": params, "lora": {"blocks": {"attention": {"query": pair}}}}, *INPUTS)


def ones(*shape) -> np.ndarray:
    return np.ones(shape, np.float32)


def tree_with(target: str = "query", a=(3, 32, 4), b=(3, 4, 32)):
    return {"blocks": {"attention": {target: {"a": ones(*a), "b": ones(*b)}}}}


NOT_OURS = [
    (tree_with(a=(2, 32, 4), b=(2, 4, 32)), r"query has a \(2, 32, 4\) and b \(2, 4, 32\)"),
    (tree_with(a=(3, 16, 4), b=(3, 4, 32)), r"query has a \(3, 16, 4\)"),
    (tree_with(b=(3, 4, 64)), r"query has a \(3, 32, 4\) and b \(3, 4, 64\)"),
]


@pytest.mark.parametrize(("tree", "words"), NOT_OURS)
def test_a_lora_of_another_model_is_refused(params, tree, words):
    with pytest.raises(
        InputError, match=rf"blocks/attention/{words}.* this model expects \(3, 32, 4\) and \(3, 4, 32\)"
    ):
        lora.check(tree, MODEL)
    for function in (lora.merge, lora.unmerge):
        with pytest.raises(InputError, match=rf"{words}.* the kernel is \(3, 32, 32\)"):
            function(params, tree)
    with pytest.raises(InputError, match="query are for different models"):
        lora.combine([random_lora(), tree])
    lora.check(random_lora(), MODEL)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, "holds nothing"),
        ({"blocks": {"attention": {}}}, "holds nothing"),
        (tree_with("to_q"), "holds blocks/attention/to_q/a, blocks/attention/to_q/b, expected a and b"),
        ({"attention": tree_with()["blocks"]["attention"]}, "holds attention/query/a"),
        (tree_with() | {"head": ones(1)}, "holds head"),
        ({"blocks": {"attention": {"key": {"a": ones(3, 32, 4)}}}}, r"key has a \(3, 32, 4\) and b None"),
        ({"blocks": {"attention": {"key": {"b": ones(3, 4, 32)}}}}, r"key has a None and b \(3, 4, 32\)"),
        (tree_with(a=(32, 4)), r"has a \(32, 4\)"),
        (tree_with(a=(3, 32)), r"has a \(3, 32\)"),
        (tree_with(a=(3, 32, 4, 1)), r"has a \(3, 32, 4, 1\)"),
        (tree_with(b=(3, 4)), r"and b \(3, 4\)"),
        (tree_with(b=(4, 32)), r"and b \(4, 32\)"),
        (tree_with(b=(3, 5, 32)), r"b \(3, 5, 32\)"),
        (tree_with(b=(2, 4, 32)), r"b \(2, 4, 32\)"),
        (tree_with(a=(3, 32, 0), b=(3, 0, 32)), r"a \(3, 32, 0\)"),
    ],
)
def test_what_is_no_lora_is_refused(params, tmp_path, tree, words):
    for function in (
        lambda: lora.check(tree, MODEL),
        lambda: lora.merge(params, tree),
        lambda: lora.combine([tree]),
        lambda: lora.scaled(tree, 1.0),
        lambda: lora_files.write(tmp_path, tree, 1),
    ):
        with pytest.raises(InputError, match=words):
            function()
    assert not list(tmp_path.iterdir())


def test_bad_choices_are_refused():
    key = jax.random.key(0)
    with pytest.raises(InputError, match="rank is 0, expected 1 or more"):
        lora.init(key, MODEL, 0)
    for targets, words in ((("to_q",), "is for to_q, expected query"), ((), "nothing"), (("key", "key"), "key, key")):
        with pytest.raises(InputError, match=words):
            lora.init(key, MODEL, 4, targets)
    with pytest.raises(InputError, match="combination of LoRAs is for nothing"):
        lora.combine([])


def theirs(rank: int = RANK, targets=("to_q", "to_k", "to_v", "to_out.0"), layers: int = LAYERS, seed: int = 0):
    """The tensors of a file, named without the code under test."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for i in range(layers):
        for target in targets:
            name = f"transformer.transformer_blocks.{i}.attn1.{target}"
            tensors[f"{name}.lora_A.weight"] = rng.normal(size=(rank, WIDTH)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = rng.normal(size=(WIDTH, rank)).astype(np.float32)
    return tensors


def adapter(**changes) -> dict[str, str]:
    """A file's metadata with the keys that diffusers 0.42 and peft 0.21 write; None takes a key out."""
    config = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": False,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 6,
        "lora_bias": False,
        "lora_dropout": 0.1,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": RANK,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["to_q", "to_k", "to_out.0", "to_v"],
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    } | changes
    text = {f"transformer.{key}": value for key, value in config.items() if value != "absent"}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(text)}


def save(path: Path, tensors, metadata=None) -> Path:
    path.write_bytes(safetensors(tensors, metadata))
    return path


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"lora_adapter_metadata": ""}])
def test_read_a_file_from_elsewhere(tmp_path, metadata):
    tensors = theirs()
    path = save(tmp_path / "pytorch_lora_weights.safetensors", tensors, metadata)
    for source in (path, tmp_path, str(tmp_path)):
        tree, info = lora_files.read(source, MODEL)
        assert info == (RANK, RANK, lora.TARGETS)
        assert info.scale == 1
        lora.check(tree, MODEL)
        for target, name in zip(lora.TARGETS, ("to_q", "to_k", "to_v", "to_out.0"), strict=True):
            for i in range(LAYERS):
                a, b = (part[i] for part in lora.pairs(tree)[target])
                theirs_name = f"transformer.transformer_blocks.{i}.attn1.{name}"
                np.testing.assert_array_equal(a, tensors[f"{theirs_name}.lora_A.weight"].T)
                np.testing.assert_array_equal(b, tensors[f"{theirs_name}.lora_B.weight"].T)


def test_the_metadata_says_the_scale(tmp_path):
    path = tmp_path / "x.safetensors"
    for changes, alpha in (
        ({}, 6),
        ({"lora_alpha": 0.5}, 0.5),
        ({"use_rslora": True}, 6 * RANK**0.5),
        ({"init_lora_weights": "gaussian", "brand_new_feature": None, "other_feature": []}, 6),
    ):
        _, info = lora_files.read(save(path, theirs(), adapter(**changes)), MODEL)
        assert info == (RANK, alpha, lora.TARGETS)
        assert info.scale == alpha / RANK


def test_some_targets_and_half_precision(tmp_path):
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in theirs(targets=("to_v", "to_q")).items()}
    tree, info = lora_files.read(save(tmp_path / "x.safetensors", tensors), MODEL)
    assert info.targets == ("query", "value")
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype(np.float32)}
    name = "transformer.transformer_blocks.2.attn1.to_v.lora_B.weight"
    np.testing.assert_array_equal(lora.pairs(tree)["value"][1][2], tensors[name].T.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_is_written_is_read_again(tmp_path, dtype):
    path = save(tmp_path / "theirs.safetensors", theirs(), adapter())
    tree, info = lora_files.read(path, MODEL)
    written = lora_files.write(tmp_path / "folder", tree, info.alpha, dtype=dtype)
    assert written == tmp_path / "folder" / "pytorch_lora_weights.safetensors"
    assert sorted(p.name for p in written.parent.iterdir()) == [written.name]
    again, info_again = lora_files.read(tmp_path / "folder", MODEL)
    assert info_again == info
    if dtype == np.float32:
        assert read_raw(written) == read_raw(path)  # names, dtypes, shapes, bytes
        jax.tree.map(np.testing.assert_array_equal, again, tree)
    else:
        assert {row[0] for row in read_raw(written).values()} == {"BF16"}
    second = lora_files.write(tmp_path / "named.safetensors", again, info.alpha, dtype=dtype)
    assert second == tmp_path / "named.safetensors"
    assert second.read_bytes() == written.read_bytes()


def test_what_the_written_metadata_says(tmp_path):
    tree = random_lora(targets=("value", "out"))
    for alpha, text in ((8, "8"), (2.0, "2"), (0.5, "0.5")):
        path = lora_files.write(tmp_path, tree, alpha)
        _, metadata = files.open_file(path)
        assert metadata["format"] == "pt"
        config = json.loads(metadata["lora_adapter_metadata"])
        assert json.dumps(config["transformer.lora_alpha"]) == text
        assert config["transformer.r"] == RANK
        assert config["transformer.target_modules"] == ["to_v", "to_out.0"]
        assert lora_files.read(path, MODEL)[1] == (RANK, alpha, ("value", "out"))


def test_what_a_file_cannot_say_is_not_written(tmp_path):
    mixed = lora.combine([random_lora(1, 4, ("query", "value")), random_lora(2, 2, ("value",))])
    with pytest.raises(InputError, match=r"one rank and as many layers .*query \(3, 32, 4\), value \(3, 32, 6\)"):
        lora_files.write(tmp_path, mixed, 4)
    deep = tree_with()
    deep["blocks"]["attention"]["key"] = {"a": ones(2, 32, 4), "b": ones(2, 4, 32)}
    with pytest.raises(InputError, match="as many layers"):
        lora_files.write(tmp_path, deep, 4)
    for alpha in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"alpha is .*, expected a number above zero"):
            lora_files.write(tmp_path, random_lora(), alpha)
    with pytest.raises(InputError, match="float16 cannot"):
        lora_files.write(tmp_path, lora.scaled(random_lora(), 1e7), 4, dtype=np.float16)
    assert not list(tmp_path.iterdir())


Q0 = "transformer.transformer_blocks.0.attn1.to_q"
SOUND = theirs()
NAMES = {
    "another target": ({"transformer.transformer_blocks.0.ff.net.0.proj.lora_A.weight": ones(4, 32)}, "ff.net.0.proj"),
    "another layer": ({"transformer.transformer_blocks.3.attn1.to_q.lora_A.weight": ones(4, 32)}, "blocks.3.attn1"),
    "a huge layer": ({f"transformer.transformer_blocks.{10**30}.attn1.to_q.lora_A.weight": ones(4, 32)}, "0000.attn1"),
    "a layer named twice": ({"transformer.transformer_blocks.00.attn1.to_q.lora_A.weight": ones(4, 32)}, "blocks.00."),
    "the text encoder": ({"text_encoder.block.0.q.lora_A.weight": ones(4, 32)}, "the LoRA of the transformer alone"),
    "DoRA": ({f"{Q0}.lora_magnitude_vector": ones(32)}, "DoRA is not supported"),
    "DoRA of others": ({f"{Q0}.dora_scale": ones(32)}, "DoRA is not supported"),
    "LoKr": ({f"{Q0}.lokr_w1": ones(4, 4)}, "LoKr is not supported"),
    "biases": ({f"{Q0}.lora_B.bias": ones(32)}, "lora_bias=False"),
    "kohya's": ({"lora_unet_blocks_0_attn1_to_q.lora_up.weight": ones(32, 4)}, "convert it to lora_A and lora_B"),
    "old names": ({f"{Q0}.lora.up.weight": ones(32, 4)}, "load it in diffusers and save it again"),
    "alpha as a tensor": ({f"{Q0}.alpha": ones(1)}, "to_q.alpha"),
    "no prefix": ({"transformer_blocks.0.attn1.to_q.lora_A.weight": ones(4, 32)}, r"transformer_blocks.0.attn1.to_q"),
    "another prefix": (
        {"diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight": ones(4, 32)},
        "diffusion_model",
    ),
    "half a pair": ({f"{Q0}.lora_B.weight": None}, f"missing: {Q0}.lora_B.weight"),
    "the other half": ({f"{Q0}.lora_A.weight": None}, f"missing: {Q0}.lora_A.weight"),
    "a layer too few": (
        {name: None for name in SOUND if "blocks.2.attn1.to_k" in name},
        "missing: transformer.transformer_blocks.2.attn1.to_k.lora_A.weight",
    ),
    "another rank in a layer": (
        {f"{Q0}.lora_A.weight": ones(8, 32), f"{Q0}.lora_B.weight": ones(32, 8)},
        f"{Q0}.lora_A.weight has rank 8 and transformer.transformer_blocks.0.attn1.to_k.lora_A.weight has 4",
    ),
    "another rank in half a pair": ({f"{Q0}.lora_B.weight": ones(32, 8)}, f"and {Q0}.lora_B.weight has 8"),
    "another width": ({f"{Q0}.lora_A.weight": ones(4, 48)}, f"{Q0}.lora_A.weight is (4, 48), expected (4, 32)"),
    "a wider output": ({f"{Q0}.lora_B.weight": ones(96, 4)}, f"{Q0}.lora_B.weight is (96, 4), expected (32, 4)"),
    "another number of dimensions": ({f"{Q0}.lora_A.weight": ones(4, 32, 1)}, "is (4, 32, 1), expected (4, 32)"),
    "whole numbers": ({f"{Q0}.lora_A.weight": ones(4, 32).astype(np.int8)}, "not float"),
    "a name of two lines": ({f"{Q0}.lora_A.weight\nerror: all is well\x1b[2J": ones(4, 32)}, r"\nerror: all is"),
    "an endless name": ({"x" * 100_000: ones(1)}, "x" * 200 + ", expected"),
}


@pytest.mark.parametrize("fault", NAMES)
def test_tensors_that_are_not_ours_are_refused(tmp_path, fault):
    change, words = NAMES[fault]
    tensors = {name: array for name, array in (SOUND | change).items() if array is not None}
    path = save(tmp_path / "x.safetensors", tensors, adapter())
    with pytest.raises(InputError) as error:
        lora_files.read(path, MODEL)
    message = str(error.value)
    assert words in message
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 3000


def test_the_sound_file_of_these_faults_is_read(tmp_path):
    lora_files.read(save(tmp_path / "x.safetensors", SOUND, adapter()), MODEL)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no tensors"),
        ({name: array[..., :0] if "_B" in name else array[:0] for name, array in SOUND.items()}, "have no rank"),
        ({name: array.ravel() for name, array in SOUND.items()}, "have no rank"),
    ],
)
def test_what_holds_no_lora_is_refused(tmp_path, tensors, words):
    with pytest.raises(InputError, match=words):
        lora_files.read(save(tmp_path / "x.safetensors", tensors), MODEL)


def test_a_lora_of_another_model_is_refused_when_read(tmp_path):
    path = save(tmp_path / "x.safetensors", SOUND, adapter())
    with pytest.raises(InputError, match=r"misshapen: .*lora_A\.weight is \(4, 32\), expected \(4, 48\)"):
        lora_files.read(path, transformer.Transformer(**FIELDS | {"num_heads": 3}))
    with pytest.raises(InputError, match=r"missing: transformer\.transformer_blocks\.3"):
        lora_files.read(path, transformer.Transformer(**FIELDS | {"num_layers": 4}))
    with pytest.raises(InputError, match=r"transformer_blocks\.2\..*or choose its model"):
        lora_files.read(path, transformer.Transformer(**FIELDS | {"num_layers": 2}))


METADATA = [
    ({"rank_pattern": {"to_q": 8}}, "transformer.rank_pattern = {'to_q': 8}, expected nothing"),
    ({"alpha_pattern": {"to_q": 8}}, "transformer.alpha_pattern = {'to_q': 8}"),
    ({"use_dora": True}, "transformer.use_dora = True"),
    ({"lora_bias": True}, "transformer.lora_bias = True"),
    ({"modules_to_save": ["proj_out"]}, "transformer.modules_to_save"),
    ({"layer_replication": [[0, 2]]}, "transformer.layer_replication"),
    ({"brand_new_feature": "on\n"}, r"transformer.brand_new_feature = 'on\n', expected nothing"),
    ({"name\nof two lines": 1}, r"'transformer.name\nof two lines' = 1, expected nothing"),
    ({"bias": "all"}, "transformer.bias = 'all', expected none"),
    ({"peft_type": "LOHA"}, "transformer.peft_type = 'LOHA', expected LORA"),
    ({"init_lora_weights": "pissa"}, "transformer.init_lora_weights = 'pissa', expected true"),
    ({"init_lora_weights": 1}, "transformer.init_lora_weights = 1"),
    ({"init_lora_weights": ["gaussian"]}, "transformer.init_lora_weights = ['gaussian']"),
    ({"use_rslora": "yes"}, "transformer.use_rslora = 'yes', expected true or false"),
    ({"r": 8}, "transformer.r = 8, expected 4, the rank of the tensors"),
    ({"r": 4.0}, "transformer.r = 4.0, expected 4"),
    ({"r": "absent"}, "transformer.r is missing"),
    ({"lora_alpha": "absent"}, "transformer.lora_alpha is missing"),
    *(({"lora_alpha": x}, "transformer.lora_alpha = ") for x in (0, -4, True, "4", None, 10**400, float("nan"))),
    ({"lora_alpha": float("inf")}, "transformer.lora_alpha = inf, expected a number above zero, at most 1000000"),
]


@pytest.mark.parametrize(("change", "words"), METADATA, ids=lambda value: str(value)[:40])
def test_metadata_that_would_change_the_numbers_is_refused(tmp_path, change, words):
    path = save(tmp_path / "x.safetensors", SOUND, adapter(**change))
    with pytest.raises(InputError) as error:
        lora_files.read(path, MODEL)
    message = str(error.value)
    assert message.startswith(f"lora_adapter_metadata of {path}: ")
    assert words in message
    assert message.isprintable()
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not readable as JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "holds a list"),
        ('{"transformer.r": 4, "transformer.r": 8}', "transformer.r stands there twice"),
        ('{"transformer.r": 4, "transformer.lora_alpha": ' + "9" * 10_000 + "}", "not readable as JSON"),
        ('{"text_encoder.r": 4}', "text_encoder.r = 4, expected names after transformer."),
        ("{}", "transformer.r is missing"),
    ],
)
def test_hostile_metadata(tmp_path, text, words):
    path = save(tmp_path / "x.safetensors", SOUND, {"lora_adapter_metadata": text})
    with pytest.raises(InputError) as error:
        lora_files.read(path, MODEL)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


class Bomb:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_pickle_is_never_opened(tmp_path):
    fired, folder = tmp_path / "fired", tmp_path / "folder"
    folder.mkdir()
    for name in ("pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors"):
        path = folder / name
        path.write_bytes(pickle.dumps(Bomb(fired)))
        for source in (folder, path):
            with pytest.raises(InputError, match="is a pickle"):
                lora_files.read(source, MODEL)
    assert not fired.exists()


def test_what_is_not_there_or_cut_short(tmp_path):
    with pytest.raises(InputError, match=r"holds no pytorch_lora_weights\.safetensors"):
        lora_files.read(tmp_path, MODEL)
    with pytest.raises(InputError, match=r"x\.safetensors cannot be read"):
        lora_files.read(tmp_path / "x.safetensors", MODEL)
    whole = safetensors(SOUND, adapter())
    for content in (whole[:-1], whole[:100], struct.pack("<Q", 1 << 62) + whole[8:]):
        (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="get the file again"):
            lora_files.read(tmp_path, MODEL)
