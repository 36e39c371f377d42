"""Names and layouts of SAT's checkpoints, in which CogVideoX was published first (spec 2.12, 3.9, 4.9), as diffusers has them.

Pure: tensors are anything with a shape and a dtype that np.asarray reads. The files are pickles; the one program that opens
them is launch/convert_sat.py.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.core.video import latent_frames
from cogvideox_jax.models.convert import lora, table
from cogvideox_jax.models.convert.files import Spec, listing
from cogvideox_jax.models.convert.folder import NETWORKS

PREFIX = "model.diffusion_model."
# a checkpoint's levels above the tensors
_LEVELS = ("module", "model", "state_dict")
# what diffusers computes or does not have: a key with one of these parts is left out
_DROPPED = {"freqs_sin", "freqs_cos", "embed_tokens", "position_embedding", "position_embeddings"}
_PATCH_SIZE = 2
_EPSILON = 1e-6  # of every LayerNorm in SAT (spec 10.1)
_VAE_DEPTH, _VAE_GROUPS = 4, 32
_VAE_SAMPLE = {"sample_height": 480, "sample_width": 720}


class Variant(NamedTuple):
    """A public model: what its file tells by shapes, and what SAT keeps in its yaml files (spec 1.1, 1.2)."""

    num_layers: int
    width: int
    in_channels: int
    patch_size_t: int
    position: str
    has_ofs: bool
    max_text_tokens: int
    sample: tuple[int, int, int]  # height and width in latents, frames in pixels
    scaling_factor: float  # of its VAE
    invert_scale_latents: bool


_FIRST, _NEXT = (60, 90, 49), (300, 300, 81)
VARIANTS = {
    "2b": Variant(30, 1920, 16, 1, "sincos", False, 226, _FIRST, 1.15258426, False),
    "5b": Variant(42, 3072, 16, 1, "rope", False, 226, _FIRST, 0.7, False),
    "5b-i2v": Variant(42, 3072, 32, 1, "rope+learned", False, 226, _FIRST, 0.7, False),
    "1.5-5b": Variant(42, 3072, 16, 2, "rope", False, 224, _NEXT, 0.7, True),
    "1.5-5b-i2v": Variant(42, 3072, 32, 2, "rope", True, 224, _NEXT, 0.7, True),
}


class Rows(NamedTuple):
    """A tensor of diffusers': some of the equal parts into which the first dimension of one of SAT's is cut."""

    name: str  # SAT's
    parts: int = 1
    take: tuple[int, ...] = (0,)


class Cut:
    """`Rows` of a tensor: its shape and dtype are known, its values are read when np.asarray asks for them."""

    def __init__(self, tensor: Any, rows: Rows):
        self._tensor, self._rows = tensor, rows
        count, *rest = tensor.shape or (1,)
        self.shape = tuple(tensor.shape) if rows.parts == 1 else (count // rows.parts * len(rows.take), *rest)
        self.dtype = np.dtype(tensor.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = np.asarray(self._tensor)
        if self._rows.parts > 1:
            parts = np.split(values, self._rows.parts)
            values = np.concatenate([parts[i] for i in self._rows.take])
        return values if dtype is None else values.astype(dtype, copy=False)


class Found(NamedTuple):
    """What a checkpoint holds, in diffusers' terms."""

    kind: str  # transformer, vae or lora
    config: dict[str, Any]  # config.json; empty for a LoRA
    chosen: dict[str, Any]  # what of it the file does not tell
    tensors: dict[str, Cut]
    left_out: int  # how many tensors the file holds beside these
    metadata: dict[str, str]  # for the header of a LoRA's file


# diffusers' module -> SAT's, without PREFIX; {} is the layer
_MODULES = {
    "patch_embed.proj": Rows("mixins.patch_embed.proj"),
    "patch_embed.text_proj": Rows("mixins.patch_embed.text_proj"),
    "patch_embed": Rows("mixins.pos_embed"),  # pos_embedding itself
    "time_embedding.linear_1": Rows("time_embed.0"),
    "time_embedding.linear_2": Rows("time_embed.2"),
    "ofs_embedding.linear_1": Rows("ofs_embed.0"),
    "ofs_embedding.linear_2": Rows("ofs_embed.2"),
    "norm_final": Rows("transformer.final_layernorm"),
    "norm_out.linear": Rows("mixins.final_layer.adaLN_modulation.1"),
    "norm_out.norm": Rows("mixins.final_layer.norm_final"),  # the other norm_final
    "proj_out": Rows("mixins.final_layer.linear"),
    # (shift, scale, gate) of the attention's norm and of the MLP's for video, then the same for text
    "norm1.linear": Rows("mixins.adaln_layer.adaLN_modulations.{}.1", 12, (0, 1, 2, 6, 7, 8)),
    "norm2.linear": Rows("mixins.adaln_layer.adaLN_modulations.{}.1", 12, (3, 4, 5, 9, 10, 11)),
    "norm1.norm": Rows("transformer.layers.{}.input_layernorm"),
    "norm2.norm": Rows("transformer.layers.{}.post_attention_layernorm"),
    "attn1.to_q": Rows("transformer.layers.{}.attention.query_key_value", 3, (0,)),
    "attn1.to_k": Rows("transformer.layers.{}.attention.query_key_value", 3, (1,)),
    "attn1.to_v": Rows("transformer.layers.{}.attention.query_key_value", 3, (2,)),
    "attn1.to_out.0": Rows("transformer.layers.{}.attention.dense"),
    "attn1.norm_q": Rows("mixins.adaln_layer.query_layernorm_list.{}"),
    "attn1.norm_k": Rows("mixins.adaln_layer.key_layernorm_list.{}"),
    "ff.net.0.proj": Rows("transformer.layers.{}.mlp.dense_h_to_4h"),
    "ff.net.2": Rows("transformer.layers.{}.mlp.dense_4h_to_h"),
}


def transformer_rows(name: str) -> Rows:
    """Where SAT keeps a tensor of diffusers' transformer (spec 2.12)."""
    module, kind = name.rsplit(".", 1)
    layer = ""
    if found := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
        layer, module = found.groups()
    rows = _MODULES[module]
    return rows._replace(name=f"{PREFIX}{rows.name.format(layer)}.{kind}")


def vae_rows(name: str) -> Rows:
    """Where SAT keeps a tensor of diffusers' VAE: the decoder counts its levels from the other end (spec 3.9)."""
    name = re.sub(r"\.down_blocks\.(\d+)\.", r".down.\1.", name)
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda level: f".up.{_VAE_DEPTH - 1 - int(level[1])}.", name)
    name = re.sub(r"\.mid_block\.resnets\.(\d+)\.", lambda block: f".mid.block_{int(block[1]) + 1}.", name)
    name = name.replace(".resnets.", ".block.").replace(".conv_shortcut.", ".nin_shortcut.")
    return Rows(name.replace(".downsamplers.0.", ".downsample.").replace(".upsamplers.0.", ".upsample."))


def read(content: Any, where: str, *, variant: str | None = None, alpha: float = 1.0) -> Found:
    """What a checkpoint holds, checked by names and shapes; no values are read.

    Args:
      content: what the file holds: a mapping of tensors, or one with such a mapping at `module`, `model` or `state_dict`.
      where: what to call the file in messages.
      variant: a key of VARIANTS. A transformer of a public size tells its own; a VAE does not (2B's and 5B's are the same
        weights with different scaling factors), nor does a transformer of another size.
      alpha: of a LoRA: SAT adds alpha / rank of the product.

    Raises InputError for what is none of these networks, listing the keys that are missing, unknown or misshapen.
    """
    if variant is not None and variant not in VARIANTS:
        raise InputError(f"--variant={variant} is none of {', '.join(VARIANTS)}")
    state = _state(content, where)
    if any(".matrix_" in name for name in state):
        return _lora(state, where, alpha)
    if any(name.startswith(PREFIX) for name in state):
        return _transformer(state, where, variant)
    if any(name.startswith(("encoder.", "decoder.")) for name in state):
        return _vae(state, where, variant)
    raise InputError(
        f"{where} holds no key of a transformer ({PREFIX}...), a VAE (encoder..., decoder...) or a LoRA (...matrix_A.0), but "
        f"{listing(state) or 'nothing'}: give a SAT checkpoint"
    )


def _state(content: Any, where: str) -> dict[str, Any]:
    """The mapping of names to tensors below a checkpoint's levels."""
    while isinstance(content, Mapping):
        below = [content[level] for level in _LEVELS if isinstance(content.get(level), Mapping)]
        if not below:
            break
        content = below[0]
    if not isinstance(content, Mapping):
        raise InputError(f"{where} holds a {type(content).__name__}, expected a mapping of names to tensors")
    wrong = [str(name) for name, value in content.items() if not (isinstance(name, str) and hasattr(value, "shape"))]
    if wrong:
        raise InputError(f"{where}: no tensors, where tensors are expected: {listing(wrong)}")
    return dict(content)


def _shape(state: Mapping[str, Any], name: str, where: str, *num_dims: int) -> tuple[int, ...]:
    """The shape of a tensor that the network's sizes are read from."""
    if name not in state:
        raise InputError(f"{where} lacks {listing([name], state)}, of which the network's size would follow")
    shape = tuple(state[name].shape)
    if len(shape) not in num_dims or 0 in shape:
        raise InputError(
            f"{where}: {name} is {shape}, expected {' or '.join(map(str, num_dims))} dimensions above zero"
        )
    return shape


def _count(state: Iterable[str], pattern: str) -> int:
    """How many different numbers stand at the pattern's group."""
    return len({found[1] for name in state if (found := re.match(pattern, name))})


def _transformer(state: dict[str, Any], where: str, variant: str | None) -> Found:
    def size(name: str, *num_dims: int) -> tuple[int, ...]:
        return _shape(state, PREFIX + name, where, *num_dims)

    num_layers = _count(state, re.escape(PREFIX) + r"transformer\.layers\.(\d+)\.")
    patch = size("mixins.patch_embed.proj.weight", 2, 4)
    patch_size_t = (
        2 if len(patch) == 2 else 1
    )  # a linear layer over (frames, rows, columns), or a convolution per frame
    in_channels = patch[1] // (_PATCH_SIZE**2 * patch_size_t) if patch_size_t > 1 else patch[1]
    out_channels = size("mixins.final_layer.linear.weight", 2)[0] // (_PATCH_SIZE**2 * patch_size_t)
    (head_dim,) = size("mixins.adaln_layer.query_layernorm_list.0.weight", 1)
    chosen = _variant((num_layers, patch[0], in_channels, patch_size_t), out_channels, patch, where, variant)
    height, width, frames = chosen.sample
    learned = chosen.position == "rope+learned"
    time_dim = size("time_embed.0.weight", 2)[0]
    fields = {
        "num_layers": num_layers,
        "num_heads": patch[0] // head_dim,
        "position": chosen.position,
        "head_dim": head_dim,
        "patch_size": _PATCH_SIZE,
        "patch_size_t": patch_size_t,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "text_dim": size("mixins.patch_embed.text_proj.weight", 2)[1],
        "max_text_tokens": chosen.max_text_tokens,
        "time_dim": time_dim,
        "ofs_dim": time_dim if chosen.has_ofs else 0,
        "learned_grid": (latent_frames(frames), height // 2, width // 2) if learned else (0, 0, 0),
        "epsilon": _EPSILON,
    }
    piece = {"model": fields, "sample_height": height, "sample_width": width, "sample_frames": frames}
    kept = {name: tensor for name, tensor in state.items() if not _DROPPED & set(name.split("."))}
    if chosen.position == "sincos":
        kept.pop(f"{PREFIX}mixins.pos_embed.pos_embedding", None)  # the fixed table, which is computed
    told = ("norm_eps", "max_text_seq_length", "sample_height", "sample_width", "sample_frames")
    return _network("transformer", piece, kept, transformer_rows, where, told, len(state))


def _variant(
    sizes: tuple[int, int, int, int], out_channels: int, patch: tuple[int, ...], where: str, given: str | None
) -> Variant:
    """The variant of these (layers, width, channels in, frames a patch), or the given one, if the file can be it."""
    own = next((name for name, known in VARIANTS.items() if known[:4] == sizes), None)
    shown = f"{sizes[0]} layers, {PREFIX}mixins.patch_embed.proj.weight {patch}"
    if given is None and own is None:
        public = "; ".join(f"{name}: {v.num_layers}, {v.width}, {v.in_channels}" for name, v in VARIANTS.items())
        raise InputError(
            f"{where} is none of the public transformers: {shown}, expected layers, width, channels in one of {public}. If it "
            "is of the kind of one of them, say which by --variant"
        )
    if given and own and given != own:
        raise InputError(f"{where} is {own}, not {given}: {shown}. Leave --variant out")
    chosen = VARIANTS[given or own or ""]
    more, wanted = sizes[2] != out_channels, chosen.position == "rope+learned" or chosen.has_ofs
    if (sizes[3], more) != (chosen.patch_size_t, wanted):
        raise InputError(
            f"{where} cannot be {given or own}: {shown}, {out_channels} channels out, expected patches of "
            f"{chosen.patch_size_t} frame(s) and {'more' if wanted else 'as many'} channels in {'than' if wanted else 'as'} out"
        )
    return chosen


def _vae(state: dict[str, Any], where: str, variant: str | None) -> Found:
    if variant is None:
        scales = ", ".join(f"{name} ({known.scaling_factor})" for name, known in VARIANTS.items())
        raise InputError(
            f"{where} is a VAE, whose scaling factor no file tells: say whose by --variant, one of {scales}"
        )

    def size(name: str, num_dims: int) -> tuple[int, ...]:
        return _shape(state, name, where, num_dims)

    chosen = VARIANTS[variant]
    fields = {
        "channels": tuple(size(f"encoder.down.{i}.block.0.conv2.conv.weight", 5)[0] for i in range(_VAE_DEPTH)),
        "layers_per_block": _count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": size("decoder.conv_in.conv.weight", 5)[1],
        "groups": _VAE_GROUPS,
    }
    piece = {
        "model": fields,
        "scaling_factor": chosen.scaling_factor,
        "invert_scale_latents": chosen.invert_scale_latents,
        **_VAE_SAMPLE,
    }
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("loss.")}
    told = ("scaling_factor", "invert_scale_latents", "norm_num_groups", "sample_height", "sample_width")
    return _network("vae", piece, kept, vae_rows, where, told, len(state))


def _network(
    kind: str,
    piece: dict[str, Any],
    state: dict[str, Any],
    rows_of: Any,
    where: str,
    told: tuple[str, ...],
    num_tensors: int,
) -> Found:
    """Check SAT's tensors against those of our network, and rename them."""
    network = NETWORKS[kind]
    config = network.write(piece)
    fields = network.read(config, where)["model"]  # refuses sizes that no network of ours has
    layout = table.layout(network.entries(fields), network.shapes(fields))
    found, expected = {}, {}
    for name, spec in layout.items():
        rows = found[name] = rows_of(name)
        count, *rest = spec.shape
        expected[rows.name] = Spec((count // len(rows.take) * rows.parts, *rest), spec.dtype)
    table.compare(expected, state, source=where)
    tensors = {name: Cut(state[rows.name], rows) for name, rows in found.items()}
    chosen = {name: config[name] for name in told}
    return Found(kind, config, chosen, tensors, num_tensors - len(expected), {})


# diffusers' module -> SAT's and the number of its pair
_PAIRS = {
    "to_q": ("query_key_value", 0),
    "to_k": ("query_key_value", 1),
    "to_v": ("query_key_value", 2),
    "to_out.0": ("dense", 0),
}


def lora_rows(name: str) -> Rows:
    """Where SAT keeps a tensor of diffusers' LoRA (spec 2.12)."""
    found = re.fullmatch(r"transformer\.transformer_blocks\.(\d+)\.attn1\.(.+)\.lora_([AB])\.weight", name)
    if found is None:
        raise ValueError(name)
    layer, target, matrix = found.groups()
    module, i = _PAIRS[target]
    return Rows(f"{PREFIX}transformer.layers.{layer}.attention.{module}.matrix_{matrix}.{i}")


def _lora(state: dict[str, Any], where: str, alpha: float) -> Found:
    """A LoRA's pairs; the model that SAT saves around them is left out."""
    if not 0 < alpha <= lora.MAX_ALPHA:
        raise InputError(f"--alpha={alpha}, expected a number above zero, at most {lora.MAX_ALPHA}")
    kept = {name: tensor for name, tensor in state.items() if ".matrix_" in name}
    rank, width = _shape(kept, f"{PREFIX}transformer.layers.0.attention.query_key_value.matrix_A.0", where, 2)
    num_layers = _count(kept, re.escape(PREFIX) + r"transformer\.layers\.(\d+)\.")
    found = {entry.theirs: lora_rows(entry.theirs) for entry in lora.diffusers_names(num_layers)}
    shapes = {"A": (rank, width), "B": (width, rank)}
    expected = {rows.name: Spec(shapes[name[-len("A.weight")]], np.dtype(np.float32)) for name, rows in found.items()}
    table.compare(expected, kept, source=where)
    # without it alpha would be taken for the rank, and the LoRA act `rank` times too strongly
    adapter = {"r": rank, "lora_alpha": alpha, "target_modules": list(_PAIRS)}
    text = json.dumps({f"{lora.PREFIX}{name}": value for name, value in adapter.items()})
    tensors = {name: Cut(kept[rows.name], rows) for name, rows in found.items()}
    metadata = {"format": "pt", lora.METADATA_KEY: text}
    return Found("lora", {}, {"alpha": alpha}, tensors, len(state) - len(kept), metadata)
