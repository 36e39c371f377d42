"""The expert transformer: text and video tokens share every weight but the modulation (paper section 2.2; spec section 2)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cogvideox_jax.core.rope import cos_sin, rotary_angles, sincos_table
from cogvideox_jax.core.video import patchify, unpatchify
from cogvideox_jax.layers.attention import JointAttention
from cogvideox_jax.layers.conv import torch_uniform
from cogvideox_jax.layers.embed import ScalarEmbed
from cogvideox_jax.layers.norm import layer_norm
from cogvideox_jax.parallel.sharding import TOKENS, constrain

POSITIONS = ("sincos", "rope", "rope+learned")
# What the backward pass computes again of a block; else it is kept. The attention's output and logsumexp are small beside what
# they cost; "offload" keeps them, and each block's input, in the host's memory.
_KEPT = ("attention_out", "attention_lse")
_OFFLOADED = ("block_input", *_KEPT)
REMAT = {
    "nothing": None,
    "attention": jax.checkpoint_policies.save_only_these_names(*_KEPT),
    "everything": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(_OFFLOADED),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Modulation(nn.Module):
    """Expert adaptive LayerNorm: from the time embedding, one (shift, scale[, gate]) per modality (spec 2.5).

    The linear layer's output is chunked as video's vectors, then text's.
    """

    features: int
    parts: int
    init: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, emb: Float[Array, "b e"]) -> Float[Array, "b parts features"]:
        out = nn.Dense(self.parts * self.features, dtype=self.dtype, kernel_init=self.init, name="linear")(nn.silu(emb))
        return out.reshape(emb.shape[0], self.parts, self.features)


def by_modality(
    is_text: Int[Array, "l"], modulation: Float[Array, "b six d"]
) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"], Float[Array, "b l d"]]:
    """(shift, scale, gate) of every token: rows 0-2 for video tokens, 3-5 for text."""
    video, text = modulation[:, :3, None], modulation[:, 3:, None]
    chosen = jnp.where(is_text[None, None, :, None], text, video)
    return chosen[:, 0], chosen[:, 1], chosen[:, 2]


class Block(nn.Module):
    """Modulated attention and modulated MLP, gated, on the joint sequence [text ; video]."""

    num_heads: int
    head_dim: int
    epsilon: float
    out_scale: float
    modulation_init: Any
    dtype: Any = jnp.float32
    way: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        emb: Float[Array, "b e"],
        is_text: Int[Array, "l"],
        rotary: tuple[Array, Array] | None,
        segment_ids: Int[Array, "b l"] | None,
    ) -> tuple[Float[Array, "b l d"], None]:
        x = checkpoint_name(x, "block_input")
        width = x.shape[-1]
        init, out_init = nn.initializers.normal(0.02), nn.initializers.normal(self.out_scale)

        def modulated(name: str) -> tuple[Array, Array]:
            modulation = Modulation(width, 6, self.modulation_init, self.dtype, name=f"{name}_modulation")(emb)
            shift, scale, gate = by_modality(is_text, modulation)
            return layer_norm(self.epsilon, self.dtype, name)(x) * (1 + scale) + shift, gate

        y, gate = modulated("norm1")
        y = JointAttention(self.num_heads, self.head_dim, out_init, self.dtype, self.way, name="attention")(
            y, rotary, segment_ids
        )
        x = constrain(x + gate * y, TOKENS)
        y, gate = modulated("norm2")
        y = nn.Dense(4 * width, dtype=self.dtype, kernel_init=init, name="mlp_up")(y)
        y = nn.Dense(width, dtype=self.dtype, kernel_init=out_init, name="mlp_down")(nn.gelu(y, approximate=True))
        return constrain(x + gate * y, TOKENS), None


class Transformer(nn.Module):
    """The denoiser. The defaults are CogVideoX's own; configs/models.py holds the public variants.

    A collection "lora" beside "params" adds a LoRA to the attention's projections (models.lora).

    Fields:
      position: "sincos" (2B), "rope" (5B, 1.5) or "rope+learned" (5B-I2V).
      learned_grid: (t, h, w) tokens of the learned table.
      patch_size_t: 1, or 2 for the 1.5 family.
      ofs_dim: width of the ofs embedding, 0 without one.
      epsilon: of the block and final LayerNorms: 1e-5 in diffusers' files, 1e-6 in SAT (spec 10.1).
      zero_modulation: start the modulation at zero (adaLN-zero) instead of torch's default (spec 2.13).
      remat: what the backward pass recomputes of each block, a name of REMAT.
      attention: how tokens that are split over `sequence` attend, a name of parallel.attention.WAYS.
    """

    num_layers: int
    num_heads: int
    position: str = "rope"
    head_dim: int = 64
    patch_size: int = 2
    patch_size_t: int = 1
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    max_text_tokens: int = 226
    time_dim: int = 512
    ofs_dim: int = 0
    learned_grid: tuple[int, int, int] = (0, 0, 0)
    spatial_scale: float = 1.875
    epsilon: float = 1e-5
    zero_modulation: bool = True
    remat: str = "nothing"
    attention: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b t h w c"],
        context: Float[Array, "b s text_dim"],
        timesteps: Float[Array, "b"],
        positions: Float[Array, "n 3"],
        *,
        ofs: Float[Array, "b"] | None = None,
    ) -> Float[Array, "b t h w out"]:
        """Predict the velocity.

        Args:
          latents: scaled noisy latents; image-to-video models take the image's latents on channels 16 to 31. t, h and w
            divide by the patch sizes.
          context: text embeddings, max_text_tokens of them or fewer.
          timesteps: 0 .. 999.
          positions: (t, row, column) of every video token (core.rope.grid_positions).
          ofs: required by models with ofs_dim, 2.0 for the released one.

        Returns: the prediction at the latents' size, in the compute dtype.
        """
        if self.position not in POSITIONS or self.remat not in REMAT:
            raise ValueError(
                f"position {self.position!r} not in {POSITIONS}, or remat {self.remat!r} not in {tuple(REMAT)}"
            )
        if (ofs is not None) != bool(self.ofs_dim):
            raise ValueError("ofs must be given exactly for the models that have an ofs embedding (1.5 image-to-video)")
        width = self.num_heads * self.head_dim
        _, t, h, w, _ = latents.shape
        num_text = context.shape[1]
        grid = (t // self.patch_size_t, h // self.patch_size, w // self.patch_size)

        emb = ScalarEmbed(width, self.time_dim, self.dtype, name="time_embed")(timesteps)
        if ofs is not None:
            emb = emb + ScalarEmbed(self.ofs_dim, self.time_dim, self.dtype, name="ofs_embed")(ofs)

        tokens = patchify(latents.astype(self.dtype), self.patch_size, self.patch_size_t)
        xavier = nn.initializers.xavier_uniform()
        tokens = nn.Dense(width, dtype=self.dtype, kernel_init=xavier, name="patch_embed")(tokens)
        text = nn.Dense(width, dtype=self.dtype, kernel_init=torch_uniform, name="text_embed")(
            context.astype(self.dtype)
        )
        if self.position == "sincos":
            tokens = tokens + sincos_table(*grid, width, spatial_scale=self.spatial_scale).astype(self.dtype)
        x = jnp.concatenate([text, tokens], axis=1)
        if self.position == "rope+learned":
            rows = self.max_text_tokens + self.learned_grid[0] * self.learned_grid[1] * self.learned_grid[2]
            table = self.param("pos_embed", nn.initializers.zeros, (rows, width))
            # other frame counts take the first rows, as SAT does; another size has no meaning in this table
            if num_text != self.max_text_tokens or grid[1:] != self.learned_grid[1:] or grid[0] > self.learned_grid[0]:
                raise ValueError(
                    f"the learned position table is for {self.max_text_tokens} text tokens and a grid of up to "
                    f"{self.learned_grid}, got {num_text} and {grid}"
                )
            x = x + table[: x.shape[1]].astype(self.dtype)
        x = constrain(x, TOKENS)

        is_text = jnp.arange(x.shape[1]) < num_text
        rotary = None
        if self.position != "sincos":
            # text stands at the origin, where the rotation is the identity
            everywhere = jnp.concatenate([jnp.zeros((num_text, 3), jnp.float32), jnp.asarray(positions)])
            rotary = cos_sin(rotary_angles(everywhere[None], self.head_dim))

        # under scan nothing can be merged across iterations, so XLA need not be kept from it
        policy = REMAT[self.remat]
        block = Block if policy is None else nn.remat(Block, prevent_cse=False, policy=policy)
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.num_layers,
        )
        modulation_init = nn.initializers.zeros if self.zero_modulation else torch_uniform
        out_scale = 0.02 / (2 * self.num_layers) ** 0.5
        fields = (self.num_heads, self.head_dim, self.epsilon, out_scale, modulation_init, self.dtype, self.attention)
        x, _ = stack(*fields, name="blocks")(x, emb, is_text, rotary, None)

        x = layer_norm(self.epsilon, self.dtype, "norm_final")(x[:, num_text:])
        shift, scale = jnp.split(Modulation(width, 2, modulation_init, self.dtype, name="out_modulation")(emb), 2, 1)
        x = layer_norm(self.epsilon, self.dtype, "norm_out")(x) * (1 + scale) + shift
        features = self.patch_size**2 * self.patch_size_t * self.out_channels
        x = nn.Dense(features, dtype=self.dtype, kernel_init=xavier, name="proj_out")(x)
        return unpatchify(x, t, h, w, self.patch_size, self.patch_size_t)


def num_tokens(model: Transformer, latent_shape: tuple[int, int, int]) -> int:
    """Tokens of one sample, text included, for latents of (t, h, w)."""
    t, h, w = latent_shape
    return model.max_text_tokens + t // model.patch_size_t * (h // model.patch_size) * (w // model.patch_size)


def init(model: Transformer, key: jax.Array, latent_shape: tuple[int, int, int]) -> Any:
    """Fresh parameters; `latent_shape` is any legal (t, h, w)."""
    t, h, w = latent_shape
    grid = t // model.patch_size_t * (h // model.patch_size) * (w // model.patch_size)
    ofs = jnp.zeros((1,)) if model.ofs_dim else None
    return model.init(
        key,
        jnp.zeros((1, t, h, w, model.in_channels)),
        jnp.zeros((1, model.max_text_tokens, model.text_dim)),
        jnp.zeros((1,)),
        jnp.zeros((grid, 3)),
        ofs=ofs,
    )["params"]
