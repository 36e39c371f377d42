"""Train the expert transformer on encoded records."""

import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cogvideox_jax.core import rope, timesteps
from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models import transformer
from cogvideox_jax.parallel import mesh as meshes
from cogvideox_jax.parallel.sharding import place
from cogvideox_jax.steps import diffusion as steps
from cogvideox_jax.train import checkpoint, metrics, optimizer, state
from cogvideox_jax.train.workdir import read_json
from data import pipeline, records


def _latent_shape(config: ConfigDict) -> tuple[int, int, int]:
    return tuple(records.read(Path(config.encoded) / "records", "latents")[0]["mean"].shape[:3])


def check(config: ConfigDict, workdir: Path) -> None:
    """Refuse latents that the patches do not divide, a text length that was not encoded, and meshes that do not fit."""
    for name, known in (
        ("compute_dtype", ("float32", "bfloat16")),
        ("remat", tuple(transformer.REMAT)),
        ("position_rule", rope.RULES),
        ("timestep_sampling", tuple(timesteps.SAMPLERS)),
    ):
        if config[name] not in known:
            raise InputError(f"config.{name}={config[name]!r}: choose one of {', '.join(known)}")
    model = transformer.Transformer(**config.model)
    read_json(Path(config.encoded) / "stats.json", made_by="the encode task")
    t, h, w = _latent_shape(config)
    if t % model.patch_size_t or h % model.patch_size or w % model.patch_size:
        raise InputError(
            f"latents of {t}x{h}x{w} in {config.encoded} do not divide into patches of "
            f"{model.patch_size_t}x{model.patch_size}x{model.patch_size}: encode another size or change config.model"
        )
    pipeline.check_text(Path(config.encoded) / "records", model.max_text_tokens, model.text_dim)
    meshes.start(config.mesh.simulated_devices)
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence)
    tokens = transformer.num_tokens(model, (t, h, w))
    if config.accumulate < 1 or config.batch_size % config.accumulate:
        raise InputError(
            f"config.accumulate={config.accumulate} does not divide batch_size={config.batch_size}: choose a divisor"
        )
    meshes.check_divisible(mesh, batch_size=config.batch_size // config.accumulate, tokens=tokens)


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Train from the newest checkpoint, or from scratch, to config.num_steps."""
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence)
    model = transformer.Transformer(**config.model, dtype=jax.numpy.dtype(config.compute_dtype), remat=config.remat)
    opt = optimizer.adamw(**config.optimizer, num_steps=config.num_steps)
    key_init, key = jax.random.split(jax.random.key(config.seed))
    latent_shape = _latent_shape(config)
    grid = steps.positions(model, latent_shape, rule=config.position_rule, base=config.position_base)
    folder = Path(config.encoded) / "records"
    scaling_factor = read_json(Path(config.encoded) / "stats.json", made_by="the encode task")["scaling_factor"]

    def init() -> state.TrainState:
        return state.create(transformer.init(model, key_init, latent_shape), opt)

    with meshes.use(mesh):
        abstract = checkpoint.abstract(jax.eval_shape(init), mesh)
        checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints)
        data = {"records": pipeline.fingerprint(folder), "seed": config.seed}
        train = checkpoints.restore(abstract, data) or jax.jit(init, out_shardings=place(abstract, mesh))()
        first = int(train.step)
        batches = pipeline.diffusion_batches(
            folder,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=first,
            rows=meshes.local_rows(mesh, config.batch_size),
        )
        writer = metrics.MetricsWriter(workdir / "metrics.jsonl", resume_step=first, active=meshes.is_first())
        progress = metrics.Progress(config.num_steps, "train_diffusion step")
        since = time.monotonic()
        for step in range(first + 1, config.num_steps + 1):
            batch = meshes.global_batch(next(batches), mesh, config.batch_size)
            train, logs = steps.train_step(
                train,
                batch,
                key,
                grid,
                model=model,
                optimizer=opt,
                ema_decay=config.ema_decay,
                accumulate=config.accumulate,
                scaling_factor=scaling_factor,
                snr_shift_scale=config.snr_shift_scale,
                timestep_sampling=config.timestep_sampling,
                text_dropout=config.text_dropout,
            )
            if step % config.log_steps == 0 or step == config.num_steps:
                scalars = {name: float(value) for name, value in logs.items()}
                now = time.monotonic()
                writer.write(step, scalars | {"step_seconds": (now - since) / config.log_steps})
                since = now
                progress.update(step, f"loss {scalars['loss']:.4f}")
            if step % config.checkpoint_steps == 0 or step == config.num_steps:
                checkpoints.save(train, data)
        checkpoints.close()
        writer.close()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    return {"num_steps": config.num_steps, "parameters": parameters}
