"""Records come back as they were written, whole or not at all."""

import json
import subprocess
import sys

import numpy as np
import pytest
from absl import logging

from cogvideox_jax.core.errors import InputError
from data import records


def clip(name: str, video: bytes = b"\x00\xffmp4", num_frames: int = 9) -> dict:
    return {
        "clip_id": name,
        "video": video,
        "num_frames": num_frames,
        "height": 4,
        "width": 6,
        "fps": 8.0,
        "source": "é.mp4",
        "start_seconds": 1.25,
        "end_seconds": 2.5,
        "caption": f"café {name}",
        "scores": json.dumps({"motion": 3.5}),
    }


def test_clips_round_trip(tmp_path, capfd, caplog):
    caplog.set_level("INFO", logger="absl")
    examples = [clip(f"c{i}", bytes(range(i, 256)) * 50, 9 + 4 * (i % 2)) for i in range(7)]
    assert records.write_clips(tmp_path / "r", iter(examples)) == 7
    source = records.read(tmp_path / "r")
    assert len(source) == 7
    by_id = {source[i]["clip_id"]: source[i] for i in range(7)}
    assert by_id == {e["clip_id"]: e for e in examples}  # texts as str, video bytes untouched, 1.25 and 2.5 exact
    assert records.manifest(tmp_path / "r")["min_num_frames"] == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r"]
    assert (capfd.readouterr(), caplog.messages) == (("", ""), [])  # nothing of tensorflow-datasets' chatter
    logging.info("ours")
    assert caplog.messages == ["ours"]


def test_latents_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    shapes = [(3, 8, 8, 16), (1, 4, 6, 16)]  # of different size in one folder
    examples = [
        {
            "clip_id": f"c{i}",
            "caption": "x",
            "source": "y.mp4",
            "mean": rng.normal(size=shape).astype(np.float32),
            "logvar": rng.normal(size=shape).astype(np.float32),
            "context": rng.normal(size=(5, 32)).astype(np.float32),
        }
        for i, shape in enumerate(shapes)
    ]
    assert records.write_latents(tmp_path / "r", examples) == 2
    source = records.read(tmp_path / "r", "latents")
    for i in range(2):
        record = source[i]
        want = examples[int(record["clip_id"][1:])]
        for key in ("mean", "logvar", "context"):
            assert record[key].dtype == np.float32
            np.testing.assert_array_equal(record[key], want[key])


def test_fingerprint_follows_content_not_the_process_or_order(tmp_path):
    script = (
        "import sys, pathlib; from data import records; from tests.data.test_records import clip\n"
        "records.write_clips(pathlib.Path(sys.argv[1]), [clip('b'), clip('a')])"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "other")], check=True)
    records.write_clips(tmp_path / "same", [clip("a"), clip("b")])
    assert records.fingerprint(tmp_path / "other") == records.fingerprint(tmp_path / "same")
    records.write_clips(tmp_path / "same", [clip("a"), clip("b", video=b"other")])  # replaces
    assert records.fingerprint(tmp_path / "other") != records.fingerprint(tmp_path / "same")


def test_what_is_not_a_record_folder_is_refused_with_the_task_to_run(tmp_path):
    with pytest.raises(InputError, match=r'none does not exist: run the task "encode" to write it'):
        records.read(tmp_path / "none", "latents")
    with pytest.raises(InputError, match=r'not a record folder .* run the task "prepare" or "encode"'):
        records.read(tmp_path)
    records.write_clips(tmp_path / "clips", [clip("a")])
    with pytest.raises(InputError, match=r"holds 'clips' records, not 'latents': run the task \"encode\""):
        records.read(tmp_path / "clips", "latents")
    shard = next((tmp_path / "clips").glob("*/*/*.array_record*"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match=r"is missing or not \d+ bytes long"):
        records.read(tmp_path / "clips")
    (tmp_path / "clips" / records.MANIFEST).write_text('{"builder": "cli')
    with pytest.raises(InputError, match="not a record folder"):
        records.read(tmp_path / "clips")


def test_a_failed_write_keeps_the_old_records_and_its_own_error(tmp_path):
    def failing():
        yield clip("b")
        raise InputError("b.mp4 is damaged")

    records.write_clips(tmp_path / "r", [clip("a")])
    with pytest.raises(InputError, match=r"^b.mp4 is damaged$"):
        records.write_clips(tmp_path / "r", failing())
    with pytest.raises(InputError, match="not one example"):
        records.write_clips(tmp_path / "r", [])
    assert records.read(tmp_path / "r")[0]["clip_id"] == "a"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r"]


def test_a_foreign_folder_is_not_overwritten(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="is not a record folder"):
        records.write_clips(tmp_path, [clip("a")])
    assert (tmp_path / "letter.txt").read_text() == "dear"


@pytest.mark.fault
def test_a_killed_write_leaves_nothing_that_reads_and_the_next_one_succeeds(tmp_path):
    script = (
        "import os, sys, pathlib; from data import records; from tests.data.test_records import clip\n"
        "def examples():\n"
        "    yield clip('a')\n"
        "    os.kill(os.getpid(), 9)\n"
        "records.write_clips(pathlib.Path(sys.argv[1]), examples())"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "r")], check=False)
    assert killed.returncode == -9
    with pytest.raises(InputError, match="does not exist"):
        records.read(tmp_path / "r")
    with pytest.raises(InputError, match="not a record folder"):
        records.read(tmp_path / "r.partial")
    assert records.write_clips(tmp_path / "r", [clip("a"), clip("b")]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r"]
