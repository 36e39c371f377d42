"""Names of the VAE in diffusers' files (spec 3.9)."""

from cogvideox_jax.models.convert.table import Entry
from cogvideox_jax.models.vae import VAE


def _conv(ours: str, theirs: str, rule: str) -> list[Entry]:
    return [Entry(f"{ours}/kernel", f"{theirs}.weight", rule), Entry(f"{ours}/bias", f"{theirs}.bias")]


def _norm(ours: str, theirs: str, *, spatial: bool) -> list[Entry]:
    if not spatial:
        return [Entry(f"{ours}/scale", f"{theirs}.weight"), Entry(f"{ours}/bias", f"{theirs}.bias")]
    entries = _norm(f"{ours}/norm", f"{theirs}.norm_layer", spatial=False)
    for name in ("conv_y", "conv_b"):
        entries += _conv(f"{ours}/{name}/linear", f"{theirs}.{name}.conv", "pointwise")
    return entries


def _resnet(ours: str, theirs: str, *, spatial: bool, shortcut: bool) -> list[Entry]:
    entries = []
    for i in (1, 2):
        entries += _norm(f"{ours}/norm{i}", f"{theirs}.norm{i}", spatial=spatial)
        entries += _conv(f"{ours}/conv{i}", f"{theirs}.conv{i}.conv", "conv3d")
    if shortcut:
        entries += _conv(f"{ours}/shortcut/linear", f"{theirs}.conv_shortcut", "pointwise")
    return entries


def _half(vae: VAE, *, decoder: bool) -> list[Entry]:
    half, level, sampler = ("decoder", "up", "upsample") if decoder else ("encoder", "down", "downsample")
    widths = vae.channels[::-1] if decoder else vae.channels
    entries = _conv(f"{half}/conv_in", f"{half}.conv_in.conv", "conv3d")
    width = widths[0]
    for i, features in enumerate(widths):
        for j in range(vae.layers_per_block + decoder):
            ours, theirs = f"{half}/{level}_{i}_resnet_{j}", f"{half}.{level}_blocks.{i}.resnets.{j}"
            entries += _resnet(ours, theirs, spatial=decoder, shortcut=width != features)
            width = features
        if i < len(widths) - 1:
            theirs = f"{half}.{level}_blocks.{i}.{sampler}rs.0.conv"
            entries += _conv(f"{half}/{level}_{i}_{sampler}", theirs, "conv2d")
    for j in range(2):
        ours, theirs = f"{half}/mid_resnet_{j}", f"{half}.mid_block.resnets.{j}"
        entries += _resnet(ours, theirs, spatial=decoder, shortcut=False)
    entries += _norm(f"{half}/norm_out", f"{half}.norm_out", spatial=decoder)
    return entries + _conv(f"{half}/conv_out", f"{half}.conv_out.conv", "conv3d")


def diffusers_names(vae: VAE) -> list[Entry]:
    """Every tensor of `AutoencoderKLCogVideoX`: 436 for the public one."""
    return _half(vae, decoder=False) + _half(vae, decoder=True)
