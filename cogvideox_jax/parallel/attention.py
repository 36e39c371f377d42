"""Attention over tokens that are split over the sequence axis.

Three ways, each run on every device with its share of the tokens (shard_map); kernels.py attends.

- all_to_all: heads are exchanged for tokens, so each device attends over all tokens with its share of the heads (DeepSpeed
  Ulysses, arXiv 2309.14509). Least traffic: 4 activations forward, 4 backward, each leaving (n - 1) / n of itself.
- ring: keys and values travel around the axis, and each device's queries meet one share after the other (arXiv 2310.01889). Any
  number of heads; traffic grows with the axis, but next to the attention and not before it.
- gather: every device collects all keys and values. The plain one, which the others are compared with.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.parallel import kernels
from cogvideox_jax.parallel.sharding import ambient_axis

WAYS = ("auto", "all_to_all", "ring", "gather")


def choose(way: str, heads: int, sequence: int) -> str:
    """The way itself, or what "auto" stands for; InputError for one that is unknown or that the heads do not allow."""
    if way not in WAYS:
        raise InputError(f"attention={way!r} is not a way to attend: choose one of {', '.join(WAYS)}")
    if way == "all_to_all" and heads % sequence:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise InputError(
            f"attention=all_to_all shares {heads} heads among sequence={sequence} devices, which does not divide: "
            f"choose attention=ring, or sequence from {', '.join(map(str, fitting))}"
        )
    if way == "auto":
        return "ring" if heads % sequence else "all_to_all"
    return way


def attention(
    q: Float[Array, "b l heads d"],
    k: Float[Array, "b l heads d"],
    v: Float[Array, "b l heads d"],
    segment_ids: Int[Array, "b l"] | None = None,
    *,
    way: str = "auto",
) -> Float[Array, "b l heads d"]:
    """softmax(q k^T / sqrt(d)) v over all tokens, or over the tokens of the same segment.

    Tokens come in and go out split over `sequence`, the batch over data and fsdp; a number of tokens that does not divide is
    padded inside, a batch that does not divide is attended to by every device.

    Args:
      segment_ids: from 0 on.
      way: one of WAYS. "auto" is all_to_all where the heads divide by the axis, else ring.

    Returns: q's dtype; out and logsumexp are named for remat policies (kernels.kept). Raises InputError as `choose` does.
    """
    sequence = ambient_axis("sequence")
    way = choose(way, q.shape[2], sequence)
    if jax.sharding.get_abstract_mesh().empty:
        return kernels.local_attention(q, k, v, segment_ids, segment_ids)[0]
    b, l = q.shape[:2]
    padding = -l % sequence
    if padding:
        if segment_ids is None:
            segment_ids = jnp.zeros((b, l), jnp.int32)
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=-1)
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    # inside jit an uneven placement is legal, inside shard_map it is not
    batch = None if b % (ambient_axis("data") * ambient_axis("fsdp")) else ("data", "fsdp")
    tokens = P(batch, "sequence")
    run = jax.shard_map(
        {"all_to_all": _all_to_all, "ring": _ring, "gather": _gather}[way],
        in_specs=(tokens, tokens, tokens, P(batch)),
        out_specs=tokens,
        check_vma=False,
    )
    return run(q, k, v, segment_ids)[:, :l]


def _share(segments: Array | None, index: Any, tokens: int) -> Array | None:
    """The segments of the tokens that the device at `index` of the axis holds."""
    return None if segments is None else lax.dynamic_slice_in_dim(segments, index * tokens, tokens, axis=1)


# --------------------------------------------------------------------------------------------------------- all to all


def _to_heads(*shares: Float[Array, "b t heads d"]) -> list[Float[Array, "b l h d"]]:
    """Every device's tokens with this device's heads, of several arrays in one exchange.

    What travels has heads and d as one dimension: the TPU pads the last dimension to 128, which would double a head of 64.
    """
    n = lax.axis_size("sequence")
    b, t, heads, d = shares[0].shape
    packed = jnp.stack([x.reshape(b, t, n, heads // n * d) for x in shares])
    packed = lax.all_to_all(packed.transpose(3, 0, 1, 2, 4), "sequence", split_axis=0, concat_axis=0)
    return list(packed.transpose(1, 2, 0, 3, 4).reshape(len(shares), b, n * t, heads // n, d))


def _to_tokens(*shares: Float[Array, "b l h d"]) -> list[Float[Array, "b t heads d"]]:
    """The way back: this device's tokens with every device's heads."""
    n = lax.axis_size("sequence")
    b, l, h, d = shares[0].shape
    packed = jnp.stack([x.reshape(b, n, l // n, h * d) for x in shares])
    packed = lax.all_to_all(packed.transpose(2, 0, 1, 3, 4), "sequence", split_axis=0, concat_axis=0)
    return list(packed.transpose(1, 2, 3, 0, 4).reshape(len(shares), b, l // n, n * h, d))


@jax.custom_vjp
def _all_to_all(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    return _all_to_all_forward(q, k, v, segments)[0]


def _all_to_all_forward(q: Array, k: Array, v: Array, segments: Array | None) -> Any:
    q, k, v = _to_heads(q, k, v)
    out, lse = kernels.forward(q, k, v, segments, segments)
    # kept after the exchange: what follows needs it so, and a backward pass that keeps it exchanges it no second time
    out, lse = kernels.kept(_to_tokens(out)[0], lse)
    return out, (q, k, v, segments, lse, out)


def _all_to_all_backward(residuals: Any, dout: Array) -> Any:
    q, k, v, segments, lse, out = residuals
    delta = lax.all_to_all(kernels.row_delta(out, dout), "sequence", split_axis=2, concat_axis=1, tiled=True)
    (dout,) = _to_heads(dout)
    gradients = kernels.backward(q, k, v, segments, segments, lse, delta.swapaxes(1, 2), dout)
    return *_to_tokens(*(g.astype(q.dtype) for g in gradients)), None


_all_to_all.defvjp(_all_to_all_forward, _all_to_all_backward)


# --------------------------------------------------------------------------------------------------------------- ring


def _next(tree: Any) -> Any:
    """Hand a tree on to the next device of the axis, and take the previous one's."""
    n = lax.axis_size("sequence")
    return lax.ppermute(tree, "sequence", [(i, (i + 1) % n) for i in range(n)])


def _segments_at(step: Any, segments: Array | None, tokens: int) -> tuple[Array | None, Array | None]:
    """Segments of this device's queries, and of the keys that reach it at a step of the ring."""
    n, here = lax.axis_size("sequence"), lax.axis_index("sequence")
    return _share(segments, here, tokens), _share(segments, (here - step) % n, tokens)


@jax.custom_vjp
def _ring(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    return _ring_forward(q, k, v, segments)[0]


def _ring_forward(q: Array, k: Array, v: Array, segments: Array | None) -> Any:
    def attend(sums: Any, step: Any, kv: Any) -> Any:
        out, lse = kernels.forward(q, kv[0], kv[1], *_segments_at(step, segments, q.shape[1]))
        return kernels.merge(sums[0], sums[1], out, lse)

    def turn(carry: Any, step: Any) -> Any:
        kv, sums = carry
        # handed on before it is used: the transfer and the attention are independent, and run at the same time
        return (_next(kv), attend(sums, step, kv)), None

    last = lax.axis_size("sequence") - 1
    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full((q.shape[0], q.shape[2], q.shape[1]), kernels.MASKED)
    (kv, sums), _ = lax.scan(turn, ((k, v), nothing), jnp.arange(last))
    out, lse = attend(sums, last, kv)
    out, lse = kernels.kept(out.astype(q.dtype), lse)
    return out, (q, k, v, segments, lse, out)


def _ring_backward(residuals: Any, dout: Array) -> Any:
    q, k, v, segments, lse, out = residuals
    delta = kernels.row_delta(out, dout).swapaxes(1, 2)

    def gradients(step: Any, kv: Any) -> Any:
        mine, theirs = _segments_at(step, segments, q.shape[1])
        parts = kernels.backward(q, kv[0], kv[1], mine, theirs, lse, delta, dout)
        dq, dk, dv = (part.astype(jnp.float32) for part in parts)
        return dq, (dk, dv)

    def turn(carry: Any, step: Any) -> Any:
        kv, dq, dkv = carry
        # the sums travel one step behind the keys they belong to, while this step's share is being computed
        more_dq, more_dkv = gradients(step, kv)
        return (_next(kv), dq + more_dq, jax.tree.map(jnp.add, _next(dkv), more_dkv)), None

    first = gradients(0, (k, v))
    (_, dq, dkv), _ = lax.scan(turn, (_next((k, v)), *first), jnp.arange(1, lax.axis_size("sequence")))
    dk, dv = _next((dkv[0].astype(k.dtype), dkv[1].astype(v.dtype)))
    return dq.astype(q.dtype), dk, dv, None


_ring.defvjp(_ring_forward, _ring_backward)


# ------------------------------------------------------------------------------------------------------------- gather


def _gather(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    mine = _share(segments, lax.axis_index("sequence"), q.shape[1])
    k, v = (lax.all_gather(x, "sequence", axis=1, tiled=True) for x in (k, v))
    return kernels.local_attention(q, k, v, mine, segments)[0]
