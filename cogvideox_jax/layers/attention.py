"""Self-attention over the joint sequence of text and video tokens."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from cogvideox_jax.core.rope import apply_rope
from cogvideox_jax.layers.lora import LoraDense
from cogvideox_jax.layers.norm import layer_norm
from cogvideox_jax.parallel.attention import attention


class JointAttention(nn.Module):
    """Projections with bias, LayerNorm on each head of q and k, rotary embedding, attention, projection (spec 2.6).

    `way`: how tokens that are split over devices attend, a name of parallel.attention.WAYS.
    """

    num_heads: int
    head_dim: int
    out_init: Any
    dtype: Any = jnp.float32
    way: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        rotary: tuple[Float[Array, "#b l half"], Float[Array, "#b l half"]] | None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """`rotary` is (cos, sin) for every token, one angle per pair; text tokens hold angle zero. None: no rotation."""
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        init = nn.initializers.normal(0.02)

        def project(name: str) -> Array:
            return LoraDense(x.shape[-1], dtype=self.dtype, kernel_init=init, name=name)(x).reshape(shape)

        q, k, v = project("query"), project("key"), project("value")
        q, k = layer_norm(1e-6, self.dtype, "norm_q")(q), layer_norm(1e-6, self.dtype, "norm_k")(k)
        if rotary is not None:
            q, k = apply_rope(q, *rotary), apply_rope(k, *rotary)
        out = attention(q, k, v, segment_ids, way=self.way).reshape(x.shape)
        return LoraDense(x.shape[-1], dtype=self.dtype, kernel_init=self.out_init, name="out")(out)
