import jax
import jax.numpy as jnp
import numpy as np

from cogvideox_jax.parallel.attention import attention


def textbook(q, k, v):
    logits = np.einsum("blhd,bmhd->bhlm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhlm,bmhd->blhd", weights / weights.sum(-1, keepdims=True), v)


def test_attention_is_the_textbook_formula_within_each_segment():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 7, 2, 8)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(attention)(q, k, v), textbook(q, k, v), atol=1e-5)
    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1]] * 2)
    packed = np.asarray(jax.jit(attention)(q, k, v, segments))
    for part in (slice(0, 3), slice(3, 7)):
        np.testing.assert_allclose(packed[:, part], textbook(q[:, part], k[:, part], v[:, part]), atol=1e-5)
