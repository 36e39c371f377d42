"""t5x checkpoints of both formats, written here as t5x writes them (spec t5x.md), become the encoder that they were made of."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import serialization

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.convert import t5x, trees

LAYERS, WIDTH, HEADS, DIM, MLP, VOCABULARY = 3, 12, 2, 8, 20, 40
INNER = HEADS * DIM


def encoder(dtype=np.float32) -> dict:
    """Our tree, random."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.normal(size=shape).astype(dtype)

    return {
        "embedding": array(VOCABULARY, WIDTH),
        "relative_bias": array(32, HEADS),
        "final_norm": {"scale": array(WIDTH)},
        "layers": {
            **{name: {"kernel": array(LAYERS, WIDTH, INNER)} for name in ("query", "key", "value")},
            "out": {"kernel": array(LAYERS, INNER, WIDTH)},
            **{name: {"kernel": array(LAYERS, WIDTH, MLP)} for name in ("wi_0", "wi_1")},
            "wo": {"kernel": array(LAYERS, MLP, WIDTH)},
            "attention_norm": {"scale": array(LAYERS, WIDTH)},
            "mlp_norm": {"scale": array(LAYERS, WIDTH)},
        },
    }


def to_t5x(tree: dict, kind: str) -> dict:
    """t5x's tree: minimal (joined heads, one position table), scalable (heads apart, a table a layer) or scanned."""
    layers = tree["layers"]
    apart = kind != "minimal"

    def layer(i: int) -> dict:
        attention = {name: {"kernel": layers[name]["kernel"][i]} for name in ("query", "key", "value", "out")}
        if apart:
            for name in ("query", "key", "value"):
                attention[name] = {"kernel": attention[name]["kernel"].reshape(WIDTH, HEADS, DIM)}
            attention["out"] = {"kernel": attention["out"]["kernel"].reshape(HEADS, DIM, WIDTH)}
        found = {
            "attention": attention,
            "mlp": {name: {"kernel": layers[name]["kernel"][i]} for name in ("wi_0", "wi_1", "wo")},
            "pre_attention_layer_norm": {"scale": layers["attention_norm"]["scale"][i]},
            "pre_mlp_layer_norm": {"scale": layers["mlp_norm"]["scale"][i]},
        }
        if apart:
            found["relpos_bias"] = {"rel_embedding": tree["relative_bias"].T}
        return found

    inside: dict = {"encoder_norm": {"scale": tree["final_norm"]["scale"]}}
    if kind == "scanned":
        inside["encoder"] = jax.tree.map(lambda *parts: np.stack(parts, 1), *[layer(i) for i in range(LAYERS)])
    else:
        inside |= {f"layers_{i}": layer(i) for i in range(LAYERS)}
    if not apart:
        inside["relpos_bias"] = {"rel_embedding": tree["relative_bias"].T}
    # t5 1.1 has a decoder and a head of its own
    decoder = {"logits_dense": {"kernel": np.ones((WIDTH, VOCABULARY), np.float32)}}
    return {"encoder": inside, "token_embedder": {"embedding": tree["embedding"]}, "decoder": decoder}


SPECS = {
    "file": lambda path: {"driver": "zarr", "kvstore": {"driver": "file", "path": path}},
    "no slash": lambda path: {"driver": "zarr", "kvstore": {"driver": "file", "path": path.rstrip("/")}},
    "gfile": lambda path: {"driver": "zarr", "kvstore": {"driver": "gfile", "path": path}},
    "gcs": lambda path: {"driver": "zarr", "kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket", "path": path}},
    "old": lambda path: {"driver": "zarr", "kvstore": {"driver": "file"}, "path": path},
}


def write_native(root, target, *, spec="file", compressor="gzip", chunks=None, inline=()):
    """Format A: msgpack, and a zarr folder for each array that is not inline."""
    folder = root / "checkpoint_1000"
    folder.mkdir(parents=True)

    def leaf(path, array):
        name = ".".join(str(key.key) for key in path)
        if inline == "all" or name in inline or name.startswith("decoder"):
            return array
        metadata = {"shape": list(array.shape), "compressor": {"id": compressor}, "dtype": _zarr_dtype(array.dtype)}
        metadata["chunks"] = list(chunks(array.shape) if chunks else array.shape)
        store = {"driver": "file", "path": f"{folder}/target.{name}/"}
        ts.open({"driver": "zarr", "kvstore": store, "metadata": metadata}, create=True).result().write(array).result()
        # the copy in the leaf lies: what .zarray says is what counts
        return SPECS[spec](f"target.{name}/") | {"dtype": "float32", "metadata": {"shape": [1], "chunks": [1]}}

    tree = jax.tree_util.tree_map_with_path(leaf, target)
    state = {"version": 3, "optimizer": {"state": {"step": np.int32(1000)}, "target": tree}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(state))
    return folder


def _zarr_dtype(dtype) -> str:
    return "bfloat16" if dtype == ml_dtypes.bfloat16 else np.dtype(dtype).str


def write_orbax(root, target):
    """Format B."""
    folder = root / "checkpoint_1000"
    folder.mkdir(parents=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", {"target": target, "state": {"step": np.int32(1000)}})
    return folder


def same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, got), array in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        values = np.asarray(got)
        assert (values.dtype, values.shape) == (array.dtype, array.shape) == (got.dtype, got.shape), path
        assert values.tobytes() == array.tobytes(), path


FIELDS = {
    "num_layers": LAYERS,
    "width": WIDTH,
    "num_heads": HEADS,
    "head_dim": DIM,
    "mlp_dim": MLP,
    "vocab_size": VOCABULARY,
}


@pytest.mark.parametrize("kind", ["minimal", "scalable", "scanned"])
@pytest.mark.parametrize("write", [write_native, write_orbax], ids=["native", "orbax"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_both_formats_and_all_layouts(tmp_path, kind, write, dtype):
    tree = encoder(dtype)
    write(tmp_path, to_t5x(tree, kind))
    names: list[str] = []
    fields, found = t5x.read(tmp_path, done=names.append)
    assert fields == FIELDS
    assert not names
    same(found, tree)
    # and as it is imported
    trees.write_tree(tmp_path / "out", found)
    same(trees.open_tree(tmp_path / "out"), tree)


@pytest.mark.parametrize("spec", SPECS)
def test_leaves_point_to_their_folders_in_several_ways(tmp_path, spec):
    tree = encoder()
    write_native(tmp_path, to_t5x(tree, "minimal"), spec=spec)
    same(t5x.read(tmp_path)[1], tree)


@pytest.mark.parametrize("compressor", ["gzip", "zstd"])
def test_compressors_and_arrays_written_in_parts(tmp_path, compressor):
    tree = encoder()
    # parts of one and a half layers
    target = to_t5x(tree, "scanned")
    write_native(tmp_path, target, compressor=compressor, chunks=lambda shape: tuple(-(-n // 2) for n in shape))
    same(t5x.read(tmp_path)[1], tree)


def test_everything_inline(tmp_path):
    tree = encoder()
    write_native(tmp_path, to_t5x(tree, "scanned"), inline="all")
    same(t5x.read(tmp_path)[1], tree)


def test_another_dtype(tmp_path):
    tree = encoder()
    write_native(tmp_path, to_t5x(tree, "minimal"))
    found = t5x.read(tmp_path, dtype=ml_dtypes.bfloat16)[1]
    same(found, jax.tree.map(lambda array: array.astype(ml_dtypes.bfloat16), tree))


def test_the_newest_is_taken(tmp_path):
    tree = encoder()
    folder = write_native(tmp_path, to_t5x(tree, "minimal"))
    folder.rename(tmp_path / "checkpoint_900")
    (tmp_path / "checkpoint_1000.tmp-123").mkdir()
    write_native(tmp_path, to_t5x(tree, "scanned"))
    assert t5x.find(tmp_path) == tmp_path / "checkpoint_1000"
    assert t5x.find(tmp_path / "checkpoint_900") == tmp_path / "checkpoint_900"
    assert t5x.find(tmp_path / "checkpoint_900" / "target.encoder.encoder_norm.scale") is None


@pytest.mark.parametrize("suffix", [".tmp-1699999999", ".orbax-checkpoint-tmp", ".orbax-checkpoint-tmp-12"])
def test_an_unfinished_save_is_refused(tmp_path, suffix):
    folder = write_native(tmp_path, to_t5x(encoder(), "minimal"))
    unfinished = folder.rename(tmp_path / f"checkpoint_1000{suffix}")
    for source in (unfinished, tmp_path):
        with pytest.raises(InputError, match="is an unfinished save"):
            t5x.read(source)


@pytest.mark.parametrize("path", ["../outside/", "/etc/", "a/b/", "..", "", None])
def test_a_leaf_may_not_lead_out_of_its_folder(tmp_path, path, monkeypatch):
    monkeypatch.setitem(SPECS, "file", lambda _: {"driver": "zarr", "kvstore": {"driver": "file", "path": path}})
    write_native(tmp_path, to_t5x(encoder(), "minimal"))
    with pytest.raises(InputError, match="expected the name of a folder beside it"):
        t5x.read(tmp_path)


def test_damage_is_named(tmp_path):
    tree = to_t5x(encoder(), "minimal")
    kernel = "target.encoder.layers_1.mlp.wo.kernel"

    def lose_folder(folder):
        shutil.rmtree(folder / kernel)

    def lose_part(folder):
        (folder / kernel / "0.0").unlink()

    def cut_part(folder):
        path = folder / kernel / "0.0"
        path.write_bytes(path.read_bytes()[:40])

    def break_metadata(folder):
        (folder / kernel / ".zarray").write_text(json.dumps({"zarr_format": 2}))

    for damage in (lose_folder, lose_part, cut_part, break_metadata):
        root = tmp_path / damage.__name__
        damage(write_native(root, tree))
        with pytest.raises(InputError, match=kernel):
            jax.tree.map(np.asarray, t5x.read(root)[1])
    folder = write_native(tmp_path / "cut", tree)
    (folder / "checkpoint").write_bytes((folder / "checkpoint").read_bytes()[:-20])
    with pytest.raises(InputError, match="is no t5x checkpoint"):
        t5x.read(folder)
    folder = write_orbax(tmp_path / "orbax", tree)
    for path in (folder / "state" / "d").iterdir():
        path.unlink()
    shutil.rmtree(folder / "state" / "ocdbt.process_0", ignore_errors=True)
    with pytest.raises(InputError, match="cannot be read"):
        jax.tree.map(np.asarray, t5x.read(folder)[1])


def test_other_networks_are_listed(tmp_path):
    def missing(tree):
        del tree["encoder"]["layers_1"]["mlp"]["wo"]
        return r"missing: encoder/layers_1/mlp/wo/kernel$"

    def unknown(tree):
        tree["encoder"]["layers_1"]["mlp"]["gate"] = {"kernel": np.ones((2, 2), np.float32)}
        return "unknown: encoder/layers_1/mlp/gate/kernel"

    def misshapen(tree):
        tree["encoder"]["layers_1"]["mlp"]["wo"]["kernel"] = np.ones((WIDTH, MLP), np.float32)
        return r"misshapen: encoder/layers_1/mlp/wo/kernel is \(12, 20\), expected \(20, 12\)"

    def without_gate(tree):  # t5 1.0
        for i in range(LAYERS):
            del tree["encoder"][f"layers_{i}"]["mlp"]["wi_1"]
        return "missing: encoder/layers_0/mlp/wi_1/kernel"

    def empty(tree):
        tree["encoder"] = {}
        return "holds no encoder layers"

    for change in (missing, unknown, misshapen, without_gate, empty):
        tree = to_t5x(encoder(), "minimal")
        words = change(tree)
        write_native(tmp_path / change.__name__, tree, inline="all")
        with pytest.raises(InputError, match=words):
            t5x.read(tmp_path / change.__name__)


@pytest.mark.parametrize("kind", ["scalable", "scanned"])
def test_position_tables_that_differ_are_refused(tmp_path, kind):
    tree = to_t5x(encoder(), kind)
    if kind == "scanned":
        tree["encoder"]["encoder"]["relpos_bias"]["rel_embedding"][:, 2] += 1
    else:
        tree["encoder"]["layers_2"]["relpos_bias"]["rel_embedding"] = np.ones((HEADS, 32), np.float32)
    write_native(tmp_path, tree, inline="all")
    with pytest.raises(InputError, match="layer 2 has another position table than layer 0"):
        jax.tree.map(np.asarray, t5x.read(tmp_path)[1])
