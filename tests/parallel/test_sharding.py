import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.parallel import mesh, sharding


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((64, 256), {"data": 2, "fsdp": 2, "sequence": 2}, P(None, ("fsdp", "sequence"))),
        ((30, 1920, 1920), {"data": 1, "fsdp": 8, "sequence": 1}, P(None, None, ("fsdp", "sequence"))),
        # 4 ways do not divide 1026, 2 do
        ((1026,), {"data": 1, "fsdp": 2, "sequence": 2}, P(("fsdp",))),
        ((1027,), {"data": 1, "fsdp": 2, "sequence": 2}, P()),
        ((512,), {"data": 1, "fsdp": 2, "sequence": 2}, P()),
        ((64, 256), {"data": 8, "fsdp": 1, "sequence": 1}, P()),
        ((), {"data": 1, "fsdp": 2, "sequence": 2}, P()),
    ],
)
def test_rule(shape, axes, spec):
    assert sharding.parameter_spec(shape, axes) == spec


def test_constrain_does_nothing_without_a_mesh():
    x = np.ones(3)
    assert sharding.constrain(x, sharding.BATCH) is x


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="needs 64 devices"):
        mesh.make_mesh(4, 4, 4)
    one = mesh.make_mesh(-1, 1, 1)
    assert one.shape == {"data": jax.device_count(), "fsdp": 1, "sequence": 1}
