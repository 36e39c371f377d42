import jax
import jax.numpy as jnp
import numpy as np

from cogvideox_jax.models import t5

MODEL = t5.T5Encoder(num_layers=2, width=16, num_heads=2, head_dim=8, mlp_dim=32, vocab_size=64)


def test_buckets_are_exact_near_and_logarithmic_far():
    buckets = t5.relative_buckets(200)
    assert buckets.min() == 0
    assert buckets.max() == 31
    # queries look back in buckets 0-15 and ahead in 16-31; distances below 8 have a bucket each
    assert [buckets[100, 100 - d] for d in range(9)] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert [buckets[100, 100 + d] for d in range(1, 8)] == [17, 18, 19, 20, 21, 22, 23]
    assert buckets[199, 199 - 128] == buckets[199, 0] == 15


def test_padding_is_attended_unless_masked():
    params = MODEL.init(jax.random.key(0), jnp.zeros((1, 6), jnp.int32))["params"]
    ids = np.array([[5, 6, 1, 0, 0, 0], [5, 6, 1, 9, 9, 9]])
    plain = np.asarray(t5.encode(MODEL, params, ids))
    assert np.abs(plain[0, :3] - plain[1, :3]).max() > 1e-3
    mask = np.arange(6)[None] < 3
    masked = np.asarray(t5.encode(MODEL, params, ids, np.repeat(mask, 2, 0)))
    np.testing.assert_allclose(masked[0, :3], masked[1, :3], atol=1e-6)
    np.testing.assert_allclose(masked[0, :3], np.asarray(t5.encode(MODEL, params, ids[:1, :3]))[0], atol=1e-5)
