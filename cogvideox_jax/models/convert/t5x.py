"""T5 encoders from t5x checkpoints, both formats, without t5x (spec t5x.md).

Format A, native: DIR/checkpoint_N/checkpoint is flax msgpack; larger arrays are zarr folders beside it, to which leaves point.
Format B, through Orbax: DIR/checkpoint_N/state is an Orbax tree.
In both the layers may be separate (encoder/layers_0/...) or scanned (encoder/encoder/..., layers on the second dimension). The
decoder, where there is one, is not looked at.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorstore as ts
from flax import serialization

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.convert.files import listing
from cogvideox_jax.models.convert.table import FLOATS, Leaf, cast, put
from cogvideox_jax.models.convert.trees import StoredArray, open_ocdbt

_STEP = re.compile(r"checkpoint_(\d+)")
# t5x's name of a layer's part -> ours; beside it the dimensions that t5x may keep apart (heads, head_dim) or joined
_PARTS = {
    "attention/query/kernel": "query/kernel",
    "attention/key/kernel": "key/kernel",
    "attention/value/kernel": "value/kernel",
    "attention/out/kernel": "out/kernel",
    "mlp/wi_0/kernel": "wi_0/kernel",
    "mlp/wi_1/kernel": "wi_1/kernel",
    "mlp/wo/kernel": "wo/kernel",
    "pre_attention_layer_norm/scale": "attention_norm/scale",
    "pre_mlp_layer_norm/scale": "mlp_norm/scale",
}
_TABLE = "relpos_bias/rel_embedding"


def find(source: Path) -> Path | None:
    """The checkpoint folder that `source` is or holds (the newest), None if it is no t5x folder.

    Raises InputError for an unfinished save, checkpoint_N.tmp-*, and for a folder that holds nothing else.
    """
    if re.search(r"\.(tmp-|orbax-checkpoint-tmp)", source.name):
        raise InputError(f"{source} is an unfinished save: give a checkpoint_N folder without .tmp")
    if (source / "checkpoint").is_file() or (source / "state" / "manifest.ocdbt").is_file():
        return source
    if not source.is_dir():
        return None
    steps = {int(m[1]): path for path in source.iterdir() if (m := _STEP.fullmatch(path.name)) and path.is_dir()}
    if steps:
        return find(steps[max(steps)])
    for path in source.glob("checkpoint_*"):
        find(path)
    return None


def _relative(spec: Mapping[str, Any], name: str, folder: Path) -> Path:
    """The zarr folder that a leaf of format A points to: always beside the msgpack file, whatever the driver was."""
    kvstore = spec.get("kvstore", {})
    # tensorstore before 0.1.14 wrote the path at the top
    path = kvstore.get("path", spec.get("path")) if isinstance(kvstore, Mapping) else None
    parts = PurePosixPath(path).parts if isinstance(path, str) else ()
    if len(parts) != 1 or parts[0] in ("..", "/"):
        raise InputError(f"{folder / 'checkpoint'}: {name} lies in {path!r}, expected the name of a folder beside it")
    array = folder / parts[0]
    if not (array / ".zarray").is_file():
        raise InputError(f"{array} holds no array ({name}): copy the whole checkpoint folder again")
    return array


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or tree.get("driver") == "zarr":
        return {prefix.rstrip("/"): tree}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}/")
    return flat


def _native(folder: Path) -> dict[str, Any]:
    path = folder / "checkpoint"
    try:
        state = serialization.msgpack_restore(path.read_bytes())
        leaves = _flat(state["optimizer"]["target"])
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a readable checkpoint folder") from None
    except Exception as error:  # msgpack and flax raise a dozen kinds for bytes that are none of theirs
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:150]}"
        raise InputError(f"{path} is no t5x checkpoint ({reason}): copy the whole folder again") from None
    arrays: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if name.startswith("decoder/"):
            continue
        if isinstance(leaf, Mapping):
            array = _relative(leaf, name, folder)
            # what .zarray says is trusted, not the copy of it in the leaf
            store = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{array.resolve()}/"}}
            leaf = StoredArray(store, str(array))
        arrays[name] = leaf
    return arrays


def _orbax(folder: Path) -> dict[str, Any]:
    state = folder / "state"
    base = {"driver": "file", "path": f"{state.resolve()}/"}
    try:
        keys = ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{state} cannot be read ({reason}): copy the whole checkpoint folder again") from None
    arrays: dict[str, Any] = {}
    for key in sorted(key.decode() for key in keys):
        name, _, file = key.rpartition("/")
        inner = name.removeprefix("optimizer.").removeprefix("target.")
        if file in (".zarray", "zarr.json") and inner != name and not inner.startswith("decoder."):
            arrays[inner.replace(".", "/")] = open_ocdbt(state, name, zarr3=file == "zarr.json")
    return arrays


def read(
    source: Path, *, dtype: Any = None, done: Callable[[str], None] = lambda name: None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A t5x checkpoint's encoder: (fields of T5Encoder, our tree of table.Leaf). No array is read yet.

    Args:
      source: checkpoint_N, or a folder that holds some (the newest is taken).
      dtype: to convert to; None keeps each array's.
      done: is called with each array's (or layer's) name when it has been read.

    Raises InputError for unfinished saves, for what is missing or unknown, and where the layers have different position
    tables, which this encoder cannot hold (scalable_t5 keeps one a layer; those converted from the published one are equal).
    """
    folder = find(source)
    if folder is None:
        raise InputError(f"{source} holds no t5x checkpoint: give a checkpoint_N folder")
    arrays = _native(folder) if (folder / "checkpoint").is_file() else _orbax(folder)
    for name, array in arrays.items():
        if np.dtype(getattr(array, "dtype", object)) not in FLOATS:
            raise InputError(f"{folder}: {name} is no array of floats")
    scanned = any(name.startswith("encoder/encoder/") for name in arrays)
    encoder = _Encoder(arrays, folder, scanned=scanned)
    fields = encoder.fields()
    encoder.check(fields)
    return fields, encoder.tree(fields, dtype, done)


class _Encoder:
    """The arrays of one encoder under t5x's names; scanned ones have their layers on dimension 1."""

    def __init__(self, arrays: Mapping[str, Any], folder: Path, *, scanned: bool):
        self._arrays, self._folder, self._scanned = arrays, folder, scanned
        numbers = {int(m[1]) for name in arrays if (m := re.match(r"encoder/layers_(\d+)/", name))}
        stack = self._of("encoder/encoder/mlp/wo/kernel").shape if scanned else ()
        self.num_layers = (stack[1] if len(stack) == 3 else 0) if scanned else len(numbers)
        if not self.num_layers:
            found = listing(arrays) or "nothing"
            raise InputError(
                f"{folder} holds no encoder layers (encoder/layers_0/..., encoder/encoder/...), but {found}"
            )

    def _of(self, name: str) -> Any:
        if name not in self._arrays:
            raise InputError(f"{self._folder} does not hold an encoder: missing: {listing([name], self._arrays)}")
        return self._arrays[name]

    def _name(self, part: str, layer: int) -> str:
        return f"encoder/encoder/{part}" if self._scanned else f"encoder/layers_{layer}/{part}"

    def _shape(self, part: str, layer: int = 0) -> tuple[int, ...]:
        shape = tuple(self._of(self._name(part, layer)).shape)
        return shape[:1] + shape[2:] if self._scanned else shape

    def _layer(self, part: str, layer: int) -> np.ndarray:
        array = self._of(self._name(part, layer))
        if not self._scanned:
            return np.asarray(array)
        return array.take(layer, 1)

    def _tables(self) -> list[str]:
        """Names of the position tables: one for all layers, or one a layer."""
        if self._scanned:
            return [f"encoder/encoder/{_TABLE}"]
        shared = f"encoder/{_TABLE}"
        return [shared] if shared in self._arrays else [f"encoder/layers_{i}/{_TABLE}" for i in range(self.num_layers)]

    def fields(self) -> dict[str, Any]:
        """What the shapes say of the network."""
        embedding = self._of("token_embedder/embedding").shape
        heads = (*self._of(self._tables()[0]).shape, 0)[0]
        query = self._shape("attention/query/kernel")
        inner = int(np.prod(query[1:]))
        mlp = self._shape("mlp/wo/kernel")
        if len(embedding) != 2 or not heads or inner % heads or len(mlp) != 2:
            raise InputError(
                f"{self._folder}: embedding {embedding}, query {query} and wo {mlp} with {heads} heads are no T5 encoder's"
            )
        return {
            "num_layers": self.num_layers,
            "width": int(embedding[1]),
            "num_heads": int(heads),
            "head_dim": inner // int(heads),
            "mlp_dim": int(mlp[0]),
            "vocab_size": int(embedding[0]),
        }

    def check(self, fields: Mapping[str, Any]) -> None:
        """Every array is there, nothing else is, and every shape is the network's."""
        layers = range(1 if self._scanned else self.num_layers)
        parts = {self._name(part, i) for part in _PARTS for i in layers}
        wanted = parts | {"token_embedder/embedding", "encoder/encoder_norm/scale", *self._tables()}
        missing, unknown = wanted - self._arrays.keys(), self._arrays.keys() - wanted
        if missing or unknown:
            lists = [f"missing: {listing(missing, unknown)}"] if missing else []
            lists += [f"unknown: {listing(unknown, missing)}"] if unknown else []
            raise InputError(f"{self._folder} does not hold an encoder; " + "; ".join(lists))
        width, heads, head_dim, mlp = (fields[name] for name in ("width", "num_heads", "head_dim", "mlp_dim"))
        inner = heads * head_dim
        allowed: dict[str, set[tuple[int, ...]]] = {part: {(width, inner), (width, heads, head_dim)} for part in _PARTS}
        allowed["attention/out/kernel"] = {(inner, width), (heads, head_dim, width)}
        allowed["mlp/wi_0/kernel"] = allowed["mlp/wi_1/kernel"] = {(width, mlp)}
        allowed["mlp/wo/kernel"] = {(mlp, width)}
        allowed["pre_attention_layer_norm/scale"] = allowed["pre_mlp_layer_norm/scale"] = {(width,)}
        depth = {self.num_layers} if self._scanned else set()
        wrong = []
        for part, shapes in allowed.items():
            for i in layers:
                full = tuple(self._of(self._name(part, i)).shape)
                if self._shape(part, i) not in shapes or (depth and set(full[1:2]) != depth):
                    wrong.append(f"{self._name(part, i)} is {full}, expected {' or '.join(map(str, sorted(shapes)))}")
        for name in self._tables():
            shape = tuple(self._of(name).shape)
            if shape != ((heads, self.num_layers, 32) if self._scanned else (heads, 32)):
                wrong.append(f"{name} is {shape}, expected {heads} heads and 32 buckets")
        if tuple(self._of("encoder/encoder_norm/scale").shape) != (width,):
            wrong.append(
                f"encoder/encoder_norm/scale is {self._of('encoder/encoder_norm/scale').shape}, expected ({width},)"
            )
        if wrong:
            raise InputError(f"{self._folder} does not hold this encoder; misshapen: {listing(wrong)}")

    def _relative_bias(self) -> np.ndarray:
        """The one table (buckets, heads) that serves all layers."""
        tables = [np.asarray(self._of(name)) for name in self._tables()]
        if self._scanned:
            tables = list(np.moveaxis(tables[0], 1, 0))
        for layer, other in enumerate(tables):
            if not np.array_equal(other, tables[0]):
                raise InputError(
                    f"{self._folder}: layer {layer} has another position table than layer 0; this encoder shares one"
                )
        return np.ascontiguousarray(tables[0].T)

    def tree(self, fields: Mapping[str, Any], dtype: Any, done: Callable[[str], None]) -> dict[str, Any]:
        width, inner, mlp = fields["width"], fields["num_heads"] * fields["head_dim"], fields["mlp_dim"]
        shapes = dict.fromkeys(_PARTS, (width, inner)) | {
            "attention/out/kernel": (inner, width),
            "mlp/wo/kernel": (mlp, width),
        }
        shapes |= {"mlp/wi_0/kernel": (width, mlp), "mlp/wi_1/kernel": (width, mlp)}
        shapes |= {"pre_attention_layer_norm/scale": (width,), "pre_mlp_layer_norm/scale": (width,)}
        tree: dict[str, Any] = {}

        def leaf(
            path: str, name: str, shape: tuple[int, ...], read: Callable[[int], np.ndarray], stacked: bool
        ) -> None:
            target = np.dtype(dtype or self._of(name).dtype)

            def converted(layer: int) -> np.ndarray:
                values = cast(np.ascontiguousarray(read(layer)).reshape(shape), target, name)
                done(name)
                return values

            full = (self.num_layers, *shape) if stacked else shape
            put(tree, path, Leaf(full, target, converted, stacked=stacked))

        for part, ours in _PARTS.items():
            self._same_dtype(part)
            leaf(f"layers/{ours}", self._name(part, 0), shapes[part], lambda i, part=part: self._layer(part, i), True)
        embedding, norm = "token_embedder/embedding", "encoder/encoder_norm/scale"
        leaf("embedding", embedding, (fields["vocab_size"], width), lambda _: np.asarray(self._of(embedding)), False)
        leaf("final_norm/scale", norm, (width,), lambda _: np.asarray(self._of(norm)), False)
        leaf("relative_bias", self._tables()[0], (32, fields["num_heads"]), lambda _: self._relative_bias(), False)
        return tree

    def _same_dtype(self, part: str) -> None:
        found = {
            np.dtype(self._of(self._name(part, i)).dtype).name for i in range(1 if self._scanned else self.num_layers)
        }
        if len(found) > 1:
            raise InputError(
                f"{self._folder}: the layers' {part} are stored as {', '.join(sorted(found))}: expected one dtype"
            )
