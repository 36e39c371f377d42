"""The CPU against diffusers, both in this process, float32: transformer forward and training step, VAE encode and decode.

    . launch/common.sh && .venv/bin/python benchmarks/against_diffusers.py [--json FILE] [--cases vae_encode,vae_decode]

Needs torch 2.13 and the extra `parity`. Same weights, same inputs, both with all cores; each case runs a warm-up and then the
two in turns, and the median of each counts. Prints a table and writes one JSON line a case: case, ours_s, peer_s, ratio =
peer_s / ours_s (above 1 we are faster).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))

import diffusers
import torch

from cogvideox_jax.core.rope import grid_positions
from cogvideox_jax.models import vae
from cogvideox_jax.models.convert import configs, folder, table
from cogvideox_jax.models.transformer import Transformer

# hidden 512, 8 layers, 226 + 1 x 24 x 52 = 1,474 tokens
TRANSFORMER = dict(num_attention_heads=8, num_layers=8, use_rotary_positional_embeddings=True)
LATENTS = (1, 1, 16, 48, 104)  # b, t, c, h, w
PIXELS = (1, 3, 9, 128, 128)


def params_of(kind: str, module: Any) -> tuple[Any, Any]:
    """(fields of our network, a torch module's weights as our tree)."""
    settings = dict(module.config) | {"_class_name": type(module).__name__}
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()}
    network = folder.NETWORKS[kind]
    fields = network.read(settings, "module")["model"]
    tensors = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    tree = table.to_params(network.entries(fields), tensors, network.shapes(fields), source="module")
    return fields, jax.tree.map(jnp.asarray, tree)


def transformer_cases() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    torch.manual_seed(0)
    module = diffusers.CogVideoXTransformer3DModel(**TRANSFORMER)
    fields, params = params_of("transformer", module)
    model = Transformer(**fields)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=LATENTS).astype(np.float32)
    context = rng.normal(size=(1, 226, 4096)).astype(np.float32)
    target = rng.normal(size=LATENTS).astype(np.float32)
    grid = grid_positions(1, 24, 52)
    cos_sin = diffusers.models.embeddings.get_3d_rotary_pos_embed(64, ((0, 0), (24, 52)), (24, 52), 1)
    theirs = [torch.from_numpy(x) for x in (latents, context, target)]
    ours = [jnp.asarray(x) for x in (latents.transpose(0, 1, 3, 4, 2), context, target.transpose(0, 1, 3, 4, 2))]
    timestep = torch.tensor([500])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)
    transform = optax.adamw(1e-5)

    def predict(params: Any) -> jax.Array:
        return model.apply({"params": params}, ours[0], ours[1], jnp.array([500.0]), grid)

    forward = jax.jit(predict)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        gradients = jax.grad(lambda p: jnp.mean((predict(p) - ours[2]) ** 2))(params)
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = transform.init(params)

    def peer_forward() -> None:
        with torch.no_grad():
            module(theirs[0], theirs[1], timestep, image_rotary_emb=cos_sin)

    def peer_step() -> None:
        out = module(theirs[0], theirs[1], timestep, image_rotary_emb=cos_sin).sample
        ((out - theirs[2]) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "transformer_forward": (lambda: jax.block_until_ready(forward(params)), peer_forward),
        "transformer_training_step": (lambda: jax.block_until_ready(step(params, state)), peer_step),
    }


def vae_cases() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    torch.manual_seed(0)
    settings = dict(configs.VAE_KEYS)
    defaults = {name: key.default if isinstance(key, configs.Free) else key for name, key in settings.items()}
    module = diffusers.AutoencoderKLCogVideoX.from_config(defaults).eval()
    fields, params = params_of("vae", module)
    model = vae.VAE(**fields)
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, PIXELS).astype(np.float32)
    latents = rng.normal(size=(1, 16, 3, 16, 16)).astype(np.float32)
    ours = [jnp.asarray(x.transpose(0, 2, 3, 4, 1)) for x in (pixels, latents)]
    theirs = [torch.from_numpy(x) for x in (pixels, latents)]

    def peer(method: Callable, x: torch.Tensor) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                method(x)

        return call

    return {
        "vae_encode": (
            lambda: jax.block_until_ready(vae.encode(model, params, ours[0])),
            peer(module.encode, theirs[0]),
        ),
        "vae_decode": (
            lambda: jax.block_until_ready(vae.decode(model, params, ours[1])),
            peer(module.decode, theirs[1]),
        ),
    }


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to append one JSON line a case to")
    parser.add_argument("--cases", default="", help="names, with commas; all by default")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    groups = {
        transformer_cases: ("transformer_forward", "transformer_training_step"),
        vae_cases: ("vae_encode", "vae_decode"),
    }
    known = [name for names in groups.values() for name in names]
    wanted = arguments.cases.split(",") if arguments.cases else known
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"unknown cases {', '.join(unknown)}: choose from {', '.join(known)}")
    print(f"{'case':28} {'ours s':>9} {'diffusers s':>12} {'ratio':>7}")
    for build, names in groups.items():
        if not set(names) & set(wanted):
            continue
        for case, (ours, peer) in build().items():
            if case not in wanted:
                continue
            ours(), peer()
            times = [(seconds(ours), seconds(peer)) for _ in range(arguments.repeats)]
            ours_s, peer_s = (statistics.median(column) for column in zip(*times, strict=True))
            row = {
                "case": case,
                "ours_s": round(ours_s, 4),
                "peer_s": round(peer_s, 4),
                "ratio": round(peer_s / ours_s, 3),
            }
            print(f"{case:28} {ours_s:9.3f} {peer_s:12.3f} {row['ratio']:7.2f}", flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
