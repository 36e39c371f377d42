"""The whole chain at smoke size, each stage a process of its own as in the quickstart, and what an interruption leaves."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SIZE = ["--config.num_frames=9", "--config.height=32", "--config.width=32"]
VAE = [*SIZE, "--config.model.channels=(4, 4, 8, 8)", "--config.num_steps=4", "--config.checkpoint_steps=2"]
DIFFUSION = ["--config.model.num_layers=2", "--config.model.head_dim=16", "--config.model.max_text_tokens=16"]
DIFFUSION += ["--config.num_steps=4", "--config.checkpoint_steps=2", "--config.batch_size=8", "--config.log_steps=1"]
SAMPLE = [*SIZE, "--config.num_inference_steps=2", "--config.batch_size=2"]


def start(config: str, workdir: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "cogvideox_jax.main", f"--config=configs/{config}.py:tiny", f"--workdir={workdir}"]
    return subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stage(config: str, workdir: Path, *options: str) -> str:
    process = start(config, workdir, *options)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def diffusion_options(run: Path) -> list[str]:
    return [f"--config.encoded={run / 'encode'}", *DIFFUSION]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("chain")
    videos = root / "videos"
    videos.mkdir()
    for name in ("cup.mp4", "cup.txt", "carphone_pristine.mp4", "carphone_pristine.txt"):
        shutil.copy(ROOT / "data" / "samples" / name, videos)
    run = root / "run"
    records = f"--config.records={run / 'prepare' / 'records'}"
    small = ["--config.short_side=32"]
    stage("prepare", run / "prepare", f"--config.input={videos}", *small)
    stage("vae_256", run / "vae", records, *VAE, "--config.log_steps=1")
    stage("encode", run / "encode", records, f"--config.vae={run / 'vae'}", *SIZE, "--config.max_text_tokens=16")
    stage("t2v_256", run / "diffusion", *diffusion_options(run))
    stage("generate", run / "generate", f"--config.pipeline={run}", *SAMPLE)
    stage("evaluate", run / "evaluate", records, f"--config.pipeline={run}", *SAMPLE)
    stage("report", run)
    stage("convert", run / "export", f"--config.source={run}")
    return run


def test_the_chain_leaves_what_it_promises(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_clips"] == 2
    assert 0 <= summary["caption_accuracy"] <= 1
    assert summary["reconstruction_psnr_db"] > 3
    assert summary["peak_memory_mb"] > 100
    assert all(summary["seconds_per_step"][stage] > 0 for stage in ("vae", "diffusion"))
    page = (run / "report.html").read_text()
    for clip in json.loads((run / "evaluate" / "evaluation.json").read_text())["clips"]:
        assert clip["caption"] in page
    assert page.count("data:video/mp4;base64,") == 2 * 3
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (run / "generate" / "contact_sheet.png").stat().st_size > 1000
    videos = json.loads((run / "generate" / "videos.json").read_text())
    assert [(run / "generate" / row["file"]).stat().st_size > 500 for row in videos] == [True, True]


def test_a_finished_stage_is_not_run_again(run):
    assert "already done" in stage("t2v_256", run / "diffusion", *diffusion_options(run))


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, read in a process of its own (this one has other devices)."""
    code = (
        "import sys, jax, numpy as np; from pathlib import Path; from cogvideox_jax.parallel import mesh as m;"
        "from cogvideox_jax.train import checkpoint as c; m.start(1); mesh = m.make_mesh();"
        "out = {item + jax.tree_util.keystr(p): np.asarray(x) for item in ('params', 'ema', 'opt_state')"
        " for p, x in jax.tree_util.tree_leaves_with_path(c.restore_item(Path(sys.argv[1]), item, mesh))};"
        "np.savez(sys.argv[2], **out)"
    )
    path = workdir.with_suffix(".npz")
    subprocess.run([sys.executable, "-c", code, str(workdir), str(path)], cwd=ROOT, check=True, capture_output=True)
    with np.load(path) as file:
        return dict(file)


def rows(workdir: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "step_seconds"} for row in found]


@pytest.mark.parametrize("name", ["vae", "diffusion"])
def test_resume_equals_an_unbroken_run_bit_for_bit(run, name, tmp_path):
    broken = tmp_path / name
    shutil.copytree(run / name, broken)
    # as a kill after the second step's checkpoint leaves it: later rows of the log are there, later states are not
    shutil.rmtree(broken / "checkpoints" / "4")
    (broken / "done.json").unlink()
    if name == "vae":
        records = f"--config.records={run / 'prepare' / 'records'}"
        output = stage("vae_256", broken, records, *VAE, "--config.log_steps=1")
    else:
        output = stage("t2v_256", broken, *diffusion_options(run))
    assert "4/4" in output
    assert "1/4" not in output
    assert rows(broken) == rows(run / name)
    unbroken, resumed = arrays(run / name), arrays(broken)
    assert unbroken.keys() == resumed.keys()
    assert len(unbroken) > 60
    for key, value in unbroken.items():
        np.testing.assert_array_equal(value, resumed[key], err_msg=key)


def test_resume_with_other_records_is_refused(run, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(run / "encode", broken / "encode")
    shutil.copytree(run / "diffusion", broken / "diffusion")
    (broken / "diffusion" / "done.json").unlink()
    manifest = broken / "encode" / "records" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"digest": "0" * 64}))
    config = broken / "diffusion" / "config.json"
    config.write_text(config.read_text().replace(str(run / "encode"), str(broken / "encode")))
    process = start("t2v_256", broken / "diffusion", *diffusion_options(broken))
    output, _ = process.communicate()
    assert process.returncode == 2, output
    assert "the training data changed since this checkpoint" in output


def test_models_that_do_not_fit_the_encoded_text_are_refused_before_anything_is_written(run, tmp_path):
    workdir = tmp_path / "diffusion"
    process = start("t2v_256", workdir, *diffusion_options(run), "--config.model.max_text_tokens=24")
    output, _ = process.communicate()
    assert process.returncode == 2, output
    assert "16 text tokens of width 64" in output
    assert not workdir.exists()


def processes(count: int, config: str, workdir: Path, *options: str) -> list[str]:
    """One training run of several processes over loopback; their outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "cogvideox_jax.main", f"--config=configs/{config}.py:tiny", f"--workdir={workdir}"]
    started = []
    for index in range(count):
        own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        started.append(
            subprocess.Popen(
                [*command, *options],
                cwd=ROOT,
                env=os.environ | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * count, "\n".join(outputs)
    return outputs


# each process holds half of data, or half of fsdp
@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)], ids=str)
def test_two_processes_train_as_one(run, tmp_path, shape):
    mesh = [f"--config.mesh.{name}={n}" for name, n in zip(("data", "fsdp", "sequence"), shape, strict=True)]
    workdir = tmp_path / "diffusion"
    outputs = processes(2, "t2v_256", workdir, *diffusion_options(run), *mesh, "--config.mesh.simulated_devices=4")
    losses = [row["loss"] for row in rows(run / "diffusion")]
    assert len(losses) == 4
    np.testing.assert_allclose([row["loss"] for row in rows(workdir)], losses, rtol=1e-5)
    assert "done in" in outputs[0]
    # a single process goes on from their checkpoint
    shutil.rmtree(workdir / "checkpoints" / "4")
    (workdir / "done.json").unlink()
    assert "4/4" in stage("t2v_256", workdir, *diffusion_options(run))
    np.testing.assert_allclose([row["loss"] for row in rows(workdir)], losses, rtol=1e-5)


@pytest.mark.fault
def test_kill_during_training_loses_at_most_the_steps_since_a_checkpoint(run, tmp_path):
    workdir = tmp_path / "diffusion"
    options = [*diffusion_options(run), "--config.num_steps=400", "--config.checkpoint_steps=10"]
    process = start("t2v_256", workdir, *options)
    deadline = time.monotonic() + 240
    while not any((workdir / "checkpoints").glob("[1-9]*0")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (workdir / "done.json").exists()
    output = stage("t2v_256", workdir, *options)
    steps = [row["step"] for row in rows(workdir)]
    assert steps == list(range(1, 401))
    assert "400/400" in output
