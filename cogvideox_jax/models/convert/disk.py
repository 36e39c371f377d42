"""Room on a disk, and what to say when there is none left."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cogvideox_jax.core.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def _free(folder: Path) -> int:
    """Bytes left for what is to be written to a folder that need not be there yet."""
    parent = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(parent).free


def require(what: str, folder: Path, needed: int) -> None:
    """Refuse to begin what will not fit (InputError; `what` stands before the folder's name, as in --workdir=...)."""
    if needed > _free(folder):
        raise InputError(
            f"{what}{folder} has {_free(folder) / 1e9:.1f} GB left, {needed / 1e9:.1f} GB are needed: free some"
        )


@contextlib.contextmanager
def writing(what: str, folder: Path, needed: int) -> Iterator[None]:
    """Turn a disk (or a quota) that fills up inside the block into an InputError; `needed` is what the whole task writes.

    tensorstore raises a ValueError that carries the system's words. Removing what is half-written is the block's own work,
    so that the message tells what is free after it.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number not in _FULL and not any(os.strerror(code) in str(error) for code in _FULL):
            raise
        raise InputError(
            f"the disk filled up: {what}{folder} has {_free(folder) / 1e9:.1f} GB left, {needed / 1e9:.1f} GB are needed in "
            "all: free some and start it again"
        ) from error
