"""Orbax trees leaf by leaf: what is written here Orbax restores, what Orbax saved is read here."""

import shutil
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.convert import trees
from cogvideox_jax.models.convert.table import Leaf
from cogvideox_jax.parallel import mesh as meshes
from cogvideox_jax.train import checkpoint

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(3, 4, 5)).astype(ml_dtypes.bfloat16)
BIAS = RNG.normal(size=(7,)).astype(np.float32)
ZEROS = np.zeros((2, 3), np.float32)
ARRAYS = {"blocks": {"kernel": KERNEL}, "bias": BIAS, "zeros": ZEROS}


def leaf(array: np.ndarray, *, stacked: bool) -> Leaf:
    return Leaf(array.shape, array.dtype, lambda i: array[i] if stacked else array, stacked=stacked)


LEAVES = {
    "blocks": {"kernel": leaf(KERNEL, stacked=True)},
    "bias": leaf(BIAS, stacked=False),
    "zeros": leaf(ZEROS, stacked=True),
}


def same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for got, array in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        got = np.asarray(got)
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert got.tobytes() == array.tobytes()


def test_what_is_written_orbax_restores(tmp_path):
    trees.write_tree(tmp_path / "tree", LEAVES)
    same(checkpoint.restore_tree(tmp_path / "tree", meshes.make_mesh()), ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_what_orbax_saved_is_read(tmp_path):
    checkpoint.save_tree(tmp_path / "jax", jax.tree.map(jnp.asarray, ARRAYS))
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "zarr3", args=ocp.args.PyTreeSave(ARRAYS))
    for name in ("jax", "zarr3"):
        found = trees.open_tree(tmp_path / name)
        same(jax.tree.map(np.asarray, found), ARRAYS)
        assert trees.count_bytes(found) == KERNEL.nbytes + BIAS.nbytes + ZEROS.nbytes


def test_stacked_leaves_have_a_chunk_per_layer(tmp_path):
    trees.write_tree(tmp_path / "tree", LEAVES)
    kernel = trees.open_tree(tmp_path / "tree")["blocks"]["kernel"]
    assert tuple(kernel._store.chunk_layout.read_chunk.shape) == (1, 4, 5)
    for i in (2, 0, 1):
        assert kernel[i].tobytes() == KERNEL[i].tobytes()
    with pytest.raises(IndexError):
        kernel[3]


def test_layers_of_one_chunk_are_read_together_and_given_up_after_the_last(tmp_path):
    checkpoint.save_tree(tmp_path / "tree", jax.tree.map(jnp.asarray, ARRAYS))
    kernel = trees.open_tree(tmp_path / "tree")["blocks"]["kernel"]
    reads, read = [], kernel._read
    kernel._read = lambda store: reads.append(store.shape) or read(store)
    for i in range(3):
        assert kernel.take(i, 0).tobytes() == KERNEL[i].tobytes()
    assert reads == [(3, 4, 5)]
    assert kernel._group is None
    for i in range(4):
        assert kernel.take(i, 1).tobytes() == KERNEL[:, i].tobytes()


@pytest.mark.parametrize("together", [1, 600])
def test_no_more_is_held_than_goes_together(tmp_path, monkeypatch, together):
    monkeypatch.setattr(trees, "TOGETHER", together)
    held: list[weakref.ref] = []

    def read(i: int) -> np.ndarray:
        array = np.full((64,), i, np.float32)
        held.append(weakref.ref(array))
        # of 256 bytes each, and the one before that is on its way out
        assert sum(ref() is not None for ref in held) <= max(together // 256, 1) + 1
        return array

    leaves = {str(n): Leaf((10, 64), np.float32, read, stacked=True) for n in range(3)}
    trees.write_tree(tmp_path / "tree", leaves | {"x": Leaf((64,), np.float32, read, stacked=False)})
    assert len(held) == 31
    np.testing.assert_array_equal(trees.open_tree(tmp_path / "tree")["2"][7], np.full(64, 7, np.float32))


@pytest.mark.parametrize(("together", "groups"), [(1, [1] * 5), (40, [1, 2, 1, 1]), (10**9, [5])])
def test_small_leaves_are_written_in_groups(tmp_path, monkeypatch, together, groups):
    monkeypatch.setattr(trees, "TOGETHER", together)
    found, serialize = [], ocp.type_handlers.NumpyHandler.serialize

    async def counted(self, values, infos, args=None):
        found.append(len(values))
        return await serialize(self, values, infos, args)

    monkeypatch.setattr(ocp.type_handlers.NumpyHandler, "serialize", counted)
    sizes = {"a": 8, "b": 4, "c": 5, "d": 10, "e": 1}  # float32, in this order
    arrays = {name: np.full((size,), size, np.float32) for name, size in sizes.items()}
    trees.write_tree(tmp_path / "tree", {name: leaf(array, stacked=False) for name, array in arrays.items()})
    assert found == groups
    same(jax.tree.map(np.asarray, trees.open_tree(tmp_path / "tree")), arrays)


def test_a_read_that_fails_leaves_no_tree(tmp_path):
    def read(i: int) -> np.ndarray:
        raise InputError("source broke")

    with pytest.raises(InputError, match="source broke"):
        trees.write_tree(tmp_path / "tree", {"x": Leaf((2, 3), np.float32, read, stacked=True)})
    assert not (tmp_path / "tree").exists()


def test_what_is_missing_is_not_read_as_zeros(tmp_path):
    checkpoint.save_tree(tmp_path / "tree", jax.tree.map(jnp.asarray, ARRAYS))
    with pytest.raises(InputError, match="is no finished Orbax tree"):
        trees.open_tree(tmp_path / "nothing")
    for path in (tmp_path / "tree" / "d").iterdir():
        path.unlink()
    shutil.rmtree(tmp_path / "tree" / "ocdbt.process_0", ignore_errors=True)
    with pytest.raises(InputError, match="cannot be read"):
        jax.tree.map(np.asarray, trees.open_tree(tmp_path / "tree"))


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """Neither when a leaf cannot be read, nor when the disk is full with other writes still under way."""

    def broken(layer: int) -> np.ndarray:
        if layer == 2:
            raise InputError("the source ends here")
        return KERNEL[layer]

    tree = LEAVES | {"z": Leaf(KERNEL.shape, KERNEL.dtype, broken, stacked=True)}
    with pytest.raises(InputError, match="the source ends here"):
        trees.write_tree(tmp_path / "tree", tree)
    assert not list(tmp_path.iterdir())
    # a tree beside it stays
    (tmp_path / "tree2.orbax-checkpoint-tmp").mkdir()
    waited = []

    class Write:
        def __init__(self, number):
            self.number = number

        def exception(self):
            waited.append(self.number)

        def result(self):
            raise ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']")

    async def write(self, value, tspec, ts_context):
        self._writes.append(Write(len(self._writes)))

    monkeypatch.setattr(trees._InParts, "_open_and_write", write)
    with pytest.raises(ValueError, match="No space left"):
        trees.write_tree(tmp_path / "tree", LEAVES)
    assert waited == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["tree2.orbax-checkpoint-tmp"]
