"""The device mesh: its axes, how it is made, and how a batch gets onto it."""

import contextlib
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.parallel.sharding import BATCH, named

AXES = ("data", "fsdp", "sequence")


def start(simulated_devices: int = 0) -> None:
    """Choose the devices of this process; call it once, before anything touches a device.

    Args:
      simulated_devices: when positive, split the host CPU into this many devices (for tests, laptops and dry runs).
    """
    if simulated_devices:
        # Each device runs its ready collectives at once, one thread each. With too few threads some devices block in one
        # gather and the rest in another, for ever; XLA sizes its pool by this variable.
        os.environ.setdefault("NPROC", str(16 * simulated_devices))
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", simulated_devices)
        if jax.device_count() != simulated_devices:
            raise RuntimeError("parallel.mesh.start must run before any other use of a device")


def make_mesh(data: int = -1, fsdp: int = 1, sequence: int = 1) -> Mesh:
    """A (data, fsdp, sequence) mesh over all devices; data=-1 takes what the other two leave.

    Raises InputError where the product is not the number of devices.
    """
    count = jax.device_count()
    if data == -1:
        data = max(count // (fsdp * sequence), 1)
    if data * fsdp * sequence != count:
        raise InputError(
            f"mesh data={data} x fsdp={fsdp} x sequence={sequence} needs {data * fsdp * sequence} devices, "
            f"this machine has {count}: change config.mesh, or config.mesh.simulated_devices on a CPU"
        )
    return jax.make_mesh((data, fsdp, sequence), AXES, axis_types=(AxisType.Auto,) * 3)


def use(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Make `mesh` the ambient one: modules and steps find it there and never hold it."""
    return jax.set_mesh(mesh)


def check_divisible(mesh: Mesh, *, batch_size: int, tokens: int = 0) -> None:
    """Refuse a batch or a token count that the mesh does not divide (InputError)."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise InputError(
            f"batch_size={batch_size} does not divide by data x fsdp = {ways}: use {-(-batch_size // ways) * ways}"
        )
    if tokens % mesh.shape["sequence"]:
        raise InputError(
            f"{tokens} tokens per sample (text + video) do not divide by sequence={mesh.shape['sequence']}: "
            "change max_text_tokens, the size or the mesh"
        )


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this host's rows onto the mesh as one global batch, split over data and fsdp, replicated over sequence."""
    sharding = named(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
