"""Checkpoints in SAT's format (.pt), in which CogVideoX was published first -> what diffusers and configs/convert.py read.

    .venv/bin/python -m pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu    (the extra `sat`)
    .venv/bin/python launch/convert_sat.py CogVideoX-2b-sat/transformer diffusers/transformer
    .venv/bin/python launch/convert_sat.py CogVideoX-2b-sat/vae/3d-vae.pt diffusers/vae --variant=2b
    .venv/bin/python -m cogvideox_jax.main --config=configs/convert.py --config.source=diffusers/transformer --workdir=models/2b

SOURCE is one of
    a transformer's folder (`latest` and 1000/mp_rank_00_model_states.pt), or that .pt  -> DEST/config.json, *.safetensors
    a VAE (3d-vae.pt)                                                                   -> DEST/config.json, *.safetensors
    a LoRA's folder or .pt (matrix_A, matrix_B)                     -> DEST/pytorch_lora_weights.safetensors, with its alpha
DEST must not be there yet; it appears when it is whole (until then it is DEST.tmp). `--variant` says whose VAE it is, or the
kind of a transformer that has none of the public sizes. What SAT keeps in its yaml files is chosen as published, and printed.

A .pt is a pickle, which can run any program. It is loaded with torch's weights_only, which builds plain tensors and refuses
everything else, and by a program of its own: no other part of this system opens one. Its values stay on the disk until they
are written: a process that holds 12 GB of weights needs little more than the largest tensor.
"""

import argparse
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from logging import Formatter
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from absl import flags, logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.convert import disk, sat
from cogvideox_jax.models.convert.files import Spec, write_json, write_tensors
from cogvideox_jax.models.convert.folder import NETWORKS
from cogvideox_jax.models.convert.lora import BASENAME
from cogvideox_jax.train.metrics import Progress

EXIT_INPUT = 2
WEIGHTS = "mp_rank_00_model_states.pt"
AGAIN = "get the file again from where it came"


def find(source: Path) -> Path:
    """The .pt that `source` is, or that a SAT folder's `latest` names. Raises InputError."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise InputError(f"{source} does not exist: give a SAT checkpoint's folder or its .pt")
    folder = source
    if (source / "latest").is_file():
        latest = (source / "latest").read_bytes()[:100].decode(errors="replace").strip()
        if Path(latest).name != latest or latest in ("", ".", ".."):
            raise InputError(f"{source / 'latest'} says {latest!r}, expected the name of a folder beside it")
        folder = source / latest
    parts = sorted(path.name for path in folder.glob("mp_rank_*_model_states.pt"))
    if parts != [WEIGHTS]:
        if parts:
            raise InputError(f"{folder} holds {', '.join(parts)}, expected {WEIGHTS} alone: merge them in SAT first")
        raise InputError(f"{folder} holds no {WEIGHTS}: give a SAT folder, with its file `latest`, or a .pt")
    return folder / WEIGHTS


class Stored:
    """A torch tensor as the converter takes one: read, from the mapped file, when np.asarray asks for it."""

    def __init__(self, tensor: Any, torch: Any, where: str):
        self._tensor = tensor.detach()
        self.shape = tuple(tensor.shape)
        try:
            # numpy has no bfloat16 of its own: its bits travel as integers
            self._is_bfloat16 = tensor.dtype == torch.bfloat16
            self.dtype = np.dtype(ml_dtypes.bfloat16) if self._is_bfloat16 else tensor.new_empty(0).numpy().dtype
        except (TypeError, RuntimeError):
            kind = f"{tensor.layout} {tensor.dtype}"
            raise InputError(f"{where} is a tensor of {kind}, which is not read: save it as float32") from None
        self._int16 = torch.int16

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        tensor = self._tensor.view(self._int16) if self._is_bfloat16 else self._tensor
        array = tensor.numpy().view(self.dtype)
        return array if dtype is None else array.astype(dtype, copy=False)


def load(path: Path) -> Any:
    """The content of a .pt, its tensors mapped and as `Stored`. Raises InputError for whatever is not plain tensors."""
    try:
        import torch
    except ImportError:
        raise InputError(
            "torch is not installed, which reads .pt files: pip install torch==2.13.0 (extra `sat`)"
        ) from None
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise InputError(
                    f"{path} is not in the zip format that torch writes since 1.6, and nothing else is opened: save it again "
                    f"with torch.save, or {AGAIN}"
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of it refuses
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {found[1]}" if found else "torch.load(weights_only=True) refuses it"
        raise InputError(
            f"{path} holds more than plain tensors ({what}), which could run any program, and was not loaded: give a file "
            "that holds the state dict alone"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): {AGAIN}") from None
    except Exception as error:
        # torch's reader of zip files, and what its restricted unpickler trips over, raise what they like
        reason = re.split(r"(?<=\.)\s", " ".join(str(error).split()))[0][:200]
        raise InputError(f"{path} cannot be read as a .pt ({reason}): {AGAIN}") from None

    def stored(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: stored(item, str(key)) for key, item in value.items()}
        return Stored(value, torch, f"{path}: {name}") if isinstance(value, torch.Tensor) else value

    return stored(content, "")


def write(found: sat.Found, folder: Path) -> None:
    """Write what was found, tensor by tensor."""
    progress = Progress(len(found.tensors), "convert tensor")

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for i, (name, tensor) in enumerate(found.tensors.items()):
            yield name, np.asarray(tensor)
            progress.update(i + 1, name)

    layout = {name: Spec(tensor.shape, tensor.dtype) for name, tensor in found.tensors.items()}
    if found.kind == "lora":  # in one file, however large: diffusers looks for no parts
        limit = sum(spec.nbytes for spec in layout.values())
        metadata = found.metadata
        write_tensors(folder, layout, tensors(), basename=BASENAME, max_shard_bytes=limit, metadata=metadata)
    else:
        write_tensors(folder, layout, tensors(), basename=NETWORKS[found.kind].basename)
        write_json(folder / "config.json", found.config)


def convert(source: Path, target: Path, *, variant: str | None, alpha: float) -> None:
    """Convert a SAT checkpoint, whole or not at all. Raises InputError."""
    if target.exists():
        raise InputError(f"{target} is already there: give a folder that is not")
    path = find(source)
    found = sat.read(load(path), str(path), variant=variant, alpha=alpha)
    chosen = ", ".join(f"{name}={value}" for name, value in found.chosen.items())
    logging.info("%s: %s of %d tensors; %d others left out", path, found.kind, len(found.tensors), found.left_out)
    logging.info("chosen, since the file does not tell: %s", chosen)
    needed = sum(Spec(tensor.shape, tensor.dtype).nbytes for tensor in found.tensors.values())
    disk.require("", target, needed)
    temporary = target.with_name(target.name + ".tmp")
    with disk.writing("", target, needed):
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
        try:
            write(found, temporary)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    logging.info("%s: done", target)


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def fail(message: str) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(EXIT_INPUT)


def main() -> None:
    parser = Parser(description="SAT checkpoint -> diffusers", epilog="The runbook is this file's docstring.")
    parser.add_argument("source", type=Path, help="a SAT folder, its .pt, 3d-vae.pt, or a LoRA")
    parser.add_argument("dest", type=Path, help="the folder to make")
    parser.add_argument(
        "--variant", choices=sat.VARIANTS, help="whose VAE it is, or the kind of a transformer of another size"
    )
    parser.add_argument("--alpha", type=float, default=1.0, help="lora_alpha of SAT's yaml, 1 as published")
    options = parser.parse_args()
    flags.FLAGS(sys.argv[:1])  # absl's logger warns until its flags are parsed, of which there are none
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    try:
        convert(options.source, options.dest, variant=options.variant, alpha=options.alpha)
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
