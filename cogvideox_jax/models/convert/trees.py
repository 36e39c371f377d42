"""Parameter trees in Orbax's format, read and written leaf by leaf: what is larger than memory can be converted.

Orbax's own save and restore hold a whole tree. What is written here is an ordinary Orbax tree (train.checkpoint.restore_tree
reads it), and any Orbax tree is read here.
"""

import glob
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.convert.files import read_json
from cogvideox_jax.models.convert.table import Leaf, put

TOGETHER = 64_000_000  # bytes


class StoredArray:
    """An array in tensorstore, read when it is asked for: `np.asarray(x)`, or `x.take(i, axis)` for one layer.

    Layers are read as they are stored: where a chunk holds several, they are read together and kept until the last of
    them has been taken, so that going through them in order reads every chunk once.
    """

    def __init__(self, spec: dict[str, Any], where: str):
        """Opens the array (its metadata only). Raises InputError, naming `where`, if there is none."""
        self._where = where
        try:
            # a chunk that is not there would otherwise be read as zeros
            self._store = ts.open({**spec, "fill_missing_data_reads": False}, open=True, read=True).result()
        except (ValueError, OSError) as error:
            raise _broken(where, error) from None
        self.shape, self.dtype = tuple(self._store.shape), self._store.dtype.numpy_dtype
        self._group: tuple[int, int, np.ndarray] | None = None

    def _read(self, store: Any) -> np.ndarray:
        try:
            return store.read().result()
        except (ValueError, OSError) as error:
            raise _broken(self._where, error) from None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._read(self._store)
        return array if dtype is None else array.astype(dtype, copy=False)

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.take(layer, 0)

    def take(self, layer: int, axis: int) -> np.ndarray:
        """Layer `layer` along `axis`, without that dimension."""
        if not 0 <= layer < self.shape[axis]:
            raise IndexError(layer)
        depth = (self._store.chunk_layout.read_chunk.shape or self.shape)[axis] or self.shape[axis]
        start = layer - layer % depth
        stop = min(start + depth, self.shape[axis])
        if self._group is None or self._group[:2] != (start, axis):
            everywhere: list[slice] = [slice(None)] * len(self.shape)
            everywhere[axis] = slice(start, stop)
            self._group = (start, axis, self._read(self._store[tuple(everywhere)]))
        values = np.take(self._group[2], layer - start, axis)
        if layer == stop - 1:
            self._group = None
        return values


def _broken(where: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300]
    return InputError(f"{where} cannot be read ({reason}): copy the whole folder again from where it came")


def open_ocdbt(folder: Path, name: str, *, zarr3: bool) -> StoredArray:
    """One array of an Orbax tree by its name, path parts joined by dots."""
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}, "path": f"{name}/"}
    return StoredArray({"driver": "zarr3" if zarr3 else "zarr", "kvstore": store}, f"{folder}: {name}")


def open_tree(folder: Path) -> dict[str, Any]:
    """An Orbax tree as a nested dict with a StoredArray for each leaf. Raises InputError if the folder holds none."""
    path = folder / "_METADATA"
    if not path.is_file():
        raise InputError(f"{folder} is no finished Orbax tree: give the folder that the task wrote")
    metadata = read_json(path)
    tree: dict[str, Any] = {}
    try:
        for row in metadata["tree_metadata"].values():
            keys = [str(key["key"]) for key in row["key_metadata"]]
            put(tree, "/".join(keys), open_ocdbt(folder, ".".join(keys), zarr3=bool(metadata.get("use_zarr3"))))
    except (KeyError, TypeError, AttributeError) as error:
        raise _broken(str(path), error) from None
    return tree


class _InParts(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, given leaves that exist only while they are written.

    What is written together becomes one commit of the store, so that small leaves go in groups.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._writes: list[Any] = []

    def _wait(self) -> None:
        # blocking, and not awaited: a loop that an error has closed would be called back by the writes still under way
        for write in self._writes:
            write.result()
        self._writes.clear()

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list:
        try:
            await self._serialize(values, infos, args)
        finally:
            for (
                write
            ) in self._writes:  # still under way after an error: files would appear behind the back of a clean-up
                write.exception()
            self._writes.clear()
        return []

    async def _serialize(self, values: Any, infos: Any, args: Any) -> None:
        groups: list[list[int]] = []
        held = TOGETHER
        for i, value in enumerate(values):
            if held + _nbytes(value.shape, value) > TOGETHER:
                groups.append([])
                held = 0
            groups[-1].append(i)
            held += _nbytes(value.shape, value)
        for group in groups:
            rows = [[rows[i] for i in group] for rows in (values, infos, args)]
            for future in await super().serialize(*rows):
                future.result()
            self._wait()

    async def _open_and_write(self, value: Leaf, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        # the one method of Orbax's that is overridden though it is private: between its specification of an array, which is
        # kept, and the values. tests/models/test_convert_trees.py reads back what it wrote with Orbax's own restore.
        store = ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context).result()
        if not value.stacked:
            self._writes.append(store.write(np.asarray(value)))
            return
        step = max(TOGETHER // max(_nbytes(value.shape[1:], value), 1), 1)
        for layer in range(value.shape[0]):
            if layer and layer % step == 0:
                self._wait()
            self._writes.append(store[layer].write(value[layer]))


def _nbytes(shape: tuple[int, ...], leaf: Any) -> int:
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def write_tree(folder: Path, tree: Any) -> None:
    """Write a tree of `Leaf` as an Orbax tree, whole or not at all. At most TOGETHER bytes, or one layer, are in memory.

    An error while writing leaves nothing; a process that is killed leaves FOLDER.orbax-checkpoint-tmp*.

    Stacked leaves get a chunk per layer, so that they can be read by the layer too.
    """
    # Orbax warns about a registry without a handler of jax arrays
    registry = ocp.type_handlers.create_type_handler_registry(
        (Leaf, _InParts()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    save_args = jax.tree.map(lambda leaf: ocp.SaveArgs(shard_axes=(0,) if leaf.stacked else ()), tree)
    folder = folder.resolve()
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args))
    except BaseException:
        for path in folder.parent.glob(glob.escape(folder.name) + ".orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        raise


def count_bytes(tree: Any, dtype: Any = None) -> int:
    """Bytes of a tree's values, in another dtype if one is given."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * np.dtype(dtype or leaf.dtype).itemsize for leaf in leaves)
