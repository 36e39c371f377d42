"""Attention over tokens that are split over the sequence axis."""

import jax
from jaxtyping import Array, Float, Int

from cogvideox_jax.parallel.sharding import HEADS, TOKENS, ambient_axis, constrain


def attention(
    q: Float[Array, "b l heads d"],
    k: Float[Array, "b l heads d"],
    v: Float[Array, "b l heads d"],
    segment_ids: Int[Array, "b l"] | None = None,
) -> Float[Array, "b l heads d"]:
    """softmax(q k^T / sqrt(d)) v over all tokens, or over the tokens of the same segment.

    Tokens come in and go out split over `sequence`. Where the heads divide by that axis they are exchanged for the tokens
    (all-to-all) and each device attends with its own heads; else keys and values are gathered.
    """
    ways = ambient_axis("sequence")
    if ways > 1 and q.shape[2] % ways == 0:
        q, k, v = (constrain(x, HEADS) for x in (q, k, v))
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask)
    return constrain(out, TOKENS) if ways > 1 else out
