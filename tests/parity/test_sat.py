"""SAT's files as torch writes them: converted by the script, imported by the task, equal in values; and what is refused."""

import errno
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.convert import folder, table, trees
from tests.models import folders as samples
from tests.models.test_convert_files import Bomb
from tests.models.test_convert_sat import PREFIX, expected_transformer, sat_lora_shapes, tiny, tiny_vae
from tests.parity.test_folder import run

pytestmark = pytest.mark.parity
ROOT = Path(__file__).parents[2]


def convert(source: Path, target: Path, *options: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(ROOT / "launch" / "convert_sat.py"), str(source), str(target), *options]
    return subprocess.run(words, cwd=source.parent, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("convert_sat", ROOT / "launch" / "convert_sat.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refused(script, source: Path, target: Path, variant: str | None = None) -> str:
    """The one line of a refusal, which leaves nothing."""
    with pytest.raises(InputError) as error:
        script.convert(source, target, variant=variant, alpha=1.0)
    assert not target.exists()
    assert not target.with_name(target.name + ".tmp").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def tensors_of(torch, state, dtype):
    return {name: torch.from_numpy(np.array(array)).to(dtype) for name, array in state.items()}


def save(torch, root: Path, state, dtype) -> Path:
    """A transformer's folder as SAT has it."""
    (root / "1000").mkdir(parents=True)
    (root / "latest").write_text("1000\n")
    content = {"module": tensors_of(torch, state, dtype), "iteration": 1000}
    torch.save(content, root / "1000" / "mp_rank_00_model_states.pt")
    return root


def same_after_import(source: Path, workdir: Path, kind: str, expected) -> None:
    """The import's tree equals the tensors, given in diffusers' names."""
    run(source, workdir)
    fields = json.loads((workdir / "model.json").read_text())[kind]["model"]
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    network = folder.NETWORKS[kind]
    wanted = table.to_params(network.entries(fields), expected, network.shapes(fields))
    got = jax.tree.map(np.asarray, trees.open_tree(workdir / kind))
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    ("variant", "dtype"), [("2b", "float16"), ("5b-i2v", "bfloat16"), ("1.5-5b-i2v", "float32")], ids=str
)
def test_a_transformer_comes_in(libraries, tmp_path, variant, dtype):
    torch = libraries.torch
    state = tiny(variant, getattr(ml_dtypes, dtype, None) or np.dtype(dtype))
    float32 = {name: array.astype(np.float32) for name, array in state.items()}
    source = save(torch, tmp_path / "sat", float32, getattr(torch, dtype))
    done = convert(source, tmp_path / "out", f"--variant={variant}")
    assert done.returncode == 0, done.stderr
    count = len(expected_transformer(state, variant))
    assert f"convert tensor {count}/{count} (100 %)" in done.stderr
    assert "norm_eps=1e-06, max_text_seq_length=22" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sat"]
    same_after_import(tmp_path / "out", tmp_path / "in", "transformer", expected_transformer(state, variant))
    # and diffusers takes it as its own
    theirs = libraries.diffusers.CogVideoXTransformer3DModel.from_pretrained(
        tmp_path / "out", torch_dtype=getattr(torch, dtype), low_cpu_mem_usage=False
    )
    assert theirs.config.norm_eps == 1e-6
    loaded = theirs.state_dict()
    for name, array in expected_transformer(float32, variant).items():
        np.testing.assert_array_equal(loaded[name].float().numpy(), array, err_msg=name)


def test_a_vae_comes_in(libraries, script, tmp_path):
    torch, state = libraries.torch, tiny_vae()
    path = tmp_path / "3d-vae.pt"
    torch.save({"state_dict": tensors_of(torch, state, torch.float32)}, path)
    assert "say whose by --variant" in refused(script, path, tmp_path / "out")
    assert convert(path, tmp_path / "out", "--variant=1.5-5b").returncode == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["scaling_factor"], config["invert_scale_latents"]) == (0.7, True)
    theirs = libraries.diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path / "out").state_dict()
    expected = {name: tensor.numpy() for name, tensor in theirs.items()}
    name = "decoder.up{}.conv1.conv.weight"
    np.testing.assert_array_equal(expected[name.format("_blocks.0.resnets.0")], state[name.format(".3.block.0")])
    same_after_import(tmp_path / "out", tmp_path / "in", "vae", expected)


def test_a_lora_acts_in_diffusers_as_in_sat(libraries, tmp_path):
    torch = libraries.torch
    state = samples.random_tensors(sat_lora_shapes(2, 32, 4))
    torch.save({"module": tensors_of(torch, state, torch.float32)}, tmp_path / "lora.pt")
    assert convert(tmp_path / "lora.pt", tmp_path / "out", "--alpha=2").returncode == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pytorch_lora_weights.safetensors"]
    config = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "text_embed_dim": 12}
    model = libraries.diffusers.CogVideoXTransformer3DModel(**config, time_embed_dim=8, max_text_seq_length=6)
    before = {name: tensor.clone().numpy() for name, tensor in model.state_dict().items()}
    pipeline = libraries.diffusers.CogVideoXPipeline
    tensors, metadata = pipeline.lora_state_dict(tmp_path / "out", return_lora_metadata=True)
    pipeline.load_lora_into_transformer(tensors, model, metadata=metadata)
    model.fuse_lora()
    after = {name.replace(".base_layer", ""): tensor.numpy() for name, tensor in model.state_dict().items()}
    targets = {"to_q": "query_key_value.{}.0", "to_k": "query_key_value.{}.1", "to_v": "query_key_value.{}.2"}
    for i in range(2):
        for target, theirs in (targets | {"to_out.0": "dense.{}.0"}).items():
            a, b = (
                state[f"{PREFIX}transformer.layers.{i}.attention.{theirs.format(m)}"] for m in ("matrix_A", "matrix_B")
            )
            name = f"transformer_blocks.{i}.attn1.{target}.weight"
            # SAT adds alpha / rank of the product
            np.testing.assert_allclose(after[name], before[name] + 2 / 4 * b @ a, atol=1e-5, err_msg=name)


def test_a_program_in_a_checkpoint_is_not_run(libraries, script, tmp_path):
    torch, fired, out = libraries.torch, tmp_path / "fired", tmp_path / "out"
    state = tensors_of(torch, tiny("5b"), torch.float32)
    path = tmp_path / "bomb.pt"
    torch.save({"module": state, "args": Bomb(fired)}, path)
    done = convert(path, out, "--variant=5b")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {path} holds more than plain tensors (it names posix.system)")
    assert not out.exists()
    # settings beside the weights, however harmless
    torch.save({"module": state, "args": SimpleNamespace(lr=1)}, path)
    assert "it names types.SimpleNamespace" in refused(script, path, out, "5b")
    # a bare pickle, torch's older format, and a compiled model
    path.write_bytes(pickle.dumps(Bomb(fired), protocol=2))
    assert "is not in the zip format" in refused(script, path, out, "5b")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "TorchScript" in refused(script, path, out, "5b")
    torch.save({"module": state, "args": Bomb(fired)}, path, _use_new_zipfile_serialization=False)
    assert "is not in the zip format" in refused(script, path, out, "5b")
    assert not fired.exists()
    # it would have been
    torch.load(path, weights_only=False)
    assert fired.exists()


def test_damaged_and_wrong_sources(libraries, script, tmp_path):
    torch, out = libraries.torch, tmp_path / "out"
    source = save(torch, tmp_path / "sat", tiny("5b"), torch.float32)
    path = source / "1000" / "mp_rank_00_model_states.pt"
    whole = path.read_bytes()
    for size in (len(whole) - 1000, len(whole) // 2, 100):
        path.write_bytes(whole[:size])
        line = refused(script, source, out, "5b")
        assert line.startswith(f"{path} cannot be read as a .pt ("), line
    path.write_bytes(b"")
    assert "is not in the zip format" in refused(script, source, out, "5b")
    path.write_bytes(whole)
    assert "does not exist" in refused(script, tmp_path / "nothing", out)
    assert "none of the public transformers: 2 layers" in refused(script, source, out)
    (source / "latest").write_text("../sat/1000")
    assert "expected the name of a folder beside it" in refused(script, source, out, "5b")
    (source / "latest").unlink()
    assert "holds no mp_rank_00_model_states.pt" in refused(script, source, out, "5b")
    shutil.copyfile(path, path.with_name("mp_rank_01_model_states.pt"))
    assert "expected mp_rank_00_model_states.pt alone" in refused(script, path.parent, out, "5b")
    torch.save({"module": {f"{PREFIX}x": torch.ones(2).to(torch.float8_e4m3fn)}}, path)
    assert f"{PREFIX}x is a tensor of torch.strided torch.float8_e4m3fn" in refused(script, path, out)
    done = convert(source, out, "--variant=6b")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert "choose from" in done.stderr


def test_nothing_is_overwritten_and_nothing_half_written(libraries, script, tmp_path, monkeypatch):
    path, out = tmp_path / "lora.pt", tmp_path / "out"
    state = samples.random_tensors(sat_lora_shapes(2, 32, 4))
    libraries.torch.save(tensors_of(libraries.torch, state, libraries.torch.float32), path)
    write_tensors = script.write_tensors

    def full(folder, *args, **kwargs):
        write_tensors(folder, *args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_tensors", full)
        line = refused(script, path, out)
    assert line.startswith(f"the disk filled up: {out} has ")
    out.mkdir()
    with pytest.raises(InputError, match="is already there"):
        script.convert(path, out, variant=None, alpha=1.0)
    assert not list(out.iterdir())
    out.rmdir()
    # what a killed run has left
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "half").write_text("")
    script.convert(path, out, variant=None, alpha=1.0)
    assert [file.name for file in out.iterdir()] == ["pytorch_lora_weights.safetensors"]
