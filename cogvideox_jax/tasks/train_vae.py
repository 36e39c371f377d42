"""Train the 3D causal VAE on clip records (reconstruction + KL)."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cogvideox_jax.core import video
from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.parallel import mesh as meshes
from cogvideox_jax.parallel.sharding import place
from cogvideox_jax.steps import vae as steps
from cogvideox_jax.train import checkpoint, metrics, optimizer, state
from data import pipeline


def check(config: ConfigDict, workdir: Path) -> None:
    """Refuse sizes, records and meshes that cannot work."""
    if config.compute_dtype not in ("float32", "bfloat16"):
        raise InputError(f"config.compute_dtype={config.compute_dtype!r}: choose one of float32, bfloat16")
    video.latent_shape(config.num_frames, config.height, config.width, patch_size=1)
    pipeline.check_clips(Path(config.records), config.num_frames)
    meshes.start(config.mesh.simulated_devices)
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence)
    meshes.check_divisible(mesh, batch_size=config.batch_size)
    video.check_sequence(config.num_frames, config.mesh.sequence)


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Train from the newest checkpoint, or from scratch, to config.num_steps."""
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence)
    vae = VAE(**config.model, dtype=jnp.dtype(config.compute_dtype), remat=config.remat)
    opt = optimizer.adamw(**config.optimizer, num_steps=config.num_steps)
    key_init, key = jax.random.split(jax.random.key(config.seed))

    def init() -> state.TrainState:
        # parameters do not depend on the size: the smallest legal clip
        params = vae.init(key_init, jnp.zeros((1, 5, 16, 16, 3)))["params"]
        return state.create(params, opt)

    with meshes.use(mesh):
        abstract = checkpoint.abstract(jax.eval_shape(init), mesh)
        checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints)
        data = {"records": pipeline.fingerprint(Path(config.records)), "seed": config.seed}
        train = checkpoints.restore(abstract, data) or jax.jit(init, out_shardings=place(abstract, mesh))()
        first = int(train.step)
        batches = pipeline.vae_batches(
            Path(config.records),
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=first,
        )
        writer = metrics.MetricsWriter(workdir / "metrics.jsonl", resume_step=first)
        progress = metrics.Progress(config.num_steps, "train_vae step")
        since = time.monotonic()
        for step in range(first + 1, config.num_steps + 1):
            batch = meshes.global_batch(next(batches), mesh)
            train, logs = steps.train_step(
                train, batch, key, vae=vae, optimizer=opt, kl_weight=config.kl_weight, ema_decay=config.ema_decay
            )
            if step % config.log_steps == 0 or step == config.num_steps:
                scalars = {name: float(value) for name, value in logs.items()}
                now = time.monotonic()
                writer.write(step, scalars | {"step_seconds": (now - since) / config.log_steps})
                since = now
                progress.update(step, f"loss {scalars['loss']:.4f}, {scalars['psnr_db']:.2f} dB")
            if step % config.checkpoint_steps == 0 or step == config.num_steps:
                checkpoints.save(train, data)
        checkpoints.close()
        writer.close()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    return {"num_steps": config.num_steps, "parameters": parameters}
