"""Names of the expert transformer in diffusers' files (spec 2.11)."""

from cogvideox_jax.models.convert.table import Entry
from cogvideox_jax.models.transformer import Transformer


def _linear(ours: str, theirs: str, layer: int | None = None) -> list[Entry]:
    return [
        Entry(f"{ours}/kernel", f"{theirs}.weight", "linear", layer),
        Entry(f"{ours}/bias", f"{theirs}.bias", "same", layer),
    ]


def _norm(ours: str, theirs: str, layer: int | None = None) -> list[Entry]:
    return [
        Entry(f"{ours}/scale", f"{theirs}.weight", "same", layer),
        Entry(f"{ours}/bias", f"{theirs}.bias", "same", layer),
    ]


def _block(layer: int) -> list[Entry]:
    theirs = f"transformer_blocks.{layer}"
    entries = []
    for i in (1, 2):
        entries += _linear(f"blocks/norm{i}_modulation/linear", f"{theirs}.norm{i}.linear", layer)
        entries += _norm(f"blocks/norm{i}", f"{theirs}.norm{i}.norm", layer)
    for ours, name in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("out", "to_out.0")):
        entries += _linear(f"blocks/attention/{ours}", f"{theirs}.attn1.{name}", layer)
    for name in ("norm_q", "norm_k"):
        entries += _norm(f"blocks/attention/{name}", f"{theirs}.attn1.{name}", layer)
    entries += _linear("blocks/mlp_up", f"{theirs}.ff.net.0.proj", layer)
    return entries + _linear("blocks/mlp_down", f"{theirs}.ff.net.2", layer)


def diffusers_names(model: Transformer) -> list[Entry]:
    """Every tensor of `CogVideoXTransformer3DModel` for this variant: 736, 1024, 1025, 1024 and 1028 for the public ones."""
    patch = "linear" if model.patch_size_t > 1 else f"patch{model.patch_size}"
    entries = [
        Entry("patch_embed/kernel", "patch_embed.proj.weight", patch),
        Entry("patch_embed/bias", "patch_embed.proj.bias"),
        *_linear("text_embed", "patch_embed.text_proj"),
        *_linear("time_embed/linear_1", "time_embedding.linear_1"),
        *_linear("time_embed/linear_2", "time_embedding.linear_2"),
    ]
    if model.ofs_dim:
        entries += _linear("ofs_embed/linear_1", "ofs_embedding.linear_1")
        entries += _linear("ofs_embed/linear_2", "ofs_embedding.linear_2")
    if model.position == "rope+learned":
        entries.append(Entry("pos_embed", "patch_embed.pos_embedding", "row"))
    for layer in range(model.num_layers):
        entries += _block(layer)
    entries += _norm("norm_final", "norm_final")
    entries += _linear("out_modulation/linear", "norm_out.linear")
    entries += _norm("norm_out", "norm_out.norm")
    return entries + _linear("proj_out", "proj_out")
