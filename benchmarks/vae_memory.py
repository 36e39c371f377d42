"""The full-size VAE on 49 frames of 480x720, in chunks and tiles: does it fit, and how long does it take?

    . launch/common.sh && .venv/bin/python -m benchmarks.vae_memory [--frames=49 --height=480 --width=720] [--json=FILE]

Random weights and random pixels: time and memory do not depend on them. Prints a JSON line, and appends it to a file. About an
hour on two CPU cores; 9.7 GB at most (2026-11).
"""

import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from cogvideox_jax.core import video
from cogvideox_jax.models import vae
from cogvideox_jax.train.metrics import Progress
from configs.models import VAES

FRAMES = flags.DEFINE_integer("frames", 49, "Pixel frames, 8k+1.")
HEIGHT = flags.DEFINE_integer("height", 480, "Pixels.")
WIDTH = flags.DEFINE_integer("width", 720, "Pixels.")
TILED = flags.DEFINE_bool("tiled", True, "In tiles of 240x360 pixels.")
JSON = flags.DEFINE_string("json", None, "File to append the result to.")

TILES = (480, 720)
STRIDE = (200, 288)  # pixels from tile to tile


def steps(num_chunks: int) -> int:
    """Chunks over all tiles."""
    if not TILED.value:
        return num_chunks
    return num_chunks * math.ceil(HEIGHT.value / STRIDE[0]) * math.ceil(WIDTH.value / STRIDE[1])


def counter(total: int, name: str) -> Callable[[jax.Array], None]:
    """Progress by the chunk, each waited for."""
    progress, count = Progress(total, name), 0

    def done(output: jax.Array) -> None:
        nonlocal count
        output.block_until_ready()
        count += 1
        progress.update(count)

    return done


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.INFO)
    model = vae.VAE(**VAES["cogvideox"])
    t, h, w = video.latent_shape(FRAMES.value, HEIGHT.value, WIDTH.value, patch_size=1)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))["params"]
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, FRAMES.value, HEIGHT.value, WIDTH.value, 3)).astype(np.float32)
    tiles = TILES if TILED.value else None
    chunks = len(video.chunk_bounds(FRAMES.value, 8))
    started = time.monotonic()
    mean, _ = vae.encode(model, params, pixels, tile_sample_size=tiles, done=counter(steps(chunks), "encode chunk"))
    encoded = time.monotonic()
    assert mean.shape == (1, t, h, w, 16)
    frames = vae.decode(model, params, mean, tile_sample_size=tiles, done=counter(steps(chunks), "decode chunk"))
    decoded = time.monotonic()
    assert frames.shape == pixels.shape
    row = {
        "case": "vae_memory",
        "size": [FRAMES.value, HEIGHT.value, WIDTH.value],
        "tiled": TILED.value,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "encode_s": round(encoded - started),
        "decode_s": round(decoded - encoded),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "finite": bool(jnp.isfinite(frames).all()),
    }
    print(json.dumps(row))
    if JSON.value:
        with Path(JSON.value).open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    app.run(main)
