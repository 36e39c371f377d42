"""Attention on one TPU core: jax's splash attention kernel, without its masks, behind kernels.forward and kernels.backward.

Its public interface gives no gradient of a part of the keys, so this file calls two of its private functions. jax is locked to
one version, and tests/parallel/test_attention_tpu.py runs them interpreted and compiles them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array

from cogvideox_jax.parallel.kernels import MASKED, scaled

# Blocks in tokens; beside a block of keys stands how many of them meet the queries at once. The choice is the one that pads
# least (`_Blocks`); of equals the smallest block of queries and the largest of keys, by static cycles of the compiled kernel on
# v5p: 46 % of peak at 512 queries x 1,024 keys, 43 % at 1,024 x 1,024, 47 % at 512 x 2,560. 1,792 x 2,560 did not fit VMEM.
# Segments, which padding needs too, cost nothing forward and 2 % of the cycles backward.
Q_BLOCKS = (512, 640, 768, 896, 1024)
KV_BLOCKS = {2560: 512, 2304: 768, 2048: 512, 1920: 640, 1536: 512, 1280: 640, 1024: 512}
LANES = 128
# The fused backward kernel writes a copy of dq per block of keys, quadratic in the length: 3.1 GB for 17,920 tokens and 48
# heads with 7 blocks of 2,560. Beyond this many blocks the keys are taken in turns, each adding to dq, so that memory stays
# linear. (splash's unfused dq kernel needs no copies, but it computes logits and dout v^T twice: 7 matmuls instead of 5.)
DQ_COPIES = 8
# no mask but the segments: with these arrays absent the kernel visits every block, and the host prepares nothing
_NO_MASK = MaskInfo(None, None, None, None, None)
_MASK_VALUE = kernel.DEFAULT_MASK_VALUE


class _Blocks(NamedTuple):
    """How l queries and m keys are cut: blocks, the lengths they are padded to, turns of the backward pass."""

    q: int
    kv: int
    compute: int
    queries: int
    keys: int
    turns: int

    @classmethod
    def of(cls, l: int, m: int) -> "_Blocks":
        def turns(block: int) -> int:
            return -(-m // (block * DQ_COPIES))

        def padded(length: int, unit: int) -> int:
            return -(-length // unit) * unit

        block_q, block_kv = padded(l, LANES), padded(m, LANES)
        compute = block_kv
        if l > Q_BLOCKS[0]:
            block_q = min(Q_BLOCKS, key=lambda block: (padded(l, block), block))
        if m > min(KV_BLOCKS):
            block_kv = min(KV_BLOCKS, key=lambda block: (padded(m, block * turns(block)), -block))
            compute = KV_BLOCKS[block_kv]
        times = turns(block_kv)
        return cls(block_q, block_kv, compute, padded(l, block_q), padded(m, block_kv * times), times)


def _pad(x: Array, axis: int, length: int, value: int = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def _kernel_layout(
    q: Array, k: Array, v: Array, q_segments: Array | None, kv_segments: Array | None
) -> tuple[_Blocks, Array, Array, Array, kernel.SegmentIds | None]:
    """q (scaled), k, v as (b, heads, tokens, d), padded to blocks; padded keys are of a segment that no query is of."""
    blocks = _Blocks.of(q.shape[1], k.shape[1])
    l, m = blocks.queries, blocks.keys
    if m != k.shape[1] and q_segments is None:
        q_segments, kv_segments = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k))
    ids = None
    if q_segments is not None and kv_segments is not None:
        ids = kernel.SegmentIds(_pad(q_segments, 1, l, -2), _pad(kv_segments, 1, m, -3))
    q, k, v = (_pad(x.swapaxes(1, 2), 2, length) for x, length in ((scaled(q), l), (k, m), (v, m)))
    return blocks, q, k, v, ids


def forward(
    q: Array, k: Array, v: Array, q_segments: Array | None, kv_segments: Array | None, *, interpret: bool = False
) -> tuple[Array, Array]:
    """kernels.forward; `interpret` runs the kernel on any platform, slowly."""
    blocks, qs, ks, vs, ids = _kernel_layout(q, k, v, q_segments, kv_segments)
    sizes = kernel.BlockSizes(block_q=blocks.q, block_kv=blocks.kv, block_kv_compute=blocks.compute)

    def row(q: Array, k: Array, v: Array, ids: kernel.SegmentIds | None) -> Any:
        return kernel._splash_attention_forward(
            _NO_MASK, q, k, v, ids, None, _MASK_VALUE, is_mqa=False, block_sizes=sizes, residual_checkpoint_name=None,
            save_residuals=True, mask_function=None, interpret=interpret,
        )  # fmt: skip

    out, (lse,) = jax.vmap(row)(qs, ks, vs, ids)
    out, lse = out[:, :, : q.shape[1]], lse[:, :, : q.shape[1]]
    if ids is not None:
        # for a query that sees no key the kernel returns the mean of the values, and as lse its mask value, -2e38. With MASKED
        # instead, the backward kernel's exp(mask value - lse) is zero
        seen = lse > MASKED
        out, lse = jnp.where(seen[..., None], out, 0), jnp.where(seen, lse, MASKED)
    return out.swapaxes(1, 2), lse


def backward(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array | None,
    kv_segments: Array | None,
    lse: Array,
    delta: Array,
    dout: Array,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """kernels.backward; the gradients are in the inputs' dtypes, dq in float32 where it is summed over more than one turn."""
    blocks, qs, ks, vs, ids = _kernel_layout(q, k, v, q_segments, kv_segments)
    l, m, turns = blocks.queries, blocks.keys, blocks.turns
    lse, delta, douts = _pad(lse, 2, l), _pad(delta, 2, l), _pad(dout.astype(q.dtype).swapaxes(1, 2), 2, l)
    q_ids, kv_ids = (None, None) if ids is None else ids

    def row(k: Array, v: Array, kv_ids: Array | None, q: Array, q_ids: Array | None, *rest: Any) -> Any:
        ids = None if q_ids is None or kv_ids is None else kernel.SegmentIds(q_ids, kv_ids)
        return kernel._splash_attention_bwd_dkv(
            q, k, v, ids, None, *rest, bq=blocks.q, bkv=blocks.kv, bkv_compute=blocks.compute, is_mqa=False,
            mask_info=_NO_MASK, mask_value=_MASK_VALUE, attn_logits_soft_cap=None, use_fused_bwd_kernel=True,
            q_layout=kernel.QKVLayout.HEAD_DIM_MINOR, k_layout=kernel.QKVLayout.HEAD_DIM_MINOR,
            v_layout=kernel.QKVLayout.HEAD_DIM_MINOR, mask_function=None, interpret=interpret,
        )  # fmt: skip

    def turn(dq: Array, keys: Any) -> Any:
        more, dk, dv = jax.vmap(row)(*keys, qs, q_ids, lse, douts, delta)
        return dq + more.astype(jnp.float32), (dk, dv)

    if turns == 1:
        dq, dk, dv = jax.vmap(row)(ks, vs, kv_ids, qs, q_ids, lse, douts, delta)
    else:
        b, heads, _, d = ks.shape
        cut = [jnp.moveaxis(x.reshape(b, heads, turns, m // turns, d), 2, 0) for x in (ks, vs)]
        kv_ids = None if kv_ids is None else jnp.moveaxis(kv_ids.reshape(b, turns, m // turns), 1, 0)
        dq, parts = lax.scan(turn, jnp.zeros(qs.shape, jnp.float32), (*cut, kv_ids))
        dk, dv = (jnp.moveaxis(x, 0, 2).reshape(b, heads, m, d) for x in parts)
    dq, dk, dv = dq[:, :, : q.shape[1]], dk[:, :, : k.shape[1]], dv[:, :, : k.shape[1]]
    return scaled(dq.swapaxes(1, 2)), dk.swapaxes(1, 2), dv.swapaxes(1, 2)
