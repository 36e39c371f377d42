"""Name tables and configs against the reference's own manifests, and what is refused by name."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.convert import configs, table
from cogvideox_jax.models.convert import folder as folders
from cogvideox_jax.models.convert.files import open_tensors
from configs import models
from tests.models import folders as samples

# manifest -> kind of network, preset; counts are those of spec section 0
FULL = {
    "transformer_2b": ("transformer", "2b"),
    "transformer_5b": ("transformer", "5b"),
    "transformer_5b_i2v": ("transformer", "5b-i2v"),
    "transformer_1.5_5b": ("transformer", "1.5-5b"),
    "transformer_1.5_5b_i2v": ("transformer", "1.5-5b-i2v"),
    "vae": ("vae", "cogvideox"),
    "t5_v1_1_xxl_encoder": ("text_encoder", "xxl"),
}


class Hollow:
    """A tensor of which only the shape is there."""

    def __init__(self, shape, dtype=np.float32):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)


def flat(tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


@pytest.mark.parametrize("name", FULL)
def test_each_key_is_consumed_once_and_produced_once(name):
    kind, _ = FULL[name]
    network, manifest = folders.NETWORKS[kind], samples.manifest(name)
    fields = network.read(samples.config(name), name)["model"]
    entries, shapes = network.entries(fields), network.shapes(fields)
    keys = {key: tuple(shape) for key, shape in manifest["tensors"].items()}
    assert len(keys) == manifest["num_keys"] == len(entries)
    # produced: every key, each once, at its shape
    produced = table.layout(entries, shapes)
    assert {key: spec.shape for key, spec in produced.items()} == keys
    # consumed: every parameter, each of its layers once, and by a rule that gives its shape
    tree = table.leaves(entries, {key: Hollow(shape) for key, shape in keys.items()}, shapes)
    ours = flat(shapes)
    assert flat(tree) == ours
    slots = [(entry.ours, entry.layer) for entry in entries]
    assert len(set(slots)) == len(slots)
    for entry in entries:
        probe = np.broadcast_to(np.int8(0), keys[entry.theirs])
        shape = ours[entry.ours] if entry.layer is None else ours[entry.ours][1:]
        assert table.RULES[entry.rule][0](probe).shape == shape, entry
    layers = {path: {layer for where, layer in slots if where == path} for path, _ in slots}
    for path, found in layers.items():
        assert found == ({None} if None in found else set(range(ours[path][0]))), path
    assert sum(int(np.prod(shape)) for shape in ours.values()) == manifest["num_parameters"] + sum(
        int(np.prod(keys[key])) for key in manifest["persistent_buffers"]
    )


@pytest.mark.parametrize("name", FULL)
def test_configs_come_back_as_the_reference_wrote_them(name):
    kind, preset = FULL[name]
    network, config = folders.NETWORKS[kind], samples.config(name)
    piece = network.read(config, name)
    written = json.loads(json.dumps(network.write(piece)))
    if kind == "text_encoder":  # transformers writes what is left of the defaults, differently in each release
        written = {key: value for key, value in written.items() if key in config}
        config |= {"tie_word_embeddings": False}
    assert written == config
    # the preset that training starts from is the same network
    known = {"transformer": models.TRANSFORMERS, "vae": models.VAES, "text_encoder": models.T5}[kind][preset]
    different = {key for key, value in known.items() if piece["model"][key] != value}
    assert different <= {"max_text_tokens"}  # 224 in SAT's 1.5, 226 in diffusers' (spec 10.17)


@pytest.mark.parametrize("variant", samples.VARIANTS)
def test_small_variants_come_back(variant):
    config = samples.tiny_transformer(variant)
    assert configs.transformer_to(configs.transformer_from(config, "x")) == config


def test_a_config_that_leaves_keys_out_means_the_defaults():
    piece = configs.transformer_from({"_class_name": "CogVideoXTransformer3DModel"}, "x")
    assert piece == configs.transformer_from(samples.config("transformer_2b"), "x")
    piece = configs.vae_from({"_class_name": "AutoencoderKLCogVideoX"}, "x")
    assert piece == configs.vae_from(samples.config("vae"), "x")


REFUSED = [
    ("transformer", {"qk_norm": "rms"}, "unknown key qk_norm = 'rms'"),
    ("transformer", {"patch_sise": 2}, r"unknown key patch_sise = 2 \(nearest: patch_size\)"),
    (
        "transformer",
        {"activation_fn": "geglu"},
        "activation_fn = 'geglu' is not supported, expected 'gelu-approximate'",
    ),
    ("transformer", {"flip_sin_to_cos": False}, "flip_sin_to_cos = False"),
    ("transformer", {"attention_bias": False}, "attention_bias = False"),
    ("transformer", {"norm_elementwise_affine": False}, "norm_elementwise_affine = False"),
    ("transformer", {"temporal_interpolation_scale": 2.0}, "temporal_interpolation_scale = 2.0"),
    ("transformer", {"patch_size": 4}, "patch_size = 4"),
    ("transformer", {"patch_size_t": 1}, "patch_size_t = 1"),
    ("transformer", {"ofs_embed_dim": 256}, "ofs_embed_dim = 256, expected null or time_embed_dim"),
    ("transformer", {"patch_bias": False}, "patch_bias = False"),
    ("transformer", {"use_learned_positional_embeddings": True}, "use_learned_positional_embeddings = True"),
    (
        "transformer",
        {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True, "sample_frames": 50},
        "sample_frames, sample_height, sample_width = 50, 60, 90, expected 4k",
    ),
    ("transformer", {"num_layers": "30"}, "num_layers = '30', expected int, above zero"),
    ("transformer", {"num_layers": True}, "num_layers = True"),
    ("transformer", {"norm_eps": float("nan")}, "norm_eps = nan, expected int or float, above zero"),
    ("transformer", {"use_rotary_positional_embeddings": 1}, "use_rotary_positional_embeddings = 1, expected bool$"),
    ("transformer", {"quantization_config": {"x": ["y"] * 99}}, "unknown key quantization_config"),
    ("transformer", {"num_layers": 0}, "num_layers = 0"),
    ("transformer", {"attention_head_dim": 60}, "attention_head_dim = 60, expected a multiple of 16"),
    ("transformer", {"_class_name": "WanTransformer3DModel"}, "_class_name = 'WanTransformer3DModel'"),
    ("vae", {"use_quant_conv": True}, "use_quant_conv = True"),
    ("vae", {"latents_mean": [0.0]}, r"latents_mean = \[0.0\]"),
    ("vae", {"act_fn": "relu"}, "act_fn = 'relu'"),
    ("vae", {"block_out_channels": [128, 256]}, r"block_out_channels = \[128, 256\], expected four"),
    ("vae", {"norm_num_groups": 48}, "norm_num_groups = 48"),
    ("vae", {"temporal_compression_ratio": 8}, "temporal_compression_ratio = 8"),
    ("text_encoder", {"feed_forward_proj": "relu"}, "feed_forward_proj = 'relu'"),
    ("text_encoder", {"model_type": "umt5"}, "model_type = 'umt5'"),
    ("text_encoder", {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets = 64"),
]
CONFIGS = {"transformer": "transformer_2b", "vae": "vae", "text_encoder": "t5_v1_1_xxl_encoder"}


@pytest.mark.parametrize(("kind", "change", "words"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_our_networks_do_not_have_is_refused_by_key_and_value(kind, change, words):
    with pytest.raises(InputError, match=words) as error:
        folders.NETWORKS[kind].read(samples.config(CONFIGS[kind], **change), "some/config.json")
    assert str(error.value).startswith("some/config.json: ")


def test_a_text_encoder_that_says_nothing_is_not_v1_1():
    config = samples.config("t5_v1_1_xxl_encoder")
    del config["feed_forward_proj"]
    with pytest.raises(InputError, match="feed_forward_proj = 'relu'"):
        configs.t5_from(config, "x")


def test_schedulers():
    for sampler, name in configs.SAMPLERS.items():
        config = samples.scheduler(_class_name=name)
        piece = configs.scheduler_from(config, "x")
        assert piece == {"sampler": sampler, "snr_shift_scale": 3.0, "timestep_spacing": "linspace"}
        assert configs.scheduler_to(piece) == config | {"_diffusers_version": "0.42.1"}
    for change, words in (
        ({"prediction_type": "epsilon"}, "prediction_type = 'epsilon'"),
        ({"rescale_betas_zero_snr": False}, "rescale_betas_zero_snr = False"),
        ({"beta_end": 0.02}, "beta_end = 0.02"),
        ({"timestep_spacing": "karras"}, "timestep_spacing = 'karras'"),
        ({"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler"),
        ({"use_karras_sigmas": True}, "unknown key use_karras_sigmas"),
    ):
        with pytest.raises(InputError, match=words):
            configs.scheduler_from(samples.scheduler(**change), "x")
    # left out, these have diffusers' defaults, which are not CogVideoX's
    config = samples.scheduler()
    del config["prediction_type"]
    with pytest.raises(InputError, match="prediction_type = 'epsilon'"):
        configs.scheduler_from(config, "x")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return samples.write_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


def test_a_pipeline_is_read(pipeline):
    pieces, sources = folders.read_pipeline(pipeline)
    assert pieces["pipeline"] == "CogVideoXPipeline"
    assert pieces["transformer"]["model"]["position"] == "sincos"
    assert sources.keys() == folders.NETWORKS.keys()
    assert [folders.kind_of(pipeline / kind) for kind in folders.NETWORKS] == list(folders.NETWORKS)


@pytest.mark.parametrize(
    ("remove", "words"),
    [
        ("vae", "vae is missing"),
        ("tokenizer/spiece.model", "tokenizer holds neither spiece.model nor tokenizer.json"),
        ("transformer/config.json", "config.json cannot be read"),
        ("transformer/diffusion_pytorch_model-00002-of-00002.safetensors", "00002-of-00002.safetensors is missing"),
        ("text_encoder/model.safetensors.index.json", "holds no weights"),
    ],
)
def test_an_incomplete_pipeline_is_refused(pipeline, tmp_path, remove, words):
    copy = shutil.copytree(pipeline, tmp_path / "copy")
    if (copy / remove).is_dir():
        shutil.rmtree(copy / remove)
    else:
        (copy / remove).unlink()
    with pytest.raises(InputError) as error:
        folders.read_pipeline(copy)
    assert words in str(error.value)


def test_another_pipeline_is_refused(pipeline, tmp_path):
    copy = shutil.copytree(pipeline, tmp_path / "copy")
    for change, words in (
        ({"_class_name": "WanPipeline"}, "WanPipeline"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "vae = .*AutoencoderKL"),
        ({"image_encoder": ["transformers", "CLIPVisionModel"]}, "unknown part image_encoder"),
    ):
        (copy / "model_index.json").write_text(json.dumps(samples.INDEX | change))
        with pytest.raises(InputError, match=words):
            folders.read_pipeline(copy)


def test_a_layer_count_that_the_weights_cannot_have_is_refused_before_a_table_is_made(pipeline, tmp_path):
    copy = shutil.copytree(pipeline / "transformer", tmp_path / "transformer")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_layers": 10**5}))
    with pytest.raises(InputError, match="says 100000 layers"):
        folders.open_network("transformer", copy)


class Read:
    """An array that counts how often it is read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.count = array, array.shape, array.dtype, 0

    def __array__(self, dtype=None, copy=None):
        self.count += 1
        return self.array


@pytest.fixture(scope="module")
def tiny():
    """(entries, shapes, tensors) of a small network."""
    network = folders.NETWORKS["transformer"]
    fields = network.read(samples.tiny_transformer("5b_i2v"), "x")["model"]
    entries, shapes = network.entries(fields), network.shapes(fields)
    specs = table.layout(entries, shapes)
    return entries, shapes, samples.random_tensors({name: spec.shape for name, spec in specs.items()})


def test_tensors_are_read_one_by_one_and_once(tiny):
    entries, shapes, tensors = tiny
    lazy, names = {name: Read(array) for name, array in tensors.items()}, []
    tree = table.leaves(entries, lazy, shapes, done=names.append)
    assert not any(tensor.count for tensor in lazy.values())
    leaf = tree["blocks"]["mlp_up"]["kernel"]
    np.testing.assert_array_equal(leaf[1], tensors["transformer_blocks.1.ff.net.0.proj.weight"].T)
    assert names == ["transformer_blocks.1.ff.net.0.proj.weight"]
    assert sum(tensor.count for tensor in lazy.values()) == 1
    back = dict(table.to_tensors(entries, jax.tree.map(np.asarray, tree)))
    assert sorted(names[1:]) == sorted(tensors)
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def changed(tensors, **changes):
    return {name: array for name, array in (tensors | changes).items() if array is not None}


def test_foreign_tensors_are_listed(tiny):
    entries, shapes, tensors = tiny
    cases = [
        ({"proj_out.weight": None}, r"missing: proj_out\.weight$"),
        ({"proj_out.weight": None, "proj_out.weigth": tensors["proj_out.weight"]}, "nearest: proj_out.weigth"),
        ({"extra": np.ones(3, np.float32)}, "unknown: extra$"),
        ({"proj_out.bias": np.ones(3, np.float32)}, r"misshapen: proj_out\.bias is \(3,\), expected \(16,\)"),
        ({"proj_out.bias": np.ones(16, np.int8)}, r"not float .*proj_out\.bias is int8"),
    ]
    for changes, words in cases:
        with pytest.raises(InputError, match=words) as error:
            table.to_params(entries, changed(tensors, **changes), shapes, source="FILE")
        assert str(error.value).startswith("FILE does not hold this network's tensors; ")
    # at most ten
    few = {name: array for name, array in tensors.items() if "blocks.1" not in name}
    with pytest.raises(InputError, match=r"and 14 more$") as error:
        table.to_params(entries, few, shapes)
    assert str(error.value).count("transformer_blocks.1.") == 10


def test_a_transposed_tensor_of_the_same_size_is_refused(tiny):
    entries, shapes, tensors = tiny
    name = "transformer_blocks.0.ff.net.0.proj.weight"
    with pytest.raises(InputError, match=r"misshapen: .* is \(32, 128\), expected \(128, 32\)"):
        table.to_params(entries, tensors | {name: tensors[name].T}, shapes)


def test_layers_in_several_dtypes_need_a_choice(tiny):
    entries, shapes, tensors = tiny
    name = "transformer_blocks.0.attn1.to_q.weight"
    mixed = tensors | {name: tensors[name].astype(ml_dtypes.bfloat16)}
    with pytest.raises(InputError, match=r"stored as bfloat16, float32: choose one dtype"):
        table.leaves(entries, mixed, shapes)
    tree = table.leaves(entries, mixed, shapes, dtype=np.float32)
    assert tree["blocks"]["attention"]["query"]["kernel"].dtype == np.float32


def test_float16_may_not_overflow():
    with pytest.raises(InputError, match="w holds values that float16 cannot"):
        table.cast(np.array([1.0, 1e5], np.float32), np.float16, "w")
    np.testing.assert_array_equal(table.cast(np.array([1.5], np.float32), np.float16, "w"), [1.5])
    # what was infinite before stays so
    assert np.isinf(table.cast(np.array([np.inf, 1e5], np.float32), np.float16, "w")).all()


def test_a_written_network_is_what_was_given(tiny, tmp_path):
    entries, shapes, tensors = tiny
    config = samples.tiny_transformer("5b_i2v")
    piece = configs.transformer_from(config, "x")
    params = table.to_params(entries, tensors, shapes)
    target = tmp_path / "transformer"
    names = []
    folders.write_network("transformer", target, piece, params, max_shard_bytes=50_000, done=names.append)
    assert json.loads((target / "config.json").read_text()) == config
    assert len(list(target.glob("*.safetensors"))) > 2
    assert sorted(names) == sorted(tensors)
    for name, tensor in open_tensors(target).items():
        np.testing.assert_array_equal(np.asarray(tensor), tensors[name], err_msg=name)
    # and in another dtype
    folders.write_network("transformer", tmp_path / "half", piece, params, dtype=ml_dtypes.bfloat16)
    found = open_tensors(tmp_path / "half")
    assert {tensor.dtype for tensor in found.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_parameters_of_another_network_are_not_written(tiny, tmp_path):
    entries, shapes, tensors = tiny
    params = table.to_params(entries, tensors, shapes)
    piece = configs.transformer_from(samples.tiny_transformer("5b"), "x")
    with pytest.raises(InputError, match=r"pos_embed is .*expected none"):
        folders.write_network("transformer", tmp_path, piece, params)
