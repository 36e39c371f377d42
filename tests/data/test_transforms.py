"""The numpy functions between files and arrays."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from absl import logging

from cogvideox_jax.core.errors import InputError
from data import transforms

SAMPLES = Path("data/samples")
VOCABULARY = Path("data/vocab/t5_spiece.model")


def moving(num_frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    """A bright square that moves right on a smooth background; frame number readable from its place."""
    y, x = np.mgrid[:height, :width]
    pictures = np.stack([np.stack([x * 2, y * 3, x + y], -1)] * num_frames).astype(np.uint8)
    for i, picture in enumerate(pictures):
        picture[8:24, 4 * i : 4 * i + 16] = 250
    return pictures


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


@pytest.mark.parametrize(
    ("name", "num_frames", "height", "width", "fps"),
    [
        ("bikes.mp4", 250, 272, 640, 25),
        ("box.mp4", 455, 480, 640, 29.965),  # its header counts one frame too many
        ("tree.avi", 68, 240, 320, 2.2686),  # its header claims 444 frames at 15 fps
    ],
)
def test_probe_measures_instead_of_believing_headers(name, num_frames, height, width, fps):
    info = transforms.probe(SAMPLES / name)
    assert info[:3] == (num_frames, height, width)
    assert info.fps == pytest.approx(fps, rel=1e-4)
    assert info.duration == pytest.approx(num_frames / fps, rel=1e-4)


def test_encode_then_decode_keeps_picture_order_and_rate():
    pictures = moving()
    encoded = transforms.encode_video(pictures, 8.0)
    decoded = transforms.decode(encoded)
    assert decoded.shape == pictures.shape
    assert decoded.dtype == np.uint8
    assert psnr(decoded, pictures) > 30
    assert transforms.probe(encoded) == (9, 48, 64, 8.0, 9 / 8)
    some = transforms.decode(encoded, [5, 0, 5])
    np.testing.assert_array_equal(some, decoded[[5, 0, 5]])
    assert len(transforms.encode_video(pictures, 8.0, crf=40)) < len(encoded)


def test_encoding_is_exact():
    # sizes at which x264's defaults give other bytes each time, on processors with AVX-512
    pictures = transforms.resize_crop(transforms.decode(SAMPLES / "bikes.mp4", range(40, 66, 3)), 96, 224)
    rng = np.random.default_rng(0)
    results = set()
    for _ in range(6):
        noise = rng.integers(0, 255, (9, 96, 226, 3)).astype(np.uint8)
        transforms.encode_video(noise, 8.0)  # leaves other things in the memory that is used again
        results.add(transforms.encode_video(pictures, 8.0))
    assert len(results) == 1


def test_odd_sizes_are_refused_before_the_encoder():
    with pytest.raises(InputError, match="even sizes, got 48x63"):
        transforms.encode_video(moving(width=63), 8.0)


def test_unreadable_files_are_named(tmp_path):
    text = tmp_path / "a.mp4"
    text.write_text("not a video at all")
    for use in (transforms.probe, transforms.decode):
        with pytest.raises(InputError, match=r"a\.mp4 cannot be read as a video .*: replace it or remove it"):
            use(text)
    with pytest.raises(InputError, match=r"gone\.mp4 cannot be read"):
        transforms.decode(tmp_path / "gone.mp4")
    whole = transforms.encode_video(moving(), 8.0)
    with pytest.raises(InputError, match="encoded video of 300 bytes"):
        transforms.decode(whole[:300])
    with pytest.raises(InputError, match="only 9 frames, frame 9 was asked for"):
        transforms.decode(whole, [0, 9])


def test_damage_inside_a_video_is_not_passed_on():
    """FFmpeg hides damage: it fills in what it could not decode and gives every frame without an error."""
    encoded = transforms.encode_video(transforms.decode(SAMPLES / "bikes.mp4", range(80, 89)), 8.0)
    start = encoded.index(b"mdat") + 4
    messages = []
    for place in range(start + 5000, start + 25000, 5000):
        damaged = bytearray(encoded)
        damaged[place] ^= 0x55
        with pytest.raises(InputError) as caught:
            transforms.decode(bytes(damaged))
        messages.append(str(caught.value))
    assert any("is damaged at frame" in message for message in messages)


def test_a_file_cannot_point_elsewhere(tmp_path):
    """A playlist under a video's name makes FFmpeg open what it lists; here it must not be opened at all."""
    (tmp_path / "secret.mp4").write_bytes(transforms.encode_video(moving(), 8.0))
    playlist = tmp_path / "x.mp4"
    playlist.write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with av.open(str(playlist)) as container:  # this is what an open without the guard does
        assert container.format.name == "concat"
    with pytest.raises(InputError, match=r"x\.mp4 cannot be read"):
        transforms.decode(playlist)


def test_a_file_without_video_is_named(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), mode="w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError, match=r"sound\.mp4 has no video stream"):
        transforms.probe(tmp_path / "sound.mp4")


def test_huge_pictures_are_refused_before_decoding(monkeypatch):
    encoded = transforms.encode_video(moving(), 8.0)
    monkeypatch.setattr(transforms, "_MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(InputError, match="declares 64x48 pixels"):
        transforms.decode(encoded)


def test_choose_frames_keeps_the_rate():
    np.testing.assert_array_equal(
        transforms.choose_frames(30, 25.0, 9, 8.0, start=2), [2, 5, 8, 11, 14, 18, 21, 24, 27]
    )
    np.testing.assert_array_equal(transforms.choose_frames(5, 8.0, 5, 8.0), range(5))
    with pytest.raises(InputError, match="use 5 or 9"):
        transforms.choose_frames(100, 8.0, 8, 8.0)
    with pytest.raises(InputError, match=r"source frame 8, but there are 8"):
        transforms.choose_frames(8, 8.0, 9, 8.0)


def test_resize_crop_keeps_aspect_and_centre():
    pictures = np.zeros((2, 90, 200, 3), np.uint8)
    pictures[:, 30:60, 85:115] = 255  # a square of a third of the height, in the centre
    small = transforms.resize_crop(pictures, 30, 30)
    assert small.shape == (2, 30, 30, 3)
    white = small[0, :, :, 0] > 127
    assert (white.sum(0).max(), white.sum(1).max()) == (10, 10)  # still square
    np.testing.assert_array_equal(white, white[::-1, ::-1])  # still centred
    assert transforms.resize_crop(pictures, 180, 100).shape == (2, 180, 100, 3)  # enlarging covers too
    assert transforms.resize_crop(pictures, 90, 200) is pictures


def test_reducing_does_not_alias():
    """Columns of alternating black and white average to grey. A filter that skips pixels would give black or white."""
    stripes = np.zeros((1, 64, 512, 3), np.uint8)
    stripes[:, :, ::2] = 255
    small = transforms.resize_crop(stripes, 8, 64)
    assert np.abs(small[:, :, 4:-4].astype(int) - 127).max() < 12


def test_normalize_is_undone_exactly():
    every = np.arange(256, dtype=np.uint8)
    video = transforms.normalize(every)
    assert (video.dtype, video[0], video[-1]) == (np.float32, -1, 1)
    np.testing.assert_array_equal(video, every / np.float32(127.5) - 1)
    np.testing.assert_array_equal(transforms.denormalize(video), every)
    np.testing.assert_array_equal(transforms.denormalize(np.array([-1.5, 1.5])), [0, 255])


def test_tokenizer_follows_t5():
    tokenizer = transforms.Tokenizer(VOCABULARY, 12)
    ids = tokenizer(["translate English to German: That is good.", ""])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [[13959, 1566, 12, 2968, 10, 466, 19, 207, 5, 1, 0, 0], [1] + [0] * 11])
    assert tokenizer.vocab_size == 32_000


def test_tokenizer_cuts_before_eos_and_says_so(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: said.append(message % values))
    text = "translate English to German: That is good."
    np.testing.assert_array_equal(transforms.Tokenizer(VOCABULARY, 4)([text]), [[13959, 1566, 12, 1]])
    assert said == ["caption cut by 6 of 10 tokens (max_tokens=4)"]
    transforms.Tokenizer(VOCABULARY, 10)([text])  # fits exactly
    assert len(said) == 1


def test_tokenizer_needs_its_model(tmp_path):
    with pytest.raises(InputError, match=r"no\.model is not a readable sentencepiece model"):
        transforms.Tokenizer(tmp_path / "no.model", 8)
    (tmp_path / "bad.model").write_bytes(b"\x07garbage" * 9)
    with pytest.raises(InputError, match=r"bad\.model is not a readable"):
        transforms.Tokenizer(tmp_path / "bad.model", 8)


def test_mkv_without_frame_count_is_probed():
    file = io.BytesIO()
    with av.open(file, mode="w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for picture in moving(13):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    info = transforms.probe(file.getvalue())
    assert info.num_frames == 13
    assert info.fps == pytest.approx(10)
