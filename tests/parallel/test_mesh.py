"""Meshes that fit, the nearest ones where one does not, and the rows of a batch that a process loads."""

import jax
import numpy as np
import pytest

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.parallel import mesh as meshes


class Device:
    """As much of a device as laying out a mesh looks at."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, index: int, slice_index: int = 0):
        self.id, self.slice_index, self.process_index = index, slice_index, slice_index


EIGHT = [Device(i) for i in range(8)]
TWO_SLICES = [Device(i, slice_index=i // 4) for i in range(8)]


def test_the_first_axis_takes_the_devices_that_are_left():
    assert dict(meshes.make_mesh(-1, 2, 2, devices=EIGHT).shape) == {"data": 2, "fsdp": 2, "sequence": 2}
    assert len({device.id for device in meshes.make_mesh(1, 4, 2, devices=EIGHT).devices.flat}) == 8


def test_data_goes_across_slices():
    mesh = meshes.make_mesh(4, 2, 1, devices=TWO_SLICES)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize(
    ("shape", "devices", "words"),
    [
        ((2, 3, 1), EIGHT, ["needs 6 devices, here are 8", "2x4x1 or"]),
        ((-1, 3, 2), EIGHT, ["needs 6 devices", "nearest"]),
        ((1, 4, 2), TWO_SLICES, ["2 slices", "2x2x2 or 2x4x1"]),
    ],
    ids=["product", "rest", "slices"],
)
def test_a_mesh_that_does_not_fit_names_those_that_do(shape, devices, words):
    with pytest.raises(InputError) as error:
        meshes.make_mesh(*shape, devices=devices)
    for word in words:
        assert word in str(error.value)


def test_batches_and_tokens_that_do_not_divide_name_the_meshes_that_do():
    mesh = meshes.make_mesh(4, 1, 2, devices=EIGHT)
    meshes.check_divisible(mesh, batch_size=8, tokens=10)
    with pytest.raises(InputError, match=r"use 8; the nearest .* are 2x1x4") as error:
        meshes.check_divisible(mesh, batch_size=6, tokens=64)
    assert "4x1x2" not in str(error.value)
    with pytest.raises(InputError, match=r"65 tokens .* 4x2x1 or 8x1x1"):
        meshes.check_divisible(mesh, batch_size=8, tokens=65)
    with pytest.raises(InputError, match="no mesh of these devices does"):
        meshes.check_divisible(mesh, batch_size=3, tokens=7)


def test_one_process_loads_every_row():
    mesh = meshes.make_mesh()
    rows = meshes.local_rows(mesh, 4 * jax.device_count())
    assert rows.tolist() == list(range(4 * jax.device_count()))
    values = np.arange(len(rows))[:, None]
    np.testing.assert_array_equal(meshes.global_batch({"x": values}, mesh, len(rows))["x"], values)


def test_a_coordinator_alone_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(InputError, match="JAX_PROCESS_ID"):
        meshes.start()
