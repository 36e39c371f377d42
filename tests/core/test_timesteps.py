import jax
import numpy as np
import pytest

from cogvideox_jax.core import timesteps


@pytest.mark.parametrize("batch_size", [1, 3, 8, 40, 64, 2000])
def test_each_stratum_is_drawn_exactly_once(batch_size):
    for step in range(5):
        t = np.asarray(timesteps.explicit_uniform(jax.random.key(step), batch_size))
        assert t.min() >= 0
        assert t.max() < 1000
        edges = np.arange(batch_size + 1) / batch_size * 1000
        # a timestep floor(x) came from [x], so compare against the floored edges
        ordered = np.sort(t)
        assert (ordered >= np.floor(edges[:-1])).all()
        assert (ordered <= np.floor(edges[1:])).all()


def test_strata_are_dealt_anew_each_step():
    rows = np.stack([np.asarray(timesteps.explicit_uniform(jax.random.key(i), 8)) for i in range(400)])
    # every position of the batch sees the whole range, not its own eighth
    counts = np.stack([np.bincount(rows[:, i] // 125, minlength=8) for i in range(8)])
    expected = 400 / 8
    chi_square = ((counts - expected) ** 2 / expected).sum(axis=1)
    assert (chi_square < 26).all()  # 99.95 % for 7 degrees of freedom


def test_sinusoid_of_the_reference():
    row = np.asarray(timesteps.sinusoid(np.array([999.0]), 1920))[0]
    # the angle is 999 in float32: the reference's own rounding is part of the golden
    np.testing.assert_allclose(row[[0, 960, 1]], [0.99964982, -0.02646075, -0.99016261], atol=1e-4)
    np.testing.assert_allclose(row[[0, 960]], [0.99964982, -0.02646075], atol=1e-6)
