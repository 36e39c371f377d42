"""The Grain chains: the batch of a step is a pure function of (records, seed, step)."""

import itertools

import numpy as np
import pytest

from cogvideox_jax.core.errors import InputError
from data import pipeline, records, transforms
from tests.data.test_records import clip

VAE = {"num_frames": 5, "height": 16, "width": 16, "batch_size": 2, "seed": 3}


def grey_clip(level: int, num_frames: int) -> dict:
    """A clip of even grey: `level` plus four for each frame, so that a batch tells clip and frame."""
    pictures = np.stack([np.full((16, 32, 3), level + 4 * i, np.uint8) for i in range(num_frames)])
    return clip(f"c{level}", transforms.encode_video(pictures, 8.0, crf=1), num_frames)


def levels(batch: dict) -> np.ndarray:
    """Grey level of each element's first frame, in a batch of `grey_clip`s."""
    first = transforms.denormalize(batch["video"])[:, 0].mean((1, 2, 3))
    return np.round(first).astype(int)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "clips"
    records.write_clips(folder, [grey_clip(40 * i + 20, 9 if i == 2 else 5) for i in range(5)])
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "latents"
    example = {"caption": "x", "source": "y"}
    shapes = {"mean": (3, 2, 4, 16), "logvar": (3, 2, 4, 16), "context": (7, 8)}
    records.write_latents(
        folder,
        [
            example | {"clip_id": f"c{i}"} | {k: np.full(shape, i, np.float32) for k, shape in shapes.items()}
            for i in range(5)
        ],
    )
    return folder


def take(batches, count: int) -> list[dict]:
    return list(itertools.islice(batches, count))


def test_vae_batches_have_shape_range_and_moving_frames(clips):
    batch = next(pipeline.vae_batches(clips, **VAE, start_step=0))["video"]
    assert (batch.shape, batch.dtype) == ((2, 5, 16, 16, 3), np.float32)
    assert -1 <= batch.min() < batch.max() <= 1
    steps = np.diff(transforms.denormalize(batch).astype(float).mean((2, 3, 4)), axis=1)
    np.testing.assert_allclose(steps, 4, atol=1.5)  # consecutive frames, in order


def test_every_epoch_is_a_new_shuffle_of_all_clips(clips):
    seen = np.concatenate([levels(b) for b in take(pipeline.vae_batches(clips, **VAE, start_step=0), 25)])
    epochs = (seen // 40).reshape(10, 5)  # ten epochs of five clips: no clip lost to dropped remainders
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 3


def test_a_longer_clip_gives_windows_at_every_place(clips):
    seen = np.concatenate([levels(b) for b in take(pipeline.vae_batches(clips, **VAE, start_step=0), 100)])
    starts = {round((level - 100) / 4) for level in seen if level // 40 == 2}
    assert starts == {0, 1, 2, 3, 4}


def test_the_batch_is_a_function_of_seed_and_step(clips, monkeypatch):
    whole = [levels(b) for b in take(pipeline.vae_batches(clips, **VAE, start_step=0), 12)]
    resumed = [levels(b) for b in take(pipeline.vae_batches(clips, **VAE, start_step=7), 5)]
    np.testing.assert_array_equal(resumed, whole[7:])
    monkeypatch.setattr(pipeline, "_CACHE_BYTES", 0)
    uncached = [levels(b) for b in take(pipeline.vae_batches(clips, **VAE, start_step=0), 12)]
    np.testing.assert_array_equal(uncached, whole)
    other = [levels(b) for b in take(pipeline.vae_batches(clips, **(VAE | {"seed": 4}), start_step=0), 12)]
    assert not np.array_equal(other, whole)


def test_a_small_data_set_fills_a_larger_batch(clips):
    batch = next(pipeline.vae_batches(clips, **(VAE | {"batch_size": 12}), start_step=0))["video"]
    assert len(batch) == 12


def test_impossible_frame_counts_are_refused_at_once(clips):
    with pytest.raises(InputError, match="4k\\+1"):
        pipeline.vae_batches(clips, **(VAE | {"num_frames": 6}), start_step=0)
    with pytest.raises(InputError, match=r"num_frames=9 is more than the shortest clip .* has \(5\).*min_frames=9"):
        pipeline.vae_batches(clips, **(VAE | {"num_frames": 9}), start_step=0)


def test_diffusion_batches_keep_each_record_together(latents):
    kwargs = {"batch_size": 4, "seed": 0}
    batches = take(pipeline.diffusion_batches(latents, **kwargs, start_step=0), 10)
    source = records.read(latents, "latents")
    for batch in batches:
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            "mean": ((4, 3, 2, 4, 16), np.float32),
            "logvar": ((4, 3, 2, 4, 16), np.float32),
            "context": ((4, 7, 8), np.float32),
            "index": ((4,), np.int32),
        }
        for i, index in enumerate(batch["index"]):
            for key in ("mean", "logvar", "context"):
                np.testing.assert_array_equal(batch[key][i], source[index][key])
    assert sorted(np.concatenate([b["index"] for b in batches]).tolist()) == sorted(list(range(5)) * 8)
    resumed = take(pipeline.diffusion_batches(latents, **kwargs, start_step=6), 4)
    for a, b in zip(resumed, batches[6:], strict=True):
        np.testing.assert_array_equal(a["index"], b["index"])


def test_text_of_another_size_is_refused(latents):
    pipeline.check_text(latents, 7, 8)
    with pytest.raises(InputError, match=r"7 text tokens of width 8.* max_text_tokens=8 of text_dim=8"):
        pipeline.check_text(latents, 8, 8)
    with pytest.raises(InputError, match="text_dim=16"):
        pipeline.check_text(latents, 7, 16)


def test_a_chain_refuses_records_of_the_other_kind(clips, latents):
    with pytest.raises(InputError, match="holds 'latents' records"):
        pipeline.vae_batches(latents, **VAE, start_step=0)
    with pytest.raises(InputError, match="holds 'clips' records"):
        pipeline.diffusion_batches(clips, batch_size=2, seed=0, start_step=0)


def test_fingerprint(clips, latents):
    assert pipeline.fingerprint(clips)["builder"] == "clips"
    assert pipeline.fingerprint(clips)["num_records"] == 5
    assert pipeline.fingerprint(clips)["digest"] != pipeline.fingerprint(latents)["digest"]


def test_processes_load_the_rows_of_one_batch(latents):
    def indices(rows):
        batches = pipeline.diffusion_batches(latents, batch_size=4, seed=1, start_step=2, rows=rows)
        return [batch["index"].tolist() for batch in take(batches, 3)]

    whole = indices(None)
    assert len({tuple(row) for row in whole}) == 3
    for rows in ([0, 1], [2, 3], [1, 3], [0, 1, 2, 3]):
        assert indices(rows) == [[batch[i] for i in rows] for batch in whole]


def test_random_windows_do_not_depend_on_the_process(clips):
    whole = take(pipeline.vae_batches(clips, **VAE | {"batch_size": 4}, start_step=0), 4)
    part = take(pipeline.vae_batches(clips, **VAE | {"batch_size": 4}, start_step=0, rows=[1, 3]), 4)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a["video"][[1, 3]], b["video"])
