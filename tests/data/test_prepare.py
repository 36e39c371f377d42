"""From raw videos to records: each step alone, then all of it on the sample clips."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.tasks import prepare as task
from configs import common
from configs import prepare as config_file
from data import records, transforms
from data.prepare import captions, clips, pipeline, shots
from tests.data.test_transforms import moving

SAMPLES = Path("data/samples")
SETTINGS = {
    "fps": 8.0,
    "num_frames": 9,
    "min_frames": 9,
    "short_side": 48,
    "max_clips_per_shot": 1,
    "trim_frames": 0,
    "min_motion": 1.0,
    "crf": 17,
}


def put_video(path: Path, pictures: np.ndarray | None = None, fps: float = 8.0, caption: str = "a square") -> None:
    path.write_bytes(transforms.encode_video(moving(13) if pictures is None else pictures, fps))
    if caption:
        path.with_suffix(".txt").write_text(caption)


def test_shots_of_bikes_are_found_to_two_frames():
    found = shots.find_shots(SAMPLES / "bikes.mp4", 25.0)
    assert [found[0][0], found[-1][1]] == [0, 250]
    assert [a[1] for a in found[:-1]] == [b[0] for b in found[1:]]
    np.testing.assert_allclose([end for _, end in found[:-1]], [29, 75, 136, 186, 241], atol=2)


def test_a_short_shot_is_seen(tmp_path):
    scenes = np.random.default_rng(0).integers(0, 255, (3, 3, 4, 3)).astype(np.uint8)
    scenes = np.kron(scenes, np.ones((1, 16, 16, 1), np.uint8))
    put_video(tmp_path / "a.mp4", np.repeat(scenes, [20, 8, 20], axis=0))
    assert shots.find_shots(tmp_path / "a.mp4", 8.0) == [(0, 20), (20, 28), (28, 48)]


@pytest.mark.parametrize("name", ["cockatoo.mp4", "box.mp4", "cup.mp4", "carphone_pristine.mp4", "tree.avi"])
def test_one_shot_is_left_whole(name):
    info = transforms.probe(SAMPLES / name)
    assert shots.find_shots(SAMPLES / name, info.fps) == [(0, info.num_frames)]


def test_a_missing_detector_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect.detectors", None)
    with pytest.raises(InputError, match=r"pip install 'cogvideox-jax\[data\]'"):
        shots.detector()


def indices(shot: tuple[int, int], **changes) -> list[list[int]]:
    settings = {"fps": 8.0, "num_frames": 9, "min_frames": 5, "trim_frames": 0, "max_clips": 1} | changes
    return [found.tolist() for found in clips.clip_indices(shot, 8.0, **settings)]


def test_clips_of_a_shot():
    assert indices((10, 19)) == [list(range(10, 19))]
    assert indices((10, 18)) == [list(range(11, 16))]  # eight frames: the most that fit and are 4k+1, in the middle
    assert indices((10, 14)) == []  # below min_frames
    assert indices((10, 19), trim_frames=1) == [list(range(12, 17))]
    assert indices((0, 33), max_clips=9) == [list(range(s, s + 9)) for s in (1, 12, 22)]
    assert indices((0, 33), max_clips=2) == [list(range(5, 14)), list(range(19, 28))]
    assert indices((0, 17), fps=4.0) == [list(range(0, 17, 2))]


def test_cut_decodes_the_asked_frames_in_one_pass(tmp_path):
    put_video(tmp_path / "a.mp4", moving(17, 96, 128))
    whole = transforms.decode(tmp_path / "a.mp4")
    found = list(clips.cut(tmp_path / "a.mp4", [np.array([1, 3, 5, 7, 7]), np.array([10])], 48))
    assert [f.shape for f in found] == [(5, 48, 64, 3), (1, 48, 64, 3)]
    np.testing.assert_array_equal(found[0], transforms.resize_crop(whole[[1, 3, 5, 7, 7]], 48, 64))
    np.testing.assert_array_equal(found[1], transforms.resize_crop(whole[[10]], 48, 64))
    with pytest.raises(InputError, match=r"a\.mp4 ends before frame 17"):
        list(clips.cut(tmp_path / "a.mp4", [np.array([16, 17])], 48))


@pytest.mark.parametrize(("size", "fitted"), [((272, 640), (96, 226)), ((1280, 720), (170, 96)), ((97, 97), (96, 96))])
def test_fit_size_is_even_and_keeps_the_short_side(size, fitted):
    assert clips.fit_size(size[0], size[1], 96) == fitted


def test_motion_score_separates_still_from_moving():
    still = np.repeat(moving(1), 9, axis=0)
    noisy = np.clip(still + np.random.default_rng(0).normal(0, 3, still.shape), 0, 255).astype(np.uint8)
    assert clips.motion_score(still) == 0
    assert clips.motion_score(noisy) < 3 < clips.motion_score(moving(9))
    # half of the picture changes by 100 grey levels each time
    blink = np.zeros((3, 64, 64, 3), np.uint8)
    blink[1, :32] = 100
    assert clips.motion_score(blink) == pytest.approx(50)


def test_sidecars(tmp_path):
    video = tmp_path / "a.mp4"
    assert captions.read_sidecar(video) == []
    (tmp_path / "a.txt").write_text("\n  first   line \nsecond\n")
    assert captions.read_sidecar(video) == [(0.0, float("inf"), "first line")]
    spans = [{"start": 0, "end": 2, "caption": "one"}, {"start": 2, "end": 4, "caption": "two"}]
    (tmp_path / "a.json").write_text(json.dumps(spans))
    found = captions.read_sidecar(video)  # the finer one wins
    assert captions.choose_caption(found, 0.5, 2.4) == "one"
    assert captions.choose_caption(found, 1.7, 2.5) == "two"
    assert captions.choose_caption(found, 4.0, 5.0) is None
    assert captions.choose_caption([], 0, 1) is None


@pytest.mark.parametrize(
    "text", ["[{", '{"start": 0}', '[{"start": 0, "end": 1}]', '[{"start": 2, "end": 1, "caption": "x"}]', "[1]"]
)
def test_a_malformed_sidecar_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json"):
        captions.read_sidecar(tmp_path / "a.mp4")


def test_prepare_counts_what_it_keeps_and_why_it_rejects(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    put_video(folder / "good.mp4")
    put_video(folder / "mute.mp4", caption="")
    put_video(folder / "short.mp4", moving(8))
    put_video(folder / "slow.mp4", fps=4.0)
    put_video(folder / "still.mp4", np.repeat(moving(1), 13, axis=0))
    (folder / "notes.md").write_text("not a video")
    progress = []
    funnel = pipeline.prepare(folder, out, **SETTINGS, on_progress=lambda *values: progress.append(values))
    assert funnel["rejected"] == {"too short": 1, "frame rate too low": 1, "no caption": 1, "static": 1}
    assert {k: funnel[k] for k in ("videos", "shots", "clips", "kept")} == {
        "videos": 5,
        "shots": 5,
        "clips": 3,
        "kept": 1,
    }
    assert {r["source"]: r["reason"] for r in funnel["rejects"]} == {
        "mute.mp4": "no caption",
        "short.mp4": "too short",
        "slow.mp4": "frame rate too low",
        "still.mp4": "static",
    }
    assert json.loads((out / "funnel.json").read_text()) == funnel
    assert progress[-1] == (5, 5, "still.mp4")
    assert [done for done, *_ in progress] == [1, 2, 3, 4, 5]

    source = records.read(out / "records", "clips")
    assert len(source) == 1
    record = source[0]
    assert (record["clip_id"], record["source"], record["caption"]) == ("good-000002", "good.mp4", "a square")
    assert (record["num_frames"], record["height"], record["width"], record["fps"]) == (9, 48, 64, 8)
    assert (record["start_seconds"], record["end_seconds"]) == (0.25, 11 / 8)
    assert json.loads(record["scores"])["motion"] > 3
    error = np.abs(transforms.decode(record["video"]).astype(float) - moving(13)[2:11])
    assert error.mean() < 6  # the right frames, in order


def test_nothing_kept_is_an_error_and_leaves_no_records(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    put_video(folder / "mute.mp4", caption="")
    with pytest.raises(InputError, match=r"no clip was kept \(1 no caption\)"):
        pipeline.prepare(folder, tmp_path / "out", **SETTINGS)
    assert not list((tmp_path / "out").iterdir())


def test_check_refuses_bad_input_and_writes_nothing(tmp_path):
    folder = tmp_path / "in"
    with pytest.raises(InputError, match="is not a folder"):
        pipeline.check(folder, **SETTINGS)
    folder.mkdir()
    with pytest.raises(InputError, match="holds no videos"):
        pipeline.check(folder, **SETTINGS)
    put_video(folder / "a.mp4")
    pipeline.check(folder, **SETTINGS)
    for key, value, message in [
        ("num_frames", 10, "num_frames=10 is not 4k\\+1"),
        ("min_frames", 7, "min_frames must be 4k\\+1"),
        ("min_frames", 13, "min_frames=13 must be at most num_frames=9"),
        ("short_side", 97, "short_side must be even"),
        ("fps", 0, "fps must be more than 0"),
        ("max_clips_per_shot", 0, "max_clips_per_shot must be at least 1"),
        ("trim_frames", -1, "trim_frames must be at least 0"),
        ("min_motion", -1, "min_motion must be at least 0"),
        ("crf", 60, "crf must be 0 to 51"),
    ]:
        with pytest.raises(InputError, match=message):
            pipeline.check(folder, **(SETTINGS | {key: value}))
    before = sorted(p.name for p in folder.iterdir())
    (folder / "b.mp4").write_bytes((folder / "a.mp4").read_bytes()[:200])
    with pytest.raises(InputError, match=r"b\.mp4 cannot be read"):
        pipeline.check(folder, **SETTINGS)
    whole = (folder / "a.mp4").read_bytes()
    pictures, header = whole.index(b"mdat") + 4, whole.index(b"moov") - 4
    (folder / "b.mp4").write_bytes(whole[:pictures] + bytes(header - pictures) + whole[header:])
    transforms.probe(folder / "b.mp4")  # its index is whole
    with pytest.raises(InputError, match=r"b\.mp4 (cannot be read|holds no frames|has only 0 frames)"):
        pipeline.check(folder, **SETTINGS)
    (folder / "b.mp4").unlink()
    shutil.copy(folder / "a.mp4", folder / "a.mov")
    with pytest.raises(InputError, match="differ only in suffix"):
        pipeline.check(folder, **SETTINGS)
    (folder / "a.mov").unlink()
    assert sorted(p.name for p in folder.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_every_sample_has_a_caption_of_its_own():
    spoken = [span.caption for video in pipeline.find_videos(SAMPLES) for span in captions.read_sidecar(video)]
    assert len(pipeline.find_videos(SAMPLES)) == 8
    assert len(set(spoken)) == len(spoken) >= 13
    assert all(15 <= len(caption.split()) <= 40 for caption in spoken)


def test_tiny_config_on_the_samples(tmp_path):
    config = config_file.get_config("tiny")
    task.check(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    result = task.run(config, tmp_path / "run")
    assert result == {
        "num_videos": 8,
        "num_shots": 13,
        "num_clips": 10,
        "rejected": {"too short": 1, "frame rate too low": 1, "no caption": 0, "static": 1},
    }
    funnel = json.loads((tmp_path / "run" / "funnel.json").read_text())
    assert [(r["source"], r["reason"]) for r in funnel["rejects"]] == [
        ("bikes.mp4", "too short"),
        ("text_card.mp4", "static"),
        ("tree.avi", "frame rate too low"),
    ]
    source = records.read(tmp_path / "run" / "records", "clips")
    kept = [source[i] for i in range(len(source))]
    assert len({clip["caption"] for clip in kept}) == 10
    assert sum(clip["source"] == "bikes.mp4" for clip in kept) == 5
    for clip in kept:
        pictures = transforms.decode(clip["video"])
        assert pictures.shape == (9, clip["height"], clip["width"], 3)
        assert min(pictures.shape[1:3]) == 96


def test_full_config_is_cogvideox_shaped():
    config = config_file.get_config()
    assert (config.num_frames, config.fps, config.short_side) == (49, 8.0, 480)
    assert config_file.get_config("tiny").keys() == config.keys()


def test_config_argument():
    defaults = {"tiny": False, "steps": 100, "rate": 0.5, "name": "a"}
    assert common.parse_arg("", **defaults).to_dict() == defaults
    parsed = common.parse_arg("tiny,steps=5,rate=2,name=b", **defaults)
    assert parsed.to_dict() == {"tiny": True, "steps": 5, "rate": 2.0, "name": "b"}
    assert isinstance(parsed.rate, float)
    assert common.parse_arg("tiny=false", **defaults).tiny is False
    with pytest.raises(ValueError, match=r"unknown config argument 'tny': known are tiny, steps, rate, name"):
        common.parse_arg("tny", **defaults)
    for wrong in ("steps", "steps=x", "steps=1.5", "tiny=maybe"):
        with pytest.raises(ValueError, match="takes a value of type"):
            common.parse_arg(wrong, **defaults)
