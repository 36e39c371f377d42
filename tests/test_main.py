"""The command line: one clear line and exit code 2 for whatever the user can put right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def command(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "cogvideox_jax.main", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--config=configs/prepare.py:tiny", "--config.shot_side=64"],
            ["unknown config key", "shot_side", "short_side"],
        ),
        (["--config=configs/prepare.py:tiny", "--config.fps=fast"], ["fps", "fast"]),
        (["--config=configs/prepare.py:small"], ["small", "known are tiny"]),
        (["--config=configs/nothing.py"], ["configs/nothing.py"]),
        (["--confg=configs/prepare.py"], ["unknown flag --confg", "--config"]),
        (["--config=configs/prepare.py:tiny", "--config.input=no/such/folder"], ["no/such/folder"]),
        (["--config=configs/prepare.py:tiny", "--config.num_frames=10"], ["num_frames=10", "9 or 13"]),
        (["--config=configs/vae_256.py:tiny", "--config.records=no/records"], ["no/records", "prepare"]),
        (["--config=configs/vae_256.py:tiny", "--config.height=60"], ["height=60", "56 or 64"]),
        (["--config=configs/encode.py:tiny", "--config.num_frames=8"], ["num_frames=8 is not 4k+1", "5 or 9"]),
        (["--config=configs/encode.py:tiny", "--config.width=72"], ["width=72", "64 or 80"]),
        (["--config=configs/t2v_256.py:tiny", "--config.encoded=no/encode"], ["no/encode", "encode"]),
        (["--config=configs/t2v_256.py:tiny", "--config.position_rule=linear"], ["position_rule", "integer, linspace"]),
        (["--config=configs/t2v_256.py:tiny", "--config.compute_dtype=float16"], ["compute_dtype", "bfloat16"]),
        (["--config=configs/generate.py:tiny", "--config.pipeline=no/run"], ["no/run", "model_index.json"]),
        (["--config=configs/generate.py:tiny"], ["config.pipeline is empty"]),
        (["--config=configs/report.py:tiny"], ["prepare", "done.json"]),
    ],
)
def test_wrong_input_is_one_line(options, words, tmp_path):
    workdir = tmp_path / "run"
    done = command(*options, f"--workdir={workdir}")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"), [("notes.md", b"no video", "no video"), ("broken.mp4", b"x", "broken.mp4")]
)
def test_a_folder_without_readable_videos(name, content, words, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / name).write_bytes(content)
    workdir = tmp_path / "run"
    done = command("--config=configs/prepare.py:tiny", f"--config.input={videos}", f"--workdir={workdir}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(videos) in done.stderr
    assert words in done.stderr
    assert not workdir.exists()


def test_a_workdir_belongs_to_its_config(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    options = ["--config=configs/report.py:tiny", f"--workdir={workdir}"]
    (workdir / "config.json").write_text(json.dumps({"task": "prepare", "fps": 8.0}))
    done = command(*options)
    assert done.returncode == 2
    assert "belongs to another config" in done.stderr
    assert "task was 'prepare', is now 'report'" in done.stderr
    assert sorted(path.name for path in workdir.iterdir()) == ["config.json"]
    # and what is finished under the same config is not run again
    (workdir / "config.json").write_text(json.dumps({"task": "report"}))
    (workdir / "done.json").write_text("{}")
    done = command(*options)
    assert done.returncode == 0, done.stderr
    assert "already done" in done.stderr
