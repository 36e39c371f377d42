"""Attention on one device, forward and backward, in the form that suits the platform compiled for.

With logits s = q k^T / sqrt(d), minus infinity between tokens of different segments:

    out = softmax(s) v    lse = log sum exp(s)    p = exp(s - lse)    delta = sum(out * dout)
    ds = p * (dout v^T - delta)    dq = ds k / sqrt(d)    dk = ds^T q / sqrt(d)    dv = p^T dout

(FlashAttention-2, arXiv 2307.08691.) Of the other keys the backward pass needs to know no more than lse and delta, so `forward`
over parts of the keys can be merged (`merge`) and `backward` over the same parts summed. parallel.attention's ring is that.

Shapes: q, out (b, l, heads, d); k, v (b, m, heads, d); lse, delta (b, heads, l), float32. Segments are integers from -1 on,
of the queries (b, l) and of the keys (b, m): both or neither. Softmax and sums are float32 whatever the inputs. A query that
sees no key gives zeros, an lse of MASKED and no gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cogvideox_jax.parallel.sharding import platform

MASKED = -1e30  # the lse of no keys: minus infinity subtracted from itself would be NaN

# Up to this many logits the loops of the blockwise form cost more than they save.
SMALL = 2**20
# Logits of one block of the blockwise form: 1.5 MB, about a core's L2 cache. From 0.7 to 3 MB the speed was nearly the same.
BLOCK_LOGITS = 3 * 2**17


def _attend(q: Array, k: Array, v: Array, q_segments: Array | None, kv_segments: Array | None) -> tuple[Array, Array]:
    """out (..., l, d) and lse (..., l) of q (..., l, d), scaled, and k, v (..., m, d): all logits at once, float32."""
    logits = _logits(q, k, q_segments, kv_segments)
    largest = jnp.maximum(logits.max(-1, keepdims=True), MASKED)
    p = jnp.exp(logits - largest)
    total = p.sum(-1, keepdims=True)
    seen = total > 0
    out = jnp.einsum("...qk,...kd->...qd", p, v) / jnp.where(seen, total, 1)
    return out, jnp.where(seen, largest + jnp.log(jnp.where(seen, total, 1)), MASKED)[..., 0]


def _logits(q: Array, k: Array, q_segments: Array | None, kv_segments: Array | None) -> Array:
    logits = jnp.einsum("...qd,...kd->...qk", q, k)
    if q_segments is None or kv_segments is None:
        return logits
    return jnp.where(q_segments[..., :, None] == kv_segments[..., None, :], logits, -jnp.inf)


def _attend_backward(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array | None,
    kv_segments: Array | None,
    lse: Array,
    delta: Array,
    dout: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of scaled q (..., l, d), and of k and v as (..., d, m): so their matmuls stream the logits as they lie."""
    p = jnp.exp(_logits(q, k, q_segments, kv_segments) - lse[..., None])
    ds = p * (jnp.einsum("...qd,...kd->...qk", dout, v) - delta[..., None])
    dq = jnp.einsum("...qk,...kd->...qd", ds, k)
    return dq, jnp.einsum("...qd,...qk->...dk", q, ds), jnp.einsum("...qd,...qk->...dk", dout, p)


def _heads_first(x: Array) -> Array:
    return x.swapaxes(1, 2).astype(jnp.float32)


def scaled(q: Array) -> Array:
    """q / sqrt(d), in q's dtype: exact for d = 64, whatever the dtype."""
    return q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


def _per_head(segments: Array | None, heads: int) -> Array | None:
    return None if segments is None else jnp.broadcast_to(segments[:, None], (len(segments), heads, segments.shape[1]))


def reference_forward(
    q: Array, k: Array, v: Array, q_segments: Array | None, kv_segments: Array | None
) -> tuple[Array, Array]:
    """The plain formula, with all logits in memory."""
    heads = q.shape[2]
    operands = (_heads_first(scaled(q)), _heads_first(k), _heads_first(v))
    out, lse = _attend(*operands, _per_head(q_segments, heads), _per_head(kv_segments, heads))
    return out.swapaxes(1, 2).astype(q.dtype), lse


def reference_backward(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array | None,
    kv_segments: Array | None,
    lse: Array,
    delta: Array,
    dout: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of `reference_forward`, float32."""
    heads = q.shape[2]
    operands = (_heads_first(scaled(q)), _heads_first(k), _heads_first(v))
    segments = (_per_head(q_segments, heads), _per_head(kv_segments, heads))
    dq, dk, dv = _attend_backward(*operands, *segments, lse, delta, _heads_first(dout))
    return scaled(dq.swapaxes(1, 2)), dk.transpose(0, 3, 1, 2), dv.transpose(0, 3, 1, 2)


class _Rows(NamedTuple):
    """How the blockwise form cuts l queries: `count` blocks of `size`, the last one padded."""

    count: int
    size: int

    @classmethod
    def of(cls, l: int, m: int) -> "_Rows":
        count = -(-l * m // BLOCK_LOGITS)
        size = -(-l // (8 * count)) * 8
        return cls(-(-l // size), size)

    def split(self, x: Array) -> Array:
        """(b, heads, l, ...) -> (b heads, blocks, rows, ...)."""
        x = jnp.pad(x, [(0, 0), (0, 0), (0, self.count * self.size - x.shape[2])] + [(0, 0)] * (x.ndim - 3))
        return x.reshape(-1, self.count, self.size, *x.shape[3:])

    def join(self, x: Array, b: int, l: int) -> Array:
        """The way back."""
        return x.reshape(b, -1, self.count * self.size, *x.shape[3:])[:, :, :l]


def _fold(x: Array | None) -> Array | None:
    return None if x is None else x.reshape(-1, *x.shape[2:])


def blockwise_forward(
    q: Array, k: Array, v: Array, q_segments: Array | None, kv_segments: Array | None
) -> tuple[Array, Array]:
    """For CPUs: one head and one block of queries after another, against all keys, so that the logits stay in cache."""
    b, l, heads, _ = q.shape
    rows = _Rows.of(l, k.shape[1])
    q_ids, kv_ids = _per_head(q_segments, heads), _fold(_per_head(kv_segments, heads))

    def head(operands: Any) -> Any:
        q, q_ids, k, v, kv_ids = operands
        return lax.map(lambda block: _attend(block[0], k, v, block[1], kv_ids), (q, q_ids))

    q_ids = None if q_ids is None else rows.split(q_ids)
    operands = (rows.split(_heads_first(scaled(q))), q_ids, _fold(_heads_first(k)), _fold(_heads_first(v)), kv_ids)
    out, lse = lax.map(head, operands)
    return rows.join(out, b, l).swapaxes(1, 2).astype(q.dtype), rows.join(lse, b, l)


def blockwise_backward(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array | None,
    kv_segments: Array | None,
    lse: Array,
    delta: Array,
    dout: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of `blockwise_forward`, float32."""
    b, l, heads, d = q.shape
    m = k.shape[1]
    rows = _Rows.of(l, m)
    q_ids, kv_ids = _per_head(q_segments, heads), _fold(_per_head(kv_segments, heads))

    def head(operands: Any) -> Any:
        k, v, kv_ids, blocks = operands

        def block(carry: Any, xs: Any) -> Any:
            q, q_ids, lse, delta, dout = xs
            dq, dk, dv = _attend_backward(q, k, v, q_ids, kv_ids, lse, delta, dout)
            return (carry[0] + dk, carry[1] + dv), dq

        zeros = jnp.zeros((d, m), jnp.float32)
        (dk, dv), dq = lax.scan(block, (zeros, zeros), blocks)
        return dq, dk, dv

    q_ids = None if q_ids is None else rows.split(q_ids)
    # a padded row has dout = 0, lse = 0 and delta = 0, and so adds nothing
    blocks = (
        rows.split(_heads_first(scaled(q))),
        q_ids,
        rows.split(lse),
        rows.split(delta),
        rows.split(_heads_first(dout)),
    )
    dq, dk, dv = lax.map(head, (_fold(_heads_first(k)), _fold(_heads_first(v)), kv_ids, blocks))
    dk, dv = (x.reshape(b, heads, d, m).transpose(0, 3, 1, 2) for x in (dk, dv))
    return scaled(rows.join(dq, b, l).swapaxes(1, 2)), dk, dv


def _forms(q: Array, k: Array) -> tuple[Callable[..., tuple[Array, Array]], Callable[..., tuple[Array, Array, Array]]]:
    if platform() == "tpu":
        from cogvideox_jax.parallel import splash  # imports Pallas, which takes a third of a second

        return splash.forward, splash.backward
    if q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] <= SMALL:
        return reference_forward, reference_backward
    return blockwise_forward, blockwise_backward


def forward(
    q: Float[Array, "b l heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    q_segments: Int[Array, "b l"] | None = None,
    kv_segments: Int[Array, "b m"] | None = None,
) -> tuple[Float[Array, "b l heads d"], Float[Array, "b heads l"]]:
    """(out in q's dtype, lse)."""
    return _forms(q, k)[0](q, k, v, q_segments, kv_segments)


def backward(
    q: Float[Array, "b l heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    q_segments: Int[Array, "b l"] | None,
    kv_segments: Int[Array, "b m"] | None,
    lse: Float[Array, "b heads l"],
    delta: Float[Array, "b heads l"],
    dout: Float[Array, "b l heads d"],
) -> tuple[Float[Array, "b l heads d"], Float[Array, "b m heads d"], Float[Array, "b m heads d"]]:
    """(dq, dk, dv); lse and delta are those of all keys, k and v may be some of them. Each has its input's dtype or float32."""
    return _forms(q, k)[1](q, k, v, q_segments, kv_segments, lse, delta, dout)


def merge(
    out: Float[Array, "b l heads d"],
    lse: Float[Array, "b heads l"],
    other_out: Float[Array, "b l heads d"],
    other_lse: Float[Array, "b heads l"],
) -> tuple[Float[Array, "b l heads d"], Float[Array, "b heads l"]]:
    """Attention over two disjoint sets of keys, from (out, lse) over each; float32."""
    total = jnp.logaddexp(lse, other_lse)
    weight, other_weight = (jnp.exp(x - total).swapaxes(1, 2)[..., None] for x in (lse, other_lse))
    return out * weight + other_out * other_weight, total


def row_delta(out: Float[Array, "b l heads d"], dout: Float[Array, "b l heads d"]) -> Float[Array, "b l heads"]:
    """sum(out * dout) of each head, float32."""
    return jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)


def kept(out: Float[Array, "b l heads d"], lse: Float[Array, "b heads l"]) -> tuple[Array, Array]:
    """The same, under the names by which a remat policy keeps them: the backward pass then need not attend again.

    out is named with heads and d as one dimension: kept apart, d = 64 would fill half of each 128-lane row of a TPU's memory.
    """
    flat = checkpoint_name(out.reshape(*out.shape[:2], -1), "attention_out")
    return flat.reshape(out.shape), checkpoint_name(lse, "attention_lse")


@jax.custom_vjp
def local_attention(
    q: Float[Array, "b l heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    q_segments: Int[Array, "b l"] | None = None,
    kv_segments: Int[Array, "b m"] | None = None,
) -> tuple[Float[Array, "b l heads d"], Float[Array, "b heads l"]]:
    """(out, lse) with gradients: attention over the keys that this device holds."""
    return forward(q, k, v, q_segments, kv_segments)


def _local_forward(q: Array, k: Array, v: Array, q_segments: Array | None, kv_segments: Array | None) -> Any:
    out, lse = kept(*forward(q, k, v, q_segments, kv_segments))
    return (out, lse), (q, k, v, q_segments, kv_segments, lse, out)


def _local_backward(residuals: Any, cotangents: Any) -> Any:
    q, k, v, q_segments, kv_segments, lse, out = residuals
    dout, dlse = cotangents
    delta = row_delta(out, dout).swapaxes(1, 2) - dlse
    dq, dk, dv = backward(q, k, v, q_segments, kv_segments, lse, delta, dout)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


local_attention.defvjp(_local_forward, _local_backward)
