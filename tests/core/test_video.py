import numpy as np
import pytest

from cogvideox_jax.core import video
from cogvideox_jax.core.errors import InputError


def test_frames():
    assert [video.latent_frames(f) for f in (1, 5, 9, 49, 161)] == [1, 2, 3, 13, 41]
    assert video.pixel_frames(13) == 49
    with pytest.raises(InputError, match="use 45 or 49"):
        video.latent_frames(48)
    with pytest.raises(InputError, match="height=100 is not a multiple of 16"):
        video.latent_shape(9, 100, 64)
    with pytest.raises(InputError, match=r"num_frames=5 gives 2 latent frames.* use 1 or 9"):
        video.latent_shape(5, 64, 64)
    assert video.latent_shape(49, 480, 720) == (13, 60, 90)


@pytest.mark.parametrize(
    ("length", "chunk", "bounds"),
    [
        (1, 8, [(0, 1)]),
        (9, 8, [(0, 9)]),
        (17, 8, [(0, 9), (9, 17)]),
        (49, 8, [(0, 9), (9, 17), (17, 25), (25, 33), (33, 41), (41, 49)]),
        (16, 8, [(0, 8), (8, 16)]),
        (3, 2, [(0, 3)]),
        (13, 2, [(0, 3), (3, 5), (5, 7), (7, 9), (9, 11), (11, 13)]),
        (4, 2, [(0, 2), (2, 4)]),
    ],
)
def test_chunks(length, chunk, bounds):
    assert video.chunk_bounds(length, chunk) == bounds


def test_patches_go_back_and_put_channels_first():
    x = np.arange(2 * 4 * 4 * 6 * 3).reshape(2, 4, 4, 6, 3)
    tokens = video.patchify(x, 2, 2)
    assert tokens.shape == (2, 2 * 2 * 3, 3 * 8)
    np.testing.assert_array_equal(tokens[0, 0, :8], x[0, :2, :2, :2, 0].ravel())
    np.testing.assert_array_equal(video.unpatchify(tokens, 4, 4, 6, 2, 2), x)


def test_tiles_without_overlap_change_nothing():
    x = np.random.default_rng(0).normal(size=(1, 2, 8, 12, 1)).astype(np.float32)
    out = video.tiled(lambda t: t, x, tile=(4, 6), stride=(3, 4), extent=(1, 2), keep=(3, 4))
    np.testing.assert_allclose(out, x, atol=1e-6)
