"""Names of the T5 v1.1 encoder in Hugging Face's files (spec 1.5)."""

from cogvideox_jax.models.convert.table import Entry
from cogvideox_jax.models.t5 import T5Encoder


def huggingface_names(model: T5Encoder) -> list[Entry]:
    """Every tensor of `T5EncoderModel`; the embedding is stored once, as shared.weight."""
    attention, mlp = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    bias = f"encoder.block.0.{attention}.relative_attention_bias.weight"
    entries = [Entry("embedding", "shared.weight"), Entry("relative_bias", bias)]
    for i in range(model.num_layers):
        for ours, name in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            entries.append(Entry(f"layers/{ours}/kernel", f"encoder.block.{i}.{attention}.{name}.weight", "linear", i))
        for name in ("wi_0", "wi_1", "wo"):
            entries.append(Entry(f"layers/{name}/kernel", f"encoder.block.{i}.{mlp}.{name}.weight", "linear", i))
        entries.append(Entry("layers/attention_norm/scale", f"encoder.block.{i}.layer.0.layer_norm.weight", "same", i))
        entries.append(Entry("layers/mlp_norm/scale", f"encoder.block.{i}.layer.1.layer_norm.weight", "same", i))
    return [*entries, Entry("final_norm/scale", "encoder.final_layer_norm.weight")]
