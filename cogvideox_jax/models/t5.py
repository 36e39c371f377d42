"""The T5 v1.1 encoder (arXiv 1910.10683, 2002.05202; spec t5x.md), CogVideoX's text encoder."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from cogvideox_jax.layers.norm import RMSNorm


def relative_buckets(length: int, *, num_buckets: int = 32, max_distance: int = 128) -> Int[np.ndarray, "l l"]:
    """Bucket of each (query, key) distance: half for keys after the query; exact below 8, then logarithmic."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    far = np.abs(distance)
    scaled = np.log(np.maximum(far, 1).astype(np.float32) / exact) / math.log(max_distance / exact) * (half - exact)
    large = np.minimum(exact + scaled.astype(np.int32), half - 1)
    return (distance > 0) * half + np.where(far < exact, far, large)


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and gated-GELU MLP, no biases, logits not scaled."""

    num_heads: int
    head_dim: int
    mlp_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], bias: Float[Array, "#b heads l l"]) -> tuple[Array, None]:
        width = x.shape[-1]

        def dense(features: int, name: str, fan: int) -> nn.Dense:
            init = nn.initializers.normal(fan**-0.5)
            return nn.Dense(features, use_bias=False, dtype=self.dtype, kernel_init=init, name=name)

        y = RMSNorm(dtype=self.dtype, name="attention_norm")(x)
        inner = self.num_heads * self.head_dim
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        q = dense(inner, "query", width * self.head_dim)(y).reshape(shape)
        k = dense(inner, "key", width)(y).reshape(shape)
        v = dense(inner, "value", width)(y).reshape(shape)
        logits = jnp.einsum("blhd,bmhd->bhlm", q, k, preferred_element_type=jnp.float32) + bias
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        y = jnp.einsum("bhlm,bmhd->blhd", weights, v).reshape(*x.shape[:2], inner)
        x = x + dense(width, "out", inner)(y)
        y = RMSNorm(dtype=self.dtype, name="mlp_norm")(x)
        gate = nn.gelu(dense(self.mlp_dim, "wi_0", width)(y), approximate=True)
        return x + dense(width, "wo", self.mlp_dim)(gate * dense(self.mlp_dim, "wi_1", width)(y)), None


class T5Encoder(nn.Module):
    """Token ids -> embeddings after the final norm. Layers run under scan; one position table serves them all."""

    num_layers: int
    width: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int = 32128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None) -> Float[Array, "b l width"]:
        """Encode. CogVideoX passes no mask, so padding is attended like any token; t5x masks it."""
        table = self.param("embedding", nn.initializers.normal(1.0), (self.vocab_size, self.width))
        positions = self.param("relative_bias", nn.initializers.normal(self.width**-0.5), (32, self.num_heads))
        bias = positions[relative_buckets(ids.shape[1])].astype(jnp.float32).transpose(2, 0, 1)[None]
        if mask is not None:
            bias = jnp.where(mask[:, None, None, :], bias, -1e10)
        stack = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.num_layers,
        )
        x = table[ids].astype(self.dtype)
        x, _ = stack(self.num_heads, self.head_dim, self.mlp_dim, self.dtype, name="layers")(x, bias)
        return RMSNorm(dtype=self.dtype, name="final_norm")(x)


@functools.partial(jax.jit, static_argnames="model")
def encode(
    model: T5Encoder, params: Any, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None
) -> Float[Array, "b l width"]:
    """Text embeddings of token ids; compiled once per shape."""
    return model.apply({"params": params}, ids, mask)
