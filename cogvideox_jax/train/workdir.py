"""A workdir belongs to one config; its JSON files are written whole or not at all. Imports nothing heavy."""

import fcntl
import json
from pathlib import Path
from typing import IO, Any

from cogvideox_jax.core.errors import InputError

# keys that may change when a workdir is continued: they change neither what is computed nor what is stored
CHANGEABLE = ("mesh", "log_steps", "checkpoint_steps", "keep_checkpoints")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    temporary.replace(path)


def read_json(path: Path, *, made_by: str) -> Any:
    """A JSON file that another task wrote. Raises InputError, naming that task, where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing: run {made_by} first") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON ({error}): delete it and run {made_by} again") from None


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were, at any depth: the networks' fields must be hashable."""
    if isinstance(value, dict):
        return {name: tuples(item) for name, item in value.items()}
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def read_config(workdir: Path, *, made_by: str) -> dict[str, Any]:
    """The config that a finished or running stage was given; lists come back as the tuples that they were."""
    return tuples(read_json(Path(workdir) / "config.json", made_by=made_by))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def differences(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """One line per key that differs and may not, as "key was old, is now new"."""
    old, new = _flatten(stored), _flatten(given)
    names = sorted(name for name in old.keys() | new.keys() if name.split(".")[0] not in CHANGEABLE)
    return [
        f"{name} was {old.get(name)!r}, is now {new.get(name)!r}" for name in names if old.get(name) != new.get(name)
    ]


def check_owner(workdir: Path, config: dict[str, Any]) -> None:
    """Refuse a workdir that belongs to another config (InputError names up to five keys). Writes nothing."""
    path = workdir / "config.json"
    if not path.exists():
        return
    changed = differences(read_json(path, made_by="the task"), config)
    if changed:
        shown = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise InputError(f"--workdir={workdir} belongs to another config: {shown}. Use another --workdir, or delete it")


def claim(workdir: Path, config: dict[str, Any]) -> IO[str]:
    """Make the workdir, lock it against a second process and store the config. Keep the returned file open.

    Raises InputError where it cannot be written, is locked, or belongs to another config.
    """
    check_owner(workdir, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise InputError(f"--workdir={workdir} is in use by another process") from None
    write_json(workdir / "config.json", config)
    return lock
