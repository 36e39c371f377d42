"""SAT's names against the reference's manifests. The SAT side is written out from the spec's table, not from the code's."""

import json
import math

import numpy as np
import pytest

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.convert import configs, lora, sat
from cogvideox_jax.models.transformer import Transformer
from tests.models import folders as samples

PREFIX = "model.diffusion_model."
# our name -> manifest; layers, width, patch projection, width of proj_out, ofs, learned positions (spec 1.1)
FULL = {
    "2b": ("2b", 30, 1920, (1920, 16, 2, 2), 64, False, True),
    "5b": ("5b", 42, 3072, (3072, 16, 2, 2), 64, False, False),
    "5b-i2v": ("5b_i2v", 42, 3072, (3072, 32, 2, 2), 64, False, True),
    "1.5-5b": ("1.5_5b", 42, 3072, (3072, 128), 128, False, False),
    "1.5-5b-i2v": ("1.5_5b_i2v", 42, 3072, (3072, 256), 128, True, False),
}
ROWS = 226 + 13 * 30 * 45
# the same in small: 2 layers, 32 wide
TINY = {
    "2b": ((32, 4, 2, 2), 16, False, True),
    "5b": ((32, 4, 2, 2), 16, False, False),
    "5b-i2v": ((32, 8, 2, 2), 16, False, True),
    "1.5-5b": ((32, 32), 32, False, False),
    "1.5-5b-i2v": ((32, 64), 32, True, False),
}


def sat_shapes(layers, d, patch, out, ofs, table, *, text=4096, time=512, head=64) -> dict[str, tuple[int, ...]]:
    """Every key of a SAT transformer (spec 2.12)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def module(name: str, *weight: int) -> None:
        shapes[f"{PREFIX}{name}.weight"] = weight
        shapes[f"{PREFIX}{name}.bias"] = weight[:1]

    module("time_embed.0", time, d)
    module("time_embed.2", time, time)
    if ofs:
        module("ofs_embed.0", time, time)
        module("ofs_embed.2", time, time)
    for i in range(layers):
        module(f"transformer.layers.{i}.input_layernorm", d)
        module(f"transformer.layers.{i}.attention.query_key_value", 3 * d, d)
        module(f"transformer.layers.{i}.attention.dense", d, d)
        module(f"transformer.layers.{i}.post_attention_layernorm", d)
        module(f"transformer.layers.{i}.mlp.dense_h_to_4h", 4 * d, d)
        module(f"transformer.layers.{i}.mlp.dense_4h_to_h", d, 4 * d)
        module(f"mixins.adaln_layer.adaLN_modulations.{i}.1", 12 * d, time)
        module(f"mixins.adaln_layer.query_layernorm_list.{i}", head)
        module(f"mixins.adaln_layer.key_layernorm_list.{i}", head)
    module("transformer.final_layernorm", d)
    module("mixins.patch_embed.proj", *patch)
    module("mixins.patch_embed.text_proj", d, text)
    module("mixins.final_layer.norm_final", d)
    module("mixins.final_layer.adaLN_modulation.1", 2 * d, time)
    module("mixins.final_layer.linear", out, d)
    if table:
        shapes[f"{PREFIX}mixins.pos_embed.pos_embedding"] = (1, ROWS, d)
    # what is dropped
    shapes[f"{PREFIX}mixins.pos_embed.freqs_sin"] = (13, 30, 45, head)
    shapes[f"{PREFIX}mixins.pos_embed.freqs_cos"] = (13, 30, 45, head)
    shapes[f"{PREFIX}transformer.position_embeddings.weight"] = (64, d)
    shapes[f"{PREFIX}transformer.embed_tokens.weight"] = (1, d)
    return shapes


DROPPED = 4


def sat_vae_shapes(widths=(128, 256, 256, 512), blocks=3, latent=16) -> dict[str, tuple[int, ...]]:
    """Every key of 3d-vae.pt (spec 3.9), with what training keeps beside it."""
    shapes: dict[str, tuple[int, ...]] = {"loss.logvar": (1,), "loss.discriminator.0.weight": (4, 3, 3, 3)}

    def module(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = weight[:1]

    def norm(name: str, width: int) -> None:
        if name.startswith("encoder"):
            module(name, width)
            return
        module(f"{name}.norm_layer", width)
        module(f"{name}.conv_y.conv", width, latent, 1, 1, 1)
        module(f"{name}.conv_b.conv", width, latent, 1, 1, 1)

    def resnet(name: str, inner: int, outer: int) -> None:
        norm(f"{name}.norm1", inner)
        module(f"{name}.conv1.conv", outer, inner, 3, 3, 3)
        norm(f"{name}.norm2", outer)
        module(f"{name}.conv2.conv", outer, outer, 3, 3, 3)
        if inner != outer:
            module(f"{name}.nin_shortcut", outer, inner, 1, 1, 1)

    module("encoder.conv_in.conv", widths[0], 3, 3, 3, 3)
    inner = widths[0]
    for i, outer in enumerate(widths):
        for j in range(blocks):
            resnet(f"encoder.down.{i}.block.{j}", inner, outer)
            inner = outer
        if i < 3:
            module(f"encoder.down.{i}.downsample.conv", outer, outer, 3, 3)
    module("decoder.conv_in.conv", widths[3], latent, 3, 3, 3)
    for i in (3, 2, 1, 0):  # up.3 comes first, next to the latents
        outer = widths[i]
        for j in range(blocks + 1):
            resnet(f"decoder.up.{i}.block.{j}", inner, outer)
            inner = outer
        if i > 0:
            module(f"decoder.up.{i}.upsample.conv", outer, outer, 3, 3)
    for half, width in (("encoder", widths[3]), ("decoder", widths[0])):
        for j in (1, 2):
            resnet(f"{half}.mid.block_{j}", widths[3], widths[3])
        norm(f"{half}.norm_out", width)
    module("encoder.conv_out.conv", 2 * latent, widths[3], 3, 3, 3)
    module("decoder.conv_out.conv", 3, widths[0], 3, 3, 3)
    return shapes


def sat_lora_shapes(layers: int, d: int, rank: int) -> dict[str, tuple[int, ...]]:
    """A LoRA as SAT saves it: the pairs, and the model that they change."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        for module, pairs in (("query_key_value", 3), ("dense", 1)):
            name = f"{PREFIX}transformer.layers.{i}.attention.{module}"
            shapes[f"{name}.original.weight"] = (pairs * d, d)
            for k in range(pairs):
                shapes[f"{name}.matrix_A.{k}"] = (rank, d)
                shapes[f"{name}.matrix_B.{k}"] = (d, rank)
    return shapes


def hollow(shapes):
    """Tensors of that shape without memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def tiny(variant: str, dtype=np.float32):
    shapes = sat_shapes(2, 32, *TINY[variant], text=12, time=8, head=16)
    return samples.random_tensors(shapes, dtype)


def tiny_vae():
    return samples.random_tensors(sat_vae_shapes((32, 64, 64, 96), 1, 4))


@pytest.mark.parametrize("variant", FULL)
def test_every_key_of_diffusers_is_made_once_at_its_shape(variant):
    name, *sizes = FULL[variant]
    shapes = sat_shapes(*sizes)
    for levels in ((), ("module",), ("model", "state_dict")):  # as different programs nest it
        content = hollow(shapes)
        for level in reversed(levels):
            content = {level: content, "epoch": 3}
        found = sat.read(content, "FILE")
    manifest = samples.manifest(f"transformer_{name}")
    assert {key: list(tensor.shape) for key, tensor in found.tensors.items()} == manifest["tensors"]
    assert found.kind == "transformer"
    assert found.left_out == DROPPED + (variant == "2b")
    # the values of SAT's own: diffusers' config says 1e-5 and 226
    expected = samples.config(f"transformer_{name}", norm_eps=1e-6)
    expected["max_text_seq_length"] = 224 if variant.startswith("1.5") else 226
    assert found.config == expected
    assert found.chosen["norm_eps"] == 1e-6
    # its name may be said, another's may not
    assert sat.read(hollow(shapes), "FILE", variant=variant).config == expected
    other = "5b" if variant != "5b" else "2b"
    with pytest.raises(InputError, match=f"FILE is {variant}, not {other}: {sizes[0]} layers"):
        sat.read(hollow(shapes), "FILE", variant=other)


def expected_transformer(state, variant):
    """Spec 2.12, row by row."""

    def theirs(name: str) -> np.ndarray:
        return state[PREFIX + name]

    rows = {}
    for kind in ("weight", "bias"):
        for i in range(2):
            layer, block = f"transformer.layers.{i}", f"transformer_blocks.{i}"
            qkv = theirs(f"{layer}.attention.query_key_value.{kind}")
            rows[f"{block}.attn1.to_q.{kind}"] = qkv[:32]
            rows[f"{block}.attn1.to_k.{kind}"] = qkv[32:64]
            rows[f"{block}.attn1.to_v.{kind}"] = qkv[64:]
            rows[f"{block}.attn1.to_out.0.{kind}"] = theirs(f"{layer}.attention.dense.{kind}")
            rows[f"{block}.norm1.norm.{kind}"] = theirs(f"{layer}.input_layernorm.{kind}")
            rows[f"{block}.norm2.norm.{kind}"] = theirs(f"{layer}.post_attention_layernorm.{kind}")
            rows[f"{block}.ff.net.0.proj.{kind}"] = theirs(f"{layer}.mlp.dense_h_to_4h.{kind}")
            rows[f"{block}.ff.net.2.{kind}"] = theirs(f"{layer}.mlp.dense_4h_to_h.{kind}")
            c = theirs(f"mixins.adaln_layer.adaLN_modulations.{i}.1.{kind}")
            c = [c[32 * k : 32 * k + 32] for k in range(12)]
            rows[f"{block}.norm1.linear.{kind}"] = np.concatenate([c[0], c[1], c[2], c[6], c[7], c[8]])
            rows[f"{block}.norm2.linear.{kind}"] = np.concatenate([c[3], c[4], c[5], c[9], c[10], c[11]])
            rows[f"{block}.attn1.norm_q.{kind}"] = theirs(f"mixins.adaln_layer.query_layernorm_list.{i}.{kind}")
            rows[f"{block}.attn1.norm_k.{kind}"] = theirs(f"mixins.adaln_layer.key_layernorm_list.{i}.{kind}")
        rows[f"norm_final.{kind}"] = theirs(f"transformer.final_layernorm.{kind}")
        rows[f"patch_embed.proj.{kind}"] = theirs(f"mixins.patch_embed.proj.{kind}")
        rows[f"patch_embed.text_proj.{kind}"] = theirs(f"mixins.patch_embed.text_proj.{kind}")
        rows[f"norm_out.norm.{kind}"] = theirs(f"mixins.final_layer.norm_final.{kind}")
        rows[f"norm_out.linear.{kind}"] = theirs(f"mixins.final_layer.adaLN_modulation.1.{kind}")
        rows[f"proj_out.{kind}"] = theirs(f"mixins.final_layer.linear.{kind}")
        for i, k in ((1, 0), (2, 2)):
            rows[f"time_embedding.linear_{i}.{kind}"] = theirs(f"time_embed.{k}.{kind}")
            if variant == "1.5-5b-i2v":
                rows[f"ofs_embedding.linear_{i}.{kind}"] = theirs(f"ofs_embed.{k}.{kind}")
    if variant == "5b-i2v":
        rows["patch_embed.pos_embedding"] = theirs("mixins.pos_embed.pos_embedding")
    return rows


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        got = np.asarray(found[name])
        assert (found[name].shape, found[name].dtype) == (got.shape, got.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(got, array, err_msg=name)


@pytest.mark.parametrize("variant", TINY)
def test_values_go_where_the_table_says(variant):
    state = tiny(variant, np.float16)
    found = sat.read(state, "FILE", variant=variant)
    same(found.tensors, expected_transformer(state, variant))
    piece = configs.transformer_from(found.config, "x")
    position = {"2b": "sincos", "5b-i2v": "rope+learned"}.get(variant, "rope")
    model = piece["model"]
    assert (model["num_heads"], model["head_dim"], model["position"], model["epsilon"]) == (2, 16, position, 1e-6)
    assert (model["text_dim"], model["time_dim"], model["out_channels"]) == (12, 8, 4)
    assert model["ofs_dim"] == (8 if variant == "1.5-5b-i2v" else 0)


@pytest.mark.parametrize("variant", FULL)
def test_the_vae_is_all_there(variant):
    found = sat.read({"state_dict": hollow(sat_vae_shapes())}, "FILE", variant=variant)
    assert {key: list(tensor.shape) for key, tensor in found.tensors.items()} == samples.manifest("vae")["tensors"]
    assert (found.kind, found.left_out) == ("vae", 2)
    scale = {"scaling_factor": 1.15258426 if variant == "2b" else 0.7}
    assert found.config == samples.config("vae", **scale, invert_scale_latents=variant.startswith("1.5"))


def test_the_decoder_s_levels_are_counted_from_the_other_end():
    state = tiny_vae()
    found = {name: np.asarray(tensor) for name, tensor in sat.read(state, "FILE", variant="5b").tensors.items()}
    pairs = {
        "decoder.up_blocks.0.resnets.1.conv1.conv.weight": "decoder.up.3.block.1.conv1.conv.weight",
        "decoder.up_blocks.1.resnets.0.conv_shortcut.bias": "decoder.up.2.block.0.nin_shortcut.bias",
        "decoder.up_blocks.2.upsamplers.0.conv.weight": "decoder.up.1.upsample.conv.weight",
        "decoder.up_blocks.3.resnets.0.norm1.conv_y.conv.weight": "decoder.up.0.block.0.norm1.conv_y.conv.weight",
        "encoder.down_blocks.0.resnets.0.norm1.weight": "encoder.down.0.block.0.norm1.weight",
        "encoder.down_blocks.2.downsamplers.0.conv.bias": "encoder.down.2.downsample.conv.bias",
        "encoder.down_blocks.3.resnets.0.conv_shortcut.weight": "encoder.down.3.block.0.nin_shortcut.weight",
        "encoder.mid_block.resnets.0.conv2.conv.weight": "encoder.mid.block_1.conv2.conv.weight",
        "decoder.mid_block.resnets.1.norm2.norm_layer.bias": "decoder.mid.block_2.norm2.norm_layer.bias",
        "decoder.norm_out.conv_b.conv.weight": "decoder.norm_out.conv_b.conv.weight",
        "decoder.conv_out.conv.bias": "decoder.conv_out.conv.bias",
    }
    for name, theirs in pairs.items():
        np.testing.assert_array_equal(found[name], state[theirs], err_msg=name)
    # every one of them stands somewhere, and only once
    sums = {name: float(array.sum()) for name, array in state.items() if not name.startswith("loss.")}
    assert sorted(float(array.sum()) for array in found.values()) == sorted(sums.values())


@pytest.mark.parametrize("layers", [2, 30, 42])
def test_a_lora(layers):
    state = samples.random_tensors(sat_lora_shapes(layers, 8, 3))
    found = sat.read({"module": state}, "FILE", alpha=2.0)
    expected = {}
    for i in range(layers):
        for target, theirs in (
            ("to_q", "query_key_value.matrix_{}.0"),
            ("to_k", "query_key_value.matrix_{}.1"),
            ("to_v", "query_key_value.matrix_{}.2"),
            ("to_out.0", "dense.matrix_{}.0"),
        ):
            for matrix in "AB":
                name = f"transformer.transformer_blocks.{i}.attn1.{target}.lora_{matrix}.weight"
                expected[name] = state[f"{PREFIX}transformer.layers.{i}.attention.{theirs.format(matrix)}"]
    assert len(expected) == 8 * layers
    same(found.tensors, expected)
    assert (found.kind, found.left_out, found.config) == ("lora", 2 * layers, {})
    adapter = json.loads(found.metadata["lora_adapter_metadata"])
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (3, 2.0)


def test_a_lora_is_read_by_its_own_reader(tmp_path):
    state = samples.random_tensors(sat_lora_shapes(2, 32, 3))
    found = sat.read(state, "FILE")
    tensors = {name: np.asarray(tensor) for name, tensor in found.tensors.items()}
    (tmp_path / "lora.safetensors").write_bytes(samples.safetensors(tensors, found.metadata))
    tree, info = lora.read(tmp_path / "lora.safetensors", Transformer(num_layers=2, num_heads=2, head_dim=16))
    assert (info.rank, info.alpha, info.scale) == (3, 1.0, 1 / 3)
    pair = tree["blocks"]["attention"]["value"]
    name = f"{PREFIX}transformer.layers.1.attention.query_key_value.matrix_{{}}.2"
    np.testing.assert_array_equal(pair["a"][1], state[name.format("A")].T)
    np.testing.assert_array_equal(pair["b"][1], state[name.format("B")].T)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_a_lora_of_no_strength_is_refused(alpha):
    with pytest.raises(InputError, match="--alpha="):
        sat.read(samples.random_tensors(sat_lora_shapes(2, 32, 3)), "FILE", alpha=alpha)


def changed(state, **changes):
    """Keys with their dots as two underscores; None removes."""
    changes = {PREFIX + name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in (state | changes).items() if value is not None}


ONE = np.ones(1, np.float32)
DENSE = "transformer__layers__1__attention__dense__weight"
REFUSED = {
    "a missing key": ({DENSE: None}, "5b", r"missing: \S*transformer\.layers\.1\.attention\.dense\.weight"),
    "an unknown key": (
        {"transformer__layers__1__attention__dense__wieght": ONE, DENSE: None},
        "5b",
        r"unknown: \S+wieght \(nearest: \S+1\.attention\.dense\.weight\)",
    ),
    "another shape": (
        {DENSE: np.ones((32, 31), np.float32)},
        "5b",
        r"dense\.weight is \(32, 31\), expected \(32, 32\)",
    ),
    "integers": ({DENSE: np.ones((32, 32), np.int8)}, "5b", r"not float .*dense\.weight is int8"),
    "another size, unsaid": (
        {},
        None,
        r"none of the public transformers: 2 layers, \S+patch_embed\.proj\.weight \(32, 4",
    ),
    "a name that does not exist": ({}, "3b", r"--variant=3b is none of 2b, 5b"),
    "patches of frames": ({}, "1.5-5b", r"cannot be 1\.5-5b: 2 layers.*expected patches of 2 frame"),
    "no image": ({}, "5b-i2v", r"cannot be 5b-i2v: .*4 channels out, expected .* more channels in than out"),
    "a learned table": (
        {"mixins__pos_embed__pos_embedding": np.ones((1, ROWS, 32), np.float32)},
        "5b",
        r"unknown: \S+mixins\.pos_embed\.pos_embedding",
    ),
    "an ofs embedding": ({"ofs_embed__0__bias": ONE}, "5b", r"unknown: \S+ofs_embed\.0\.bias"),
    "no patches": (
        {"mixins__patch_embed__proj__weight": None},
        "5b",
        r"FILE lacks \S+mixins\.patch_embed\.proj\.weight",
    ),
    "flat patches": ({"mixins__patch_embed__proj__weight": ONE}, "5b", r"proj\.weight is \(1,\), expected 2 or 4 dim"),
    "patches of nothing": (
        {"mixins__patch_embed__proj__weight": np.ones((0, 4, 2, 2), np.float32)},
        "5b",
        r"proj\.weight is \(0, 4, 2, 2\)",
    ),
    "heads that do not add up": (
        {"mixins__adaln_layer__query_layernorm_list__0__weight": np.ones(12, np.float32)},
        "5b",
        r"attention_head_dim = 12, expected a multiple of 16",
    ),
    "no tensor": ({DENSE: {"absmax": ONE}}, "5b", r"no tensors, where .*dense\.weight"),
    "a layer far away": ({"transformer__layers__999999999__x": ONE}, "5b", r"unknown: \S+999999999\.x"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_ours_is_refused_by_its_key(fault):
    changes, variant, words = REFUSED[fault]
    with pytest.raises(InputError, match=words) as error:
        sat.read({"module": changed(tiny("5b"), **changes)}, "FILE", variant=variant)
    assert "\n" not in str(error.value)


def test_at_most_ten_are_listed():
    few = {name: value for name, value in tiny("5b").items() if "layers.1." not in name or "input" in name}
    assert len(few) == len(tiny("5b")) - 10
    del few[f"{PREFIX}time_embed.2.bias"]
    with pytest.raises(InputError, match="and 1 more") as error:
        sat.read(few, "FILE", variant="5b")
    assert str(error.value).count(PREFIX) == 10


def test_other_contents_are_refused():
    cases = [
        ([1, 2], "holds a list, expected a mapping"),
        ({"module": {}}, "holds no key .* but nothing"),
        ({"conditioner.weight": ONE}, "holds no key .* but conditioner.weight"),
        (tiny_vae(), r"say whose by --variant, one of 2b \(1\.15258426\), 5b \(0\.7\)"),
    ]
    for content, words in cases:
        with pytest.raises(InputError, match=words):
            sat.read(content, "FILE")
    vae = tiny_vae()
    del vae["decoder.up.0.block.1.conv1.conv.bias"]
    with pytest.raises(InputError, match=r"missing: decoder\.up\.0\.block\.1\.conv1\.conv\.bias$"):
        sat.read(vae, "FILE", variant="2b")
    with pytest.raises(InputError, match=r"block_out_channels = \[40, 64, 64, 96\]"):
        sat.read(samples.random_tensors(sat_vae_shapes((40, 64, 64, 96), 1, 4)), "FILE", variant="2b")
    lora = samples.random_tensors(sat_lora_shapes(2, 8, 3))
    name = f"{PREFIX}transformer.layers.1.attention.dense.matrix_B.0"
    for changes, words in (
        ({name: None}, rf"missing: {name}$"),
        ({name: np.ones((8, 2), np.float32)}, r"matrix_B\.0 is \(8, 2\), expected \(8, 3\)"),
        ({f"{PREFIX}transformer.layers.1.mlp.dense_h_to_4h.matrix_A.0": ONE}, r"unknown: \S+mlp\.dense_h_to_4h"),
    ):
        broken = {key: value for key, value in (lora | changes).items() if value is not None}
        with pytest.raises(InputError, match=words):
            sat.read(broken, "FILE")


def test_the_table_of_variants_is_the_spec_s():
    """Totals of spec section 0, reckoned from SAT's side."""
    totals = {"2b": 1_693_783_872, "5b": 5_570_283_072, "5b-i2v": 5_625_087_552}
    totals |= {"1.5-5b": 5_570_676_352, "1.5-5b-i2v": 5_571_594_880}
    for variant, total in totals.items():
        found = sat.read(hollow(sat_shapes(*FULL[variant][1:])), "FILE")
        assert sum(math.prod(tensor.shape) for tensor in found.tensors.values()) == total
