"""The device mesh: its axes, how it is made, and how a batch gets onto it."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.parallel.sharding import BATCH, named

AXES = ("data", "fsdp", "sequence")
Shape = tuple[int, int, int]


def start(simulated_devices: int = 0) -> None:
    """Choose the devices of this process and join the others; call it once, before anything touches a device.

    Several processes work as one where
      - JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, by hand or by a
        launcher;
      - or this is a TPU host: a pod's hosts find each other (TPU VM, GKE, several slices).

    Args:
      simulated_devices: when positive, split the host CPU into this many devices, of each process (for tests, laptops and dry
        runs).
    """
    if simulated_devices:
        # Each device runs its ready collectives at once, one thread each. With too few threads some devices block in one
        # gather and the rest in another, for ever; XLA sizes its pool by this variable.
        os.environ.setdefault("NPROC", str(16 * simulated_devices))
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", simulated_devices)
    if not jax.distributed.is_initialized():
        _join()
    if simulated_devices and jax.local_device_count() != simulated_devices:
        raise RuntimeError("parallel.mesh.start must run before any other use of a device")


def _join() -> None:
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        try:
            count, index = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        except (KeyError, ValueError):
            raise InputError(
                "JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID (0 for the coordinator) too"
            ) from None
        jax.distributed.initialize(num_processes=count, process_id=index, cluster_detection_method="deactivate")
    elif "cpu" not in (getattr(jax.config, "jax_platforms", None) or "") and any(
        map(Path.exists, map(Path, ("/dev/accel0", "/dev/vfio/0")))
    ):
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this process writes what is written once: configs, logs, pictures."""
    # one process alone is not asked for its index, which would take hold of the devices
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return when every process is here."""
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def make_mesh(data: int = -1, fsdp: int = 1, sequence: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp, sequence) mesh; data=-1 takes what the other two leave.

    Axes are laid along the links of the chips; over several slices `data` goes across them, which talk least.

    Args:
      devices: all of them by default; those of a topology to compile for machines that are not here.

    Raises InputError, naming the nearest meshes, where the product is not the number of devices or the slices do not divide
    `data`.
    """
    devices = jax.devices() if devices is None else list(devices)
    if data == -1:
        data = max(len(devices) // (fsdp * sequence), 1)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape = (data, fsdp, sequence)
    if math.prod(shape) != len(devices) or min(shape) < 1:
        raise InputError(
            f"mesh data={data} x fsdp={fsdp} x sequence={sequence} needs {math.prod(shape)} devices, here are "
            f"{len(devices)}: {nearest(shape, len(devices), lambda d, f, s: d % slices == 0)}"
        )
    if data % slices:
        raise InputError(
            f"mesh data={data} does not divide over {slices} slices: "
            f"{nearest(shape, len(devices), lambda d, f, s: d % slices == 0)}"
        )
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp, sequence), (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def nearest(wanted: Shape, count: int, fits: Callable[[int, int, int], bool]) -> str:
    """Advice: up to three (data, fsdp, sequence) of `count` devices that fit, those first that differ least from `wanted`."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    found = [
        (data, fsdp, count // (data * fsdp))
        for data, fsdp in itertools.product(divisors, divisors)
        if count % (data * fsdp) == 0 and fits(data, fsdp, count // (data * fsdp))
    ]
    if not found:
        return "no mesh of these devices does"
    found.sort(key=lambda shape: sum(abs(math.log(n / max(w, 1))) for n, w in zip(shape, wanted, strict=True)))
    shown = " or ".join(f"{d}x{f}x{s}" for d, f, s in found[:3])
    return f"the nearest data x fsdp x sequence that do are {shown} (config.mesh)"


def use(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Make `mesh` the ambient one: modules and steps find it there and never hold it."""
    return jax.set_mesh(mesh)


def check_divisible(mesh: Mesh, *, batch_size: int, tokens: int = 0) -> None:
    """Refuse a batch or a token count that the mesh does not divide (InputError, with the nearest meshes that do)."""
    data, fsdp, sequence = shape = tuple(mesh.shape[axis] for axis in AXES)

    def fits(data: int, fsdp: int, sequence: int) -> bool:
        return batch_size % (data * fsdp) == 0 and tokens % sequence == 0

    if batch_size % (data * fsdp):
        raise InputError(
            f"batch_size={batch_size} does not divide by data x fsdp = {data * fsdp}: use "
            f"{-(-batch_size // (data * fsdp)) * data * fsdp}; {nearest(shape, mesh.size, fits)}"
        )
    if tokens % sequence:
        raise InputError(
            f"{tokens} tokens per sample (text + video) do not divide by sequence={sequence}: change max_text_tokens or the "
            f"size; {nearest(shape, mesh.size, fits)}"
        )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch this process has to load: int (n,), ascending.

    Processes that only share a sequence load the same rows.
    """
    places = named(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in places]))


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int | None = None) -> dict[str, jax.Array]:
    """This process's rows (`local_rows`) as part of one global batch, split over data and fsdp, replicated over sequence.

    Without `batch_size` they are the whole batch.
    """
    sharding = named(mesh, BATCH)
    batch_size = batch_size or len(next(iter(batch.values())))
    rows = local_rows(mesh, batch_size)

    def place(values: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            wanted = np.arange(batch_size)[index[0]]
            return values[np.searchsorted(rows, wanted)]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, part)

    return {name: place(values) for name, values in batch.items()}
