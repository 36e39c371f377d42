import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox_jax.core import rope

# spec 11.4: row (t=2, row 7, col 11), head_dim 64
COS = (
    "-.416147 .806578 .980067 .998001 .999800 .999980 .999998 1 "
    ".753902 -.994225 .062651 .764842 .947679 .988650 .997551 .999472 .999886 .999976 .999995 .999999 "
    ".004426 .383293 -.716716 .453596 .872464 .972050 .993956 .998697 .999719 .999940 .999987 .999997"
)
SIN = (
    ".909297 .591127 .198669 .063203 .019999 .006325 .002 .000632 "
    ".656987 -.107312 .998035 .644218 .319225 .150239 .069943 .032485 .01508 .007 .003249 .001508 "
    "-.999990 -.923627 .697365 .891207 .488679 .234776 .109778 .051035 .023697 .011 .005106 .00237"
)


def test_rotary_row_of_the_reference():
    positions = rope.grid_positions(13, 30, 45)
    row = 2 * 30 * 45 + 7 * 45 + 11
    cos, sin = rope.cos_sin(rope.rotary_angles(jnp.asarray(positions), 64)[row])
    np.testing.assert_allclose(cos, [float(v) for v in COS.split()], atol=2e-6)
    np.testing.assert_allclose(sin, [float(v) for v in SIN.split()], atol=2e-6)


def test_pairs_are_interleaved_and_origin_is_identity():
    x = jnp.arange(16.0).reshape(1, 1, 1, 16)
    angles = rope.rotary_angles(jnp.array([[[0.0, 0.0, 0.0]]]), 16)
    np.testing.assert_array_equal(rope.apply_rope(x, *rope.cos_sin(angles)), x)
    quarter = jnp.full((1, 1, 8), jnp.pi / 2)
    turned = rope.apply_rope(x, *rope.cos_sin(quarter))[0, 0, 0]
    np.testing.assert_allclose(turned[:4], [-1, 0, -3, 2], atol=1e-5)


def test_sincos_table_of_the_2b_model():
    row = rope.sincos_table(13, 30, 45, 1920)[2 * 30 * 45 + 7 * 45 + 11]
    golden = {0: 0.909297, 1: 0.938027, 240: -0.416147, 480: -0.404579, 481: -0.535170, 840: 0.914503}
    golden |= {1200: -0.557807, 1201: -0.477175, 1559: 0.000383, 1560: -0.829971}
    for channel, value in golden.items():
        assert row[channel] == pytest.approx(value, abs=1e-6), channel


@pytest.mark.parametrize(
    ("h", "w", "rows", "columns"),
    [
        (30, 45, (0, 29), (0, 44)),
        (32, 48, (0, 29.0625), (0, 44.0625)),
        (45, 30, (0, 29.3333), (12, 30.9333)),
        (48, 85, (2, 26.4375), (0, 44.4706)),
        (30, 30, (0, 29), (8, 36.7333)),
        (16, 24, (0, 28.125), (0, 43.125)),
    ],
)
def test_linspace_rule_reproduces_the_end_points(h, w, rows, columns):
    grid = rope.grid_positions(1, h, w, rule="linspace").reshape(h, w, 3)
    np.testing.assert_allclose((grid[0, 0, 1], grid[-1, 0, 1]), rows, atol=1e-4)
    np.testing.assert_allclose((grid[0, 0, 2], grid[0, -1, 2]), columns, atol=1e-4)


def test_wrong_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="position rule"):
        rope.grid_positions(1, 2, 2, rule="nearest")
    with pytest.raises(ValueError, match="multiple of 16"):
        rope.axis_dims(24)
