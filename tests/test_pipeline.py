"""The Python interface: what it takes a folder for, its shapes, and what its options change."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models import lora
from cogvideox_jax.models.convert import lora as lora_files
from cogvideox_jax.pipeline import Pipeline, find_network, locate, sample_keys
from cogvideox_jax.tasks import convert
from configs.convert import get_config
from tests.models import folders

SIZE = dict(num_frames=9, height=64, width=96, num_inference_steps=2)


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """A diffusers folder, image to video of generation 1.5, and the convert task's import of it."""
    root = tmp_path_factory.mktemp("public")
    folder = folders.write_pipeline(root / "diffusers", "1.5_5b_i2v", np.float32)
    imported = root / "imported"
    config = get_config()
    config.source = str(folder)
    convert.check(config, imported)
    imported.mkdir()
    convert.run(config, imported)
    return folder, imported


@pytest.fixture(scope="module")
def text_to_video(tmp_path_factory):
    return Pipeline.load(folders.write_pipeline(tmp_path_factory.mktemp("t2v") / "diffusers", "5b", np.float32))


def changed(pipeline: Pipeline, **settings) -> Pipeline:
    return dataclasses.replace(pipeline, settings=dataclasses.replace(pipeline.settings, **settings))


def test_an_import_generates_what_its_source_does(public):
    picture = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), np.uint8)
    videos = [Pipeline.load(folder).generate(["a cat"], images=picture, **SIZE) for folder in public]
    assert videos[0].shape == (1, 9, 64, 96, 3)
    assert videos[0].dtype == np.uint8
    assert videos[0].std() > 1
    np.testing.assert_array_equal(*videos)


def test_encode_and_decode_are_scaled_alike(text_to_video):
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 9, 32, 48, 3)).astype(np.float32)
    latents = text_to_video.encode(pixels)
    assert latents.shape == (2, 3, 4, 6, 4)
    assert text_to_video.decode(latents).shape == pixels.shape
    other = changed(text_to_video, scaling_factor=2 * text_to_video.settings.scaling_factor)
    np.testing.assert_allclose(other.encode(pixels), 2 * latents, rtol=1e-6)
    np.testing.assert_allclose(other.decode(2 * latents), text_to_video.decode(latents), rtol=1e-4, atol=1e-5)
    noise = np.random.default_rng(1).normal(size=latents.shape).astype(np.float32)
    assert np.abs(text_to_video.encode(pixels, noise=noise) - latents).max() > 1e-3


@pytest.mark.parametrize(("rule", "power"), [("multiply", 1), ("divide", -1), ("none", 0)])
def test_image_latents_are_scaled_as_named(public, rule, power):
    pipeline = Pipeline.load(public[1])
    assert pipeline.settings.image_latent_scale == "multiply"
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 64, 96, 3)).astype(np.float32)
    plain = pipeline.encode(picture[:, None]) / pipeline.settings.scaling_factor
    got = changed(pipeline, image_latent_scale=rule).encode_image(picture)
    np.testing.assert_allclose(got, plain * pipeline.settings.scaling_factor**power, rtol=1e-5)


def test_inverted_scales_are_read_off_the_folder(public, tmp_path):
    shutil.copytree(public[0], tmp_path / "copy")
    path = tmp_path / "copy" / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"invert_scale_latents": True}))
    assert locate(tmp_path / "copy").settings.image_latent_scale == "divide"
    assert locate(tmp_path / "copy").settings.position_rule == "integer"


@pytest.mark.parametrize(
    "settings",
    [{"unconditional": "zeros"}, {"position_rule": "integer"}, {"sampler": "dpm"}, {"snr_shift_scale": 1.0}],
    ids=str,
)
def test_each_option_reaches_the_video(text_to_video, settings):
    # at another size than the training's, where the position rules differ
    size = SIZE | {"height": 96, "width": 96}
    before = text_to_video.generate(["a cat"], **size)
    after = changed(text_to_video, **settings).generate(["a cat"], **size)
    assert (before != after).any()


def test_negative_prompts_count_where_the_unconditional_branch_has_words(text_to_video):
    videos = [text_to_video.generate(["a cat"], negative_prompt=text, **SIZE) for text in ("", "dogs and horses")]
    assert (videos[0] != videos[1]).any()
    zeros = changed(text_to_video, unconditional="zeros")
    videos = [zeros.generate(["a cat"], negative_prompt=text, **SIZE) for text in ("", "dogs and horses")]
    np.testing.assert_array_equal(*videos)


def test_without_guidance_the_unconditional_branch_is_not_computed(text_to_video):
    arguments = dict(latent_shape=(3, 8, 12), keys=sample_keys(0, 0, 1), num_inference_steps=2)
    context = text_to_video.encode_text(["a cat"])
    plain = text_to_video.denoise(context, guidance_scale=1.0, **arguments)
    # a guidance of one is the conditional branch alone
    guided = text_to_video.denoise(context, guidance_scale=1.0 + 1e-6, **arguments)
    np.testing.assert_allclose(plain, guided, rtol=1e-3, atol=1e-4)


def test_bfloat16_is_near_float32(text_to_video, tmp_path):
    context = text_to_video.encode_text(["a cat"])
    arguments = dict(latent_shape=(3, 8, 12), keys=sample_keys(0, 0, 1), num_inference_steps=2)
    exact = np.asarray(text_to_video.denoise(context, **arguments))
    small = dataclasses.replace(text_to_video, model=dataclasses.replace(text_to_video.model, dtype=jax.numpy.bfloat16))
    rounded = np.asarray(small.denoise(context, **arguments), np.float32)
    error = np.abs(rounded - exact).max() / exact.std()
    assert 1e-5 < error < 0.3


def test_a_lora_changes_the_video_as_much_as_its_weight(text_to_video, tmp_path):
    rng = np.random.default_rng(0)
    fresh = lora.init(jax.random.key(0), text_to_video.model, 2)
    tree = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.3, fresh)
    lora_files.write(tmp_path, tree, alpha=4.0)
    context = text_to_video.encode_text(["a cat"])
    arguments = dict(latent_shape=(3, 8, 12), keys=sample_keys(0, 0, 1), num_inference_steps=2)
    plain = text_to_video.denoise(context, **arguments)
    off = text_to_video.denoise(context, low_rank=text_to_video.lora(tmp_path, weight=0.0), **arguments)
    np.testing.assert_allclose(off, plain, rtol=1e-4, atol=1e-4)
    low_rank = text_to_video.lora(tmp_path, weight=0.5)
    merged = dataclasses.replace(text_to_video, params=lora.merge(text_to_video.params, lora.scaled(tree, 0.5 * 4 / 2)))
    applied = np.asarray(text_to_video.denoise(context, low_rank=low_rank, **arguments))
    assert np.abs(applied - plain).max() > 0.01 * applied.std()
    np.testing.assert_allclose(applied, merged.denoise(context, **arguments), rtol=0, atol=1e-3 * applied.std())


def test_what_does_not_fit_is_refused(text_to_video, public, tmp_path):
    with pytest.raises(InputError, match="from text alone"):
        text_to_video.generate(["a cat"], images=np.zeros((1, 64, 96, 3), np.uint8), **SIZE)
    with pytest.raises(InputError, match="from images"):
        Pipeline.load(public[0]).generate(["a cat"], **SIZE)
    with pytest.raises(InputError, match="one per prompt"):
        Pipeline.load(public[0]).generate(["a cat"], images=np.zeros((1, 32, 96, 3), np.uint8), **SIZE)
    with pytest.raises(InputError, match="multiples of 2"):
        text_to_video.denoise(text_to_video.encode_text(["a"]), latent_shape=(3, 7, 12), keys=sample_keys(0, 0, 1))
    with pytest.raises(InputError, match="choose one of"):
        changed(text_to_video, sampler="euler")
    with pytest.raises(InputError, match="no run"):
        locate(tmp_path)


def test_one_network_of_a_folder(public, tmp_path):
    for folder in public:
        assert find_network("vae", folder).piece["scaling_factor"] == pytest.approx(1.15258426)
    with pytest.raises(InputError, match="missing"):
        find_network("vae", tmp_path)
    (tmp_path / "config.json").write_text('{"task": "prepare"}')
    with pytest.raises(InputError, match="task prepare"):
        find_network("vae", tmp_path)
