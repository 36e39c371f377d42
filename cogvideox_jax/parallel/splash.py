"""Attention on one TPU core: jax's splash attention kernel, without its masks, behind kernels.forward and kernels.backward.

Its public interface gives no gradient of a part of the keys, so this file calls two of its private functions. jax is locked to
one version, and tests/parallel/test_attention_tpu.py runs them interpreted and compiles them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array

from cogvideox_jax.parallel.kernels import MASKED, scaled

# Blocks in tokens; beside a block of keys stands how many of them meet the queries at once. The choice is the one that pads
# least (`_blocks`); of equals the smallest block of queries and the largest of keys, by static cycles of the compiled kernel on v5p:
# 46 % of peak at 512 queries x 1,024 keys, 43 % at 1,024 x 1,024, 47 % at 512 x 2,560. 1,792 x 2,560 did not fit VMEM.
Q_BLOCKS = (512, 640, 768, 896, 1024)
KV_BLOCKS = {2560: 512, 2304: 768, 2048: 512, 1920: 640, 1536: 512, 1280: 640, 1024: 512}
LANES = 128
# The fused backward kernel writes a copy of dq per block of keys, quadratic in the length: 3.1 GB for 17,920 tokens and 48
# heads with 7 blocks of 2,560. Beyond this many blocks the keys are taken in turns, each adding to dq, so that memory stays
# linear. (The unfused dq kernel needs no copies, but computes logits and dout v^T twice: 7 matmuls instead of 5.)
DQ_COPIES = 8
# no mask but the segments: with these arrays absent the kernel visits every block, and the host prepares nothing
_NO_MASK = MaskInfo(None, None, None, None, None)
_MASK_VALUE = kernel.DEFAULT_MASK_VALUE


def _blocks(l: int, m: int) -> tuple[kernel.BlockSizes, int, int]:
    """Block sizes for l queries and m keys, and the lengths that they ask for."""

    def padded(length: int, block: int) -> int:
        return -(-length // block) * block

    block_q = min(Q_BLOCKS, key=lambda block: (padded(l, block), block)) if l > Q_BLOCKS[0] else padded(l, LANES)
    if m > min(KV_BLOCKS):
        block_kv = min(KV_BLOCKS, key=lambda block: (padded(m, block), -block))
        compute = KV_BLOCKS[block_kv]
    else:
        block_kv = compute = padded(m, LANES)
    sizes = kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    return sizes, padded(l, block_q), padded(m, block_kv)


def _pad(x: Array, axis: int, length: int, value: int = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def _kernel_layout(
    q: Array, k: Array, v: Array, q_segments: Array | None, kv_segments: Array | None
) -> tuple[kernel.BlockSizes, Array, Array, Array, kernel.SegmentIds | None]:
    """q (scaled), k, v as (b, heads, tokens, d), padded to blocks; padded keys are of a segment that no query is of."""
    sizes, l, m = _blocks(q.shape[1], k.shape[1])
    if m != k.shape[1] and q_segments is None:
        q_segments, kv_segments = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k))
    ids = None
    if q_segments is not None and kv_segments is not None:
        ids = kernel.SegmentIds(_pad(q_segments, 1, l, -2), _pad(kv_segments, 1, m, -3))
    q, k, v = (_pad(x.swapaxes(1, 2), 2, length) for x, length in ((scaled(q), l), (k, m), (v, m)))
    return sizes, q, k, v, ids


def forward(
    q: Array, k: Array, v: Array, q_segments: Array | None, kv_segments: Array | None, *, interpret: bool = False
) -> tuple[Array, Array]:
    """kernels.forward; `interpret` runs the kernel on any platform, slowly."""
    sizes, qs, ks, vs, ids = _kernel_layout(q, k, v, q_segments, kv_segments)

    def row(q: Array, k: Array, v: Array, ids: kernel.SegmentIds | None) -> Any:
        return kernel._splash_attention_forward(
            _NO_MASK, q, k, v, ids, None, _MASK_VALUE, is_mqa=False, block_sizes=sizes, residual_checkpoint_name=None,
            save_residuals=True, mask_function=None, interpret=interpret,
        )  # fmt: skip

    out, (lse,) = jax.vmap(row)(qs, ks, vs, ids)
    out, lse = out[:, :, : q.shape[1]], lse[:, :, : q.shape[1]]
    if ids is not None:
        # for a query that sees no key the kernel returns the mean of the values
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
    sizes, qs, ks, vs, ids = _kernel_layout(q, k, v, q_segments, kv_segments)
    l, m, block = qs.shape[2], ks.shape[2], sizes.block_kv_dkv
    assert block is not None
    if ids is not None:
        # where no key is seen every logit equals the kernel's mask value and lse must not
        dout = jnp.where((lse > MASKED).swapaxes(1, 2)[..., None], dout, 0)
        lse = jnp.where(lse > MASKED, lse, 0)
    lse, delta, douts = _pad(lse, 2, l), _pad(delta, 2, l), _pad(dout.astype(q.dtype).swapaxes(1, 2), 2, l)

    def row(k: Array, v: Array, kv_ids: Array | None, q: Array, q_ids: Array | None, *rest: Array) -> Any:
        ids = None if q_ids is None or kv_ids is None else kernel.SegmentIds(q_ids, kv_ids)
        return kernel._splash_attention_bwd_dkv(
            q, k, v, ids, None, *rest, bq=sizes.block_q_dkv, bkv=block, bkv_compute=sizes.block_kv_dkv_compute, is_mqa=False,
            mask_info=_NO_MASK, mask_value=_MASK_VALUE, attn_logits_soft_cap=None, use_fused_bwd_kernel=True,
            q_layout=sizes.q_layout, k_layout=sizes.k_layout, v_layout=sizes.v_layout, mask_function=None,
            interpret=interpret,
        )  # fmt: skip

    queries = (qs, None if ids is None else ids.q, lse, douts, delta)
    turns = -(-m // (block * DQ_COPIES))
    step = -(-m // (block * turns)) * block
    dq, parts = None, []
    for start in range(0, m, step):
        k_turn, v_turn = ks[:, :, start : start + step], vs[:, :, start : start + step]
        more, dk, dv = jax.vmap(row)(k_turn, v_turn, None if ids is None else ids.kv[:, start : start + step], *queries)
        parts.append((dk, dv))
        if turns == 1:
            dq = more
        else:
            dq = more.astype(jnp.float32) + (0 if dq is None else dq)
            # the next turn waits for this one's sum: otherwise all turns' copies of dq could be alive at once
            dq, queries = lax.optimization_barrier((dq, queries))
    dk, dv = (jnp.concatenate(part, axis=2)[:, :, : k.shape[1]].swapaxes(1, 2) for part in zip(*parts, strict=True))
    assert dq is not None
    return scaled(dq[:, :, : q.shape[1]].swapaxes(1, 2)), dk, dv
