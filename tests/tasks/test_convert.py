"""The conversion task on small folders: in, out again, and what it refuses."""

import errno
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models import t5
from cogvideox_jax.models.convert import configs, table, trees
from cogvideox_jax.models.convert import folder as folders
from cogvideox_jax.models.convert.files import open_tensors, write_tensors
from cogvideox_jax.parallel import mesh as meshes
from cogvideox_jax.tasks import convert
from cogvideox_jax.train import checkpoint
from cogvideox_jax.train.workdir import tuples
from configs.convert import get_config
from tests.models import folders as samples
from tests.models.test_convert_files import Bomb
from tests.models.test_convert_tokenizer import same_ids, tokenizer_json
from tests.models.test_t5x import encoder, to_t5x, write_native

ROOT = Path(__file__).parents[2]


def run(source: Path, workdir: Path, **options) -> dict:
    config = get_config()
    config.source = str(source)
    config.update(options)
    convert.check(config, workdir)
    workdir.mkdir(exist_ok=True)
    return convert.run(config, workdir)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return samples.write_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny", "5b_i2v")


@pytest.fixture(scope="module")
def imported(pipeline, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("imported")
    run(pipeline, workdir)
    return workdir


def test_import(pipeline, imported):
    assert sorted(path.name for path in imported.iterdir()) == [
        "model.json",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    ]
    pieces = json.loads((imported / "model.json").read_text())
    assert pieces["transformer"]["model"]["position"] == "rope+learned"
    assert pieces["transformer"]["model"]["learned_grid"] == [3, 4, 6]
    assert pieces["vae"]["scaling_factor"] == 1.15258426
    assert pieces["scheduler"] == {"sampler": "ddim", "snr_shift_scale": 3.0, "timestep_spacing": "linspace"}
    # as any other task reads it
    mesh = meshes.make_mesh()
    for kind, network in folders.NETWORKS.items():
        fields = tuples(pieces[kind]["model"])
        params = checkpoint.restore_tree(imported / kind, mesh)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
        expected = table.to_params(network.entries(fields), open_tensors(pipeline / kind), network.shapes(fields))
        assert jax.tree.structure(params) == jax.tree.structure(expected)
        for got, array in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
            assert np.asarray(got).tobytes() == array.tobytes()


def test_out_again_is_the_same_key_by_key_and_byte_by_byte(pipeline, imported, tmp_path):
    results = run(imported, tmp_path, max_shard_bytes=40_000)
    out = tmp_path / "diffusers"
    assert results["num_tensors"] == sum(len(samples.read(pipeline / kind)) for kind in folders.NETWORKS)
    for kind in folders.NETWORKS:
        assert samples.read(out / kind) == samples.read(pipeline / kind)
    for name in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        before, after = (json.loads((root / name).read_text()) for root in (pipeline, out))
        assert after == before | {"_diffusers_version": "0.42.1"}
    for path in (pipeline / "tokenizer").iterdir():
        assert (out / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))
    # which is read as any other
    folders.read_pipeline(out)


def test_every_tensor_is_counted(pipeline, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        results = run(pipeline / "vae", tmp_path)
    count = len(samples.read(pipeline / "vae"))
    assert results["num_tensors"] == count
    assert f"convert tensor {count}/{count} (100 %)" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "vae"]
    with pytest.raises(InputError, match="lacks pipeline, scheduler, transformer, text_encoder"):
        run(tmp_path, tmp_path / "out")


def test_dtype_is_chosen(pipeline, imported, tmp_path):
    run(pipeline / "transformer", tmp_path, dtype="float32")
    leaves = jax.tree.leaves(trees.open_tree(tmp_path / "transformer"))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    run(imported, tmp_path / "half", dtype="float16")
    for kind in folders.NETWORKS:
        assert {row[0] for row in samples.read(tmp_path / "half" / "diffusers" / kind).values()} == {"F16"}


def test_an_interrupted_run_goes_on(pipeline, imported, tmp_path):
    first = tmp_path / "in"
    first.mkdir()
    shutil.copytree(imported / "transformer", first / "transformer")
    (first / "vae.orbax-checkpoint-tmp").mkdir()
    stamp = (first / "transformer" / "_METADATA").stat().st_mtime_ns
    run(pipeline, first)
    assert (first / "transformer" / "_METADATA").stat().st_mtime_ns == stamp
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in imported.iterdir())
    second = tmp_path / "out"
    run(imported, second)
    # interrupted while the second network was written
    (second / "diffusers").rename(second / "diffusers.tmp")
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(second / "diffusers.tmp" / name)
    (second / "vae.tmp").mkdir()
    (second / "vae.tmp" / "diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(b"half")
    run(imported, second)
    assert sorted(p.name for p in second.iterdir()) == ["diffusers"]
    folders.read_pipeline(second / "diffusers")
    written = sorted(path.name for path in (second / "diffusers" / "vae").iterdir())
    assert written == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_t5x_becomes_a_text_encoder(tmp_path):
    tree = encoder()
    write_native(tmp_path / "t5x", to_t5x(tree, "scanned"))
    results = run(tmp_path / "t5x", tmp_path / "out")
    assert results["parameters"]["text_encoder"] == sum(leaf.size for leaf in jax.tree.leaves(tree))
    fields = json.loads((tmp_path / "out" / "model.json").read_text())["text_encoder"]["model"]
    model = t5.T5Encoder(**fields)
    params = checkpoint.restore_tree(tmp_path / "out" / "text_encoder", meshes.make_mesh())
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    (tmp_path / "t5x" / "checkpoint_1000").rename(tmp_path / "t5x" / "checkpoint_1000.tmp-17")
    with pytest.raises(InputError, match="is an unfinished save"):
        run(tmp_path / "t5x", tmp_path / "refused")


def random_like(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What the training tasks leave behind, as far as an export looks at it."""
    root = tmp_path_factory.mktemp("run")
    model = {"num_layers": 2, "num_heads": 2, "head_dim": 16, "time_dim": 8, "text_dim": 12, "max_text_tokens": 6}
    encoder_fields = {"num_layers": 2, "width": 12, "num_heads": 2, "head_dim": 8, "mlp_dim": 20}
    vae = {"channels": [8, 16, 16, 32], "layers_per_block": 1, "latent_channels": 16, "groups": 4}
    configs = {
        "vae": {"task": "train_vae", "model": vae},
        "encode": {
            "task": "encode",
            "text_encoder": {"source": "", "model": encoder_fields, "seed": 0},
            "vae": "not/used/where/the/run/has/its/own",
            "vocabulary": str(samples.VOCABULARY),
            "max_text_tokens": 6,
            "num_frames": 9,
            "height": 64,
            "width": 96,
        },
        "diffusion": {
            "task": "train_diffusion",
            "model": model,
            "snr_shift_scale": 1.0,
            "position_rule": "integer",
            "position_base": [30, 45],
        },
    }
    for stage, config in configs.items():
        (root / stage).mkdir()
        (root / stage / "config.json").write_text(json.dumps(config))
    (root / "encode" / "stats.json").write_text(json.dumps({"scaling_factor": 0.625, "chunk_frames": None}))
    shapes = {
        "vae": folders.NETWORKS["vae"].shapes(vae | {"channels": (8, 16, 16, 32)}),
        "diffusion": folders.NETWORKS["transformer"].shapes(model),
    }
    for seed, (stage, tree) in enumerate(shapes.items()):
        for step, item in ((2, "ema"), (10, "params"), (10, "ema")):
            path = root / stage / "checkpoints" / str(step) / item
            checkpoint.save_tree(path, random_like(tree, seed + 10 * step + len(item)))
    text = random_like(folders.NETWORKS["text_encoder"].shapes(encoder_fields), 5)
    checkpoint.save_tree(root / "encode" / "text_encoder", text)
    return root


def test_a_run_becomes_a_pipeline(trained, tmp_path):
    run(trained, tmp_path, sampler="dpm")
    out = tmp_path / "diffusers"
    pieces, sources = folders.read_pipeline(out)
    assert pieces["pipeline"] == "CogVideoXPipeline"
    assert pieces["scheduler"] == {"sampler": "dpm", "snr_shift_scale": 1.0, "timestep_spacing": "trailing"}
    assert pieces["vae"]["scaling_factor"] == 0.625
    transformer = pieces["transformer"]
    assert (transformer["sample_frames"], transformer["sample_height"], transformer["sample_width"]) == (9, 8, 12)
    assert transformer["model"]["text_dim"] == 12
    places = {
        "transformer": trained / "diffusion" / "checkpoints" / "10" / "ema",
        "vae": trained / "vae" / "checkpoints" / "10" / "ema",
        "text_encoder": trained / "encode" / "text_encoder",
    }
    for kind, network in folders.NETWORKS.items():
        fields = pieces[kind]["model"]
        params = table.to_params(network.entries(fields), sources[kind].tensors, network.shapes(fields))
        expected = jax.tree.map(np.asarray, trees.open_tree(places[kind]))
        assert jax.tree.structure(params) == jax.tree.structure(expected)
        for got, array in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(got, array)
    assert (out / "tokenizer" / "spiece.model").read_bytes() == samples.VOCABULARY.read_bytes()
    # the other weights, and back in
    run(trained, tmp_path / "params", weights="params")
    assert samples.read(tmp_path / "params" / "diffusers" / "vae") != samples.read(out / "vae")
    run(out, tmp_path / "in")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "config.dtype='int8': choose keep, float32, float16, bfloat16"),
        ({"weights": "average"}, "config.weights='average'"),
        ({"sampler": "euler"}, "config.sampler='euler'"),
        ({"max_shard_bytes": 0}, "config.max_shard_bytes=0"),
        ({"source": ""}, "config.source='' does not exist"),
        ({"source": "no/such/folder"}, "config.source='no/such/folder' does not exist"),
    ],
)
def test_wrong_options_are_refused(pipeline, tmp_path, options, words):
    with pytest.raises(InputError) as error:
        run(**{"source": pipeline, "workdir": tmp_path / "run", **options})
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()


def test_other_sources_are_refused(pipeline, trained, tmp_path):
    def refused(source: Path, words: str) -> None:
        with pytest.raises(InputError) as error:
            run(source, tmp_path / "run")
        assert words in str(error.value)
        assert not (tmp_path / "run").exists()

    refused(tmp_path, "is no diffusers folder")
    refused(pipeline / "tokenizer", "is no diffusers folder")
    refused(next((pipeline / "vae").glob("*.safetensors")), "is a file: give the folder that it lies in")
    stage = tmp_path / "stage"
    shutil.copytree(trained / "vae", stage)
    refused(stage, "is one stage: give the folder that holds encode, diffusion")
    copy = shutil.copytree(trained, tmp_path / "copy")
    shutil.rmtree(copy / "vae" / "checkpoints")
    refused(copy, "holds no checkpoint")
    # the weights are those of another network than the config's
    copy = shutil.copytree(trained, tmp_path / "other")
    config = json.loads((copy / "diffusion" / "config.json").read_text())
    config["model"]["num_layers"] = 3
    (copy / "diffusion" / "config.json").write_text(json.dumps(config))
    refused(copy, "the parameters are not those of this transformer: blocks/")
    copy = shutil.copytree(pipeline, tmp_path / "damaged")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(copy, str(weights))


def command(source: Path, workdir: Path) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "cogvideox_jax.main", "--config=configs/convert.py"]
    words += [f"--config.source={source}", f"--workdir={workdir}"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_pickle_in_place_of_weights_is_one_line_and_nothing_runs(pipeline, tmp_path):
    copy = shutil.copytree(pipeline, tmp_path / "copy")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    fired = tmp_path / "fired"
    weights.with_suffix(".bin").write_bytes(pickle.dumps(Bomb(fired)))
    done = command(copy, tmp_path / "run")
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "diffusion_pytorch_model.bin is a pickle" in lines[0]
    assert not fired.exists()
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_foreseen(pipeline, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"0\.0 GB left"):
        run(pipeline, tmp_path / "run")


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# as tensorstore says it
EXHAUSTED = ValueError(
    f"RESOURCE_EXHAUSTED: Failed to write 1138 bytes to file 7: {FULL.strerror} [os_error_code='28']"
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [FULL, EXHAUSTED], ids=lambda error: type(error).__name__)
def test_a_disk_that_fills_up_during_an_import(pipeline, imported, tmp_path, monkeypatch, error):
    write = trees._InParts._open_and_write

    async def full(self, value, tspec, ts_context):
        if "/vae." in str(tspec):
            raise error
        await write(self, value, tspec, ts_context)

    with monkeypatch.context() as patch:
        patch.setattr(trees._InParts, "_open_and_write", full)
        with pytest.raises(
            InputError, match=r"the disk filled up: --workdir=.* GB left, 0\.0 GB are needed in all"
        ) as got:
            run(pipeline, tmp_path)
    assert str(tmp_path) in str(got.value)
    assert "\n" not in str(got.value)
    # the network that was whole is kept, and the next run goes on after it
    assert names(tmp_path) == ["transformer"]
    run(pipeline, tmp_path)
    assert names(tmp_path) == names(imported)


def test_a_disk_that_fills_up_at_the_end_of_an_import(pipeline, imported, tmp_path, monkeypatch):
    def full(source, target):
        Path(target).write_bytes(b"half")
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "copyfile", full)
        with pytest.raises(InputError, match="the disk filled up"):
            run(pipeline, tmp_path)
    assert names(tmp_path) == ["text_encoder", "transformer", "vae"]
    run(pipeline, tmp_path)
    assert (tmp_path / "tokenizer" / "spiece.model").read_bytes() == samples.VOCABULARY.read_bytes()
    assert names(tmp_path) == names(imported)


@pytest.mark.parametrize("place", ["weights", "configs"])
def test_a_disk_that_fills_up_during_an_export(imported, tmp_path, monkeypatch, place):
    pwrite, write_text, count = os.pwrite, Path.write_text, []

    def full_pwrite(descriptor, values, start):
        count.append(start)
        if place == "weights" and len(count) > 120:
            raise FULL
        return pwrite(descriptor, values, start)

    def full_text(path, text):
        write_text(path, text[:10])
        if place == "configs" and path.name == "scheduler_config.json.tmp":
            raise FULL
        return write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full_pwrite)
        patch.setattr(Path, "write_text", full_text)
        with pytest.raises(InputError, match="the disk filled up: --workdir="):
            run(imported, tmp_path)
    assert names(tmp_path) == ["diffusers.tmp"]
    whole = ["transformer"] if place == "weights" else ["scheduler", "text_encoder", "tokenizer", "transformer", "vae"]
    assert names(tmp_path / "diffusers.tmp") == whole
    assert not list((tmp_path / "diffusers.tmp").rglob("*.tmp"))
    run(imported, tmp_path)
    assert names(tmp_path) == ["diffusers"]
    folders.read_pipeline(tmp_path / "diffusers")


def test_another_error_stays_what_it_is(pipeline, tmp_path, monkeypatch):
    async def broken(self, value, tspec, ts_context):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(trees._InParts, "_open_and_write", broken)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        run(pipeline, tmp_path)
    assert names(tmp_path) == []


def test_a_tokenizer_of_transformers_5_comes_in_and_out(pipeline, tmp_path):
    copy = shutil.copytree(pipeline, tmp_path / "copy")
    (copy / "tokenizer" / "spiece.model").unlink()
    given = json.dumps(tokenizer_json(samples.VOCABULARY.read_bytes()), indent=1)
    (copy / "tokenizer" / "tokenizer.json").write_text(given)
    run(copy, tmp_path / "in")
    assert names(tmp_path / "in" / "tokenizer") == ["spiece.model", "tokenizer.json", "tokenizer_config.json"]
    same_ids((tmp_path / "in" / "tokenizer" / "spiece.model").read_bytes())
    run(tmp_path / "in", tmp_path / "out")
    for path in (copy / "tokenizer").iterdir():
        assert (tmp_path / "out" / "diffusers" / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    (copy / "tokenizer" / "tokenizer.json").write_text(given.replace("Unigram", "BPE"))
    with pytest.raises(InputError, match="model is 'BPE', expected Unigram"):
        run(copy, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # writes and reads ten gigabytes: minutes on a busy machine
def test_a_2b_model_passes_through_five_gigabytes_both_ways(tmp_path):
    source = samples.write_pipeline(tmp_path / "source", "2b")
    shutil.rmtree(source / "transformer")
    config = samples.config("transformer_2b")
    piece = configs.transformer_from(config, "2b")
    network = folders.NETWORKS["transformer"]
    layout = table.layout(network.entries(piece["model"]), network.shapes(piece["model"]), ml_dtypes.bfloat16)
    rng = np.random.default_rng(0)

    def tensors():
        for name, spec in layout.items():
            # bits at random, exponents as weights have them
            bits = rng.integers(0x3C00, 0x3E00, size=spec.shape, dtype=np.uint16)
            yield name, (bits | rng.integers(0, 2, size=spec.shape, dtype=np.uint16) << 15).view(ml_dtypes.bfloat16)

    write_tensors(source / "transformer", layout, tensors(), basename=network.basename, max_shard_bytes=2_000_000_000)
    (source / "transformer" / "config.json").write_text(json.dumps(config))
    for direction, (before, after) in {"in": (source, "in"), "out": (tmp_path / "in", "out")}.items():
        done = command(before, tmp_path / after)
        assert done.returncode == 0, done.stderr
        assert " left: " in done.stderr, "no time left was shown"
        summary = json.loads((tmp_path / after / "done.json").read_text())
        print(direction, summary["seconds"], "s", summary["peak_memory_mb"], "MB")
        assert summary["peak_memory_mb"] < 5000
    after = open_tensors(tmp_path / "out" / "diffusers" / "transformer")
    for name, tensor in open_tensors(source / "transformer").items():
        assert np.array_equal(np.asarray(tensor).view(np.uint16), np.asarray(after[name]).view(np.uint16)), name


def test_bfloat16_stays_bfloat16_in_both_directions(imported):
    leaf = trees.open_tree(imported / "vae")["decoder"]["conv_in"]["kernel"]
    assert leaf.dtype == np.dtype(ml_dtypes.bfloat16)
