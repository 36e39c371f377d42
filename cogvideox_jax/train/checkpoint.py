"""Checkpoints: one Orbax manager, separate items, so that a next stage can read the moving average alone."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.parallel.sharding import place
from cogvideox_jax.train.state import TrainState

FOLDER = "checkpoints"
ITEMS = ("params", "ema", "opt_state")


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Shapes and placements of a tree on a mesh, which is what a restore needs."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, place(tree, mesh)
    )


class Checkpoints:
    """Saves and restores a run's state under workdir/checkpoints."""

    def __init__(self, workdir: Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager((workdir / FOLDER).resolve(), options=options)

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Start an asynchronous save. `data` is JSON: whatever must be equal for a resume to be exact.

        An error of the save before this one is raised here, since Orbax keeps it to itself until somebody waits.
        """
        self._manager.wait_until_finished()
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {name: ocp.args.StandardSave(getattr(state, name)) for name in ITEMS}
        self._manager.save(step, args=ocp.args.Composite(**items, data=ocp.args.JsonSave(data)))

    def restore(self, abstract_state: TrainState, data: dict[str, Any]) -> TrainState | None:
        """The newest state, placed as `abstract_state` says; None where there is none.

        Raises InputError where the stored `data` differs from the one given: the run would go on with other records.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        items = {name: ocp.args.StandardRestore(getattr(abstract_state, name)) for name in ITEMS}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items, data=ocp.args.JsonRestore()))
        _same_data(restored["data"], data, self._manager.directory)
        return TrainState(
            jax.device_put(jax.numpy.asarray(step, jax.numpy.int32), abstract_state.step.sharding),
            *(restored[name] for name in ITEMS),
        )

    def close(self) -> None:
        """Wait for the last save; raises what went wrong in it."""
        self._manager.wait_until_finished()
        self._manager.close()


def _same_data(stored: dict[str, Any], given: dict[str, Any], where: Any) -> None:
    for name in sorted(stored.keys() | given.keys()):
        if stored.get(name) != given.get(name):
            raise InputError(
                f"{where}: the training data changed since this checkpoint: {name} was {stored.get(name)}, is now "
                f"{given.get(name)}; restore the data, or start in another --workdir"
            )


def newest_item(workdir: Path, item: str) -> Path:
    """Folder of one item ("params", "ema", "opt_state") of a run's newest checkpoint. Raises InputError if there is none."""
    folder = (Path(workdir) / FOLDER).resolve()
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    if not steps:
        raise InputError(f"{workdir} holds no checkpoint: run the training task with --workdir={workdir} first")
    return folder / str(max(steps)) / item


def restore_item(workdir: Path, item: str, mesh: Mesh) -> Any:
    """One item of a run's newest checkpoint, placed by the rule. Raises InputError if there is none."""
    return restore_tree(newest_item(workdir, item), mesh)


def restore_tree(folder: Path, mesh: Mesh) -> Any:
    """A parameter tree as it was saved, placed by the rule."""
    # the handler and not a Checkpointer: an item of a manager's step lacks the file that the latter warns about
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        path = epath.Path(folder.resolve())
        return handler.restore(path, args=ocp.args.StandardRestore(abstract(handler.metadata(path).tree, mesh)))


def save_tree(folder: Path, tree: Any) -> None:
    """Save a parameter tree; a folder that is there already is left alone (the save is atomic, so it is whole)."""
    if not folder.exists():
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.resolve(), tree)
