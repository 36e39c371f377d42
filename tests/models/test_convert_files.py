"""Weight files: what is whole comes back bit for bit, what is not is refused by name, and nothing in it is run."""

import json
import os
import pickle
import struct
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.convert import files
from cogvideox_jax.models.convert.files import Spec
from tests.models.folders import read, safetensors

RNG = np.random.default_rng(0)
TENSORS = {
    "b": RNG.normal(size=(3,)).astype(ml_dtypes.bfloat16),
    "a": RNG.normal(size=(4, 5)).astype(np.float32),
    "h": RNG.normal(size=(2, 1, 3)).astype(np.float16),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array([7], np.int64).reshape(()),
}
LAYOUT = {name: Spec(array.shape, array.dtype) for name, array in TENSORS.items()}


def same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        got = np.asarray(found[name])
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert got.tobytes() == array.tobytes(), name


def test_read_a_file_from_elsewhere(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(TENSORS, {"format": "pt"}))
    for source in (path, tmp_path):
        same(files.open_tensors(source), TENSORS)
    assert files.open_file(path)[1] == {"format": "pt"}


@pytest.mark.parametrize("limit", [10**9, 90, 10])
def test_written_and_read_again(tmp_path, limit):
    # in another order than the layout's
    paths = files.write_tensors(
        tmp_path, LAYOUT, reversed(TENSORS.items()), basename="model", max_shard_bytes=limit, metadata={"format": "pt"}
    )
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".safetensors") == [p.name for p in paths]
    same(files.open_tensors(tmp_path), TENSORS)
    # an independent reader agrees, and every tensor starts where its type may start
    raw = read(tmp_path)
    assert {name: row[2] for name, row in raw.items()} == {name: array.tobytes() for name, array in TENSORS.items()}
    for path in paths:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        assert length % 8 == 0
        header = json.loads(content[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, row in header.items():
            assert row["data_offsets"][0] % TENSORS[name].dtype.itemsize == 0
    if limit == 10**9:
        assert [path.name for path in paths] == ["model.safetensors"]
        assert not (tmp_path / "model.safetensors.index.json").exists()
    else:
        assert paths[0].name == f"model-00001-of-{len(paths):05d}.safetensors"
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in TENSORS.values())
        assert index["weight_map"].keys() == TENSORS.keys()


def test_split_is_that_of_huggingface_hub():
    # 6, 6, 2, 6, 2, 2 at a limit of 10 become [6], [6, 2], [6, 2, 2]; what exceeds the limit stands alone
    sizes = {"a": 6, "b": 6, "c": 2, "big": 11, "d": 6, "e": 2, "f": 2}
    layout = {name: Spec((size,), np.dtype(np.int8)) for name, size in sizes.items()}
    assert files.split(layout, 10) == [["a"], ["big"], ["b", "c"], ["d", "e", "f"]]


def test_only_what_is_asked_for_is_read(tmp_path):
    # four terabytes by its header, a few kilobytes on disk
    header = {
        "huge": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [1 << 42, (1 << 42) + 8]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek((1 << 42), os.SEEK_CUR)
        file.write(np.array([1, 2], np.float32).tobytes())
    found = files.open_tensors(path)
    assert found["huge"].shape == (1 << 40,)
    np.testing.assert_array_equal(np.asarray(found["small"]), [1, 2])


def test_one_tensor_is_held_at_a_time(tmp_path):
    held: list[weakref.ref] = []

    def tensors():
        for i in range(20):
            array = np.full((8,), i, np.float32)
            held.append(weakref.ref(array))
            assert sum(ref() is not None for ref in held) <= 2
            yield f"t{i}", array

    layout = {f"t{i}": Spec((8,), np.dtype(np.float32)) for i in range(20)}
    files.write_tensors(tmp_path, layout, tensors(), basename="model", max_shard_bytes=64)
    assert len(files.open_tensors(tmp_path)) == 20


@pytest.mark.parametrize("fault", ["raises", "lacks one", "other shape", "other dtype"])
def test_a_write_that_fails_leaves_nothing(tmp_path, fault):
    def tensors():
        for name, array in TENSORS.items():
            if name == "h":
                if fault == "raises":
                    raise OSError("disk full")
                if fault == "lacks one":
                    continue
                array = array[0] if fault == "other shape" else array.astype(np.float32)
            yield name, array

    with pytest.raises((OSError, ValueError)):
        files.write_tensors(tmp_path, LAYOUT, tensors(), basename="model", max_shard_bytes=40)
    assert not list(tmp_path.iterdir())


def header(**rows) -> bytes:
    """A file with 16 bytes of data and this header."""
    text = json.dumps(rows).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


def row(start: int, stop: int, shape=(4,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


WHOLE = header(a=row(0, 16))
LYING = {
    "cut short in the data": (WHOLE[:-1], "holds 15 bytes of tensors, its header describes 16"),
    "cut short in the header": (WHOLE[:20], "cut short or no safetensors file"),
    "empty": (b"", "has 0 bytes"),
    "more data than described": (WHOLE + b"x", "holds 17 bytes of tensors, its header describes 16"),
    "header longer than the file": (struct.pack("<Q", 1 << 62) + b"{}", "cut short"),
    "overlap": (header(a=row(0, 16), b=row(8, 16, (2,))), "overlaps"),
    "the same bytes twice": (header(a=row(0, 16), b=row(0, 16)), "overlaps"),
    "gap": (header(a=row(0, 4, (1,)), b=row(8, 16, (2,))), "leaves a gap"),
    "beyond the end": (header(a=row(0, 1 << 40, (1 << 38,))), "its header describes 1099511627776"),
    "before the start": (header(a=row(-16, 0)), "expected counts"),
    "shape too large for its bytes": (header(a=row(0, 16, (5,))), "takes 20 bytes, the header gives it 16"),
    "negative shape": (header(a=row(0, 16, (-2, -2))), "expected counts"),
    "shape of other things": (header(a=row(0, 16, ("4",))), "expected counts"),
    "shape of truths": (header(a=row(0, 4, (True,)), b=row(4, 16, (3,))), "expected counts"),
    "unknown dtype": (header(a=row(0, 16, dtype="Q4")), "has dtype 'Q4'"),
    "dtype of another kind": (header(a=row(0, 16, dtype=["F32"])), "has dtype"),
    "no offsets": (header(a={"dtype": "F32", "shape": [4]}), "is not described by"),
    "no object": (header(a=4), "is not described by"),
    "metadata of other things": (header(__metadata__={"x": 1}, a=row(0, 16)), "__metadata__"),
    "a list": (struct.pack("<Q", 2) + b"[]", "holds a list"),
    "no JSON": (struct.pack("<Q", 4) + b"{abc" + bytes(16), "not readable as JSON"),
    "no text": (struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe", "not readable as JSON"),
    "nested too deeply": (struct.pack("<Q", 200_000) + b"[" * 200_000, "nested too deeply"),
    "a number too long": (struct.pack("<Q", 9_000) + b"9" * 9_000, "not readable as JSON"),
}
TWICE = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
LYING["a key twice"] = (struct.pack("<Q", len(TWICE)) + TWICE + bytes(16), "a stands there twice")


@pytest.mark.parametrize("fault", LYING)
def test_a_file_that_does_not_add_up_is_refused(tmp_path, fault):
    content, words = LYING[fault]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        files.open_tensors(tmp_path)
    message = str(error.value)
    assert str(path) in message
    assert words in message
    assert "\n" not in message


def test_a_file_cut_short_after_it_was_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(WHOLE)
    found = files.open_tensors(path)
    path.write_bytes(WHOLE[:-1])
    with pytest.raises(InputError, match="ends within a"):
        np.asarray(found["a"])


class Bomb:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.bin", "weights.pt", "model.ckpt"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_is_never_opened(tmp_path, name, protocol):
    fired = tmp_path / "fired"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Bomb(fired), protocol=protocol))
    for source in (folder, folder / name):
        with pytest.raises(InputError, match="is a pickle, which can run any program") as error:
            files.open_tensors(source)
        assert name in str(error.value)
    assert not fired.exists()


def test_a_zipped_pickle_is_named_as_such(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(InputError, match="is a pickle"):
        files.open_tensors(tmp_path)


def test_a_header_as_long_as_a_pickle_s_first_bytes_is_none(tmp_path):
    # 640 is 80 02 in the file, as a pickle's first bytes are
    path = tmp_path / "model.safetensors"
    text = WHOLE[8:-16].ljust(640)
    path.write_bytes(struct.pack("<Q", 640) + text + WHOLE[-16:])
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert np.asarray(files.open_tensors(path)["a"]).shape == (4,)


def sharded(folder: Path, weight_map: dict | None = None, **shards: dict[str, np.ndarray]) -> Path:
    for name, tensors in shards.items():
        (folder / f"{name}.safetensors").write_bytes(safetensors(tensors))
    if weight_map is None:
        weight_map = {key: f"{name}.safetensors" for name, tensors in shards.items() for key in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


ONE, TWO = {"a": np.ones(2, np.float32)}, {"b": np.ones(3, np.float32)}


def test_an_index_is_followed(tmp_path):
    index = sharded(tmp_path, x=ONE, y=TWO)
    for source in (tmp_path, index):
        same(files.open_tensors(source), ONE | TWO)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 3, None])
def test_an_index_may_not_lead_out_of_its_folder(tmp_path, file):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder, folder / "sub"):
        (place / "x.safetensors").write_bytes(safetensors(ONE))
    sharded(folder, {"a": file})
    with pytest.raises(InputError, match="expected the name of a file beside it") as error:
        files.open_tensors(folder)
    assert "model.safetensors.index.json" in str(error.value)


def test_what_an_index_says_must_be_so(tmp_path):
    faults = {
        "missing": (dict(weight_map={"a": "x.safetensors", "b": "z.safetensors"}, x=ONE), "z.safetensors is missing"),
        "pickle": (dict(weight_map={"a": "x.bin"}, x=ONE), "is a pickle"),
        "claimed": (dict(weight_map={"a": "x.safetensors", "b": "x.safetensors"}, x=ONE), "disagree .* b"),
        "not claimed": (dict(weight_map={"a": "x.safetensors"}, x=ONE | TWO), "disagree .* b"),
        "doubled": (
            dict(weight_map={"a": "x.safetensors", "b": "y.safetensors"}, x=ONE, y=ONE | TWO),
            "holds again what another file holds: a",
        ),
        "empty": (dict(weight_map={}), "no weight_map"),
    }
    for name, (arguments, words) in faults.items():
        folder = tmp_path / name
        folder.mkdir()
        sharded(folder, **arguments)
        with pytest.raises(InputError, match=words):
            files.open_tensors(folder)


def test_two_kinds_of_weights_in_a_folder_are_refused(tmp_path):
    sharded(tmp_path, x=ONE)
    (tmp_path / "model.safetensors").write_bytes(safetensors(ONE))
    with pytest.raises(InputError, match="remove the one that is not meant"):
        files.open_tensors(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(InputError, match=r"holds no weights: expected diffusion_pytorch_model\.safetensors"):
        files.open_tensors(tmp_path)


def test_json_from_elsewhere(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        files.read_json(path)
    for content, words in (("[" * 100_000, "nested too deeply"), ("{", "JSON"), ('{"a": 1, "a": 2}', "twice")):
        path.write_text(content)
        with pytest.raises(InputError, match=words):
            files.read_json(path)


def test_listing_is_short_and_points_to_the_nearest():
    text = files.listing([f"blocks.{i}.weight" for i in range(12)], ["blocks.0.weigth"])
    assert text.startswith("blocks.0.weight (nearest: blocks.0.weigth), ")
    assert text.endswith(" and 2 more")
