"""Training steps against a torch loop: diffusers' network and schedule, torch's AdamW and clipping, the same numbers."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox_jax.core import losses, schedule, timesteps
from cogvideox_jax.steps import diffusion
from cogvideox_jax.train import optimizer, state
from tests.models import folders as samples
from tests.parity.reference import BOUND, named, worst
from tests.parity.test_gradients import TABLE
from tests.parity.test_transformer import SIZES, Case, case, theirs

pytestmark = pytest.mark.parity

STEPS, BATCH, NUM_STEPS = 4, 4, 6
UPDATE_BOUND = 1e-3  # of the movement, which is some fifty times smaller than the parameters
# The first step has rate zero: four of them move the parameters three times, on the ramp, at its top and after it. Adam divides
# a gradient by its own size and so gives every element's rounding the weight of a whole step, which eps keeps in check: with
# 1e-8 torch's float32 loop is itself up to 2e-3 away from its float64 one. 1e-4 is a thirtieth of the clipped gradients' rms.
OPTIMIZER = {
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "final_fraction": 0.05,
    "weight_decay": 0.1,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-4,
    "clip_norm": 1.0,
    "moment_dtype": "float32",
}
OURS = optimizer.adamw(**OPTIMIZER, num_steps=NUM_STEPS)
KEY = jax.random.key(5)
# each compiles for ten seconds: every variant, but not every one in both sizes
CASES = [(variant, size) for variant in ("2b", "5b", "1.5_5b_i2v") for size in SIZES]
CASES += [("5b_i2v", "portrait"), ("1.5_5b", "landscape")]


def step_options(variant: str, size: str) -> dict[str, Any]:
    """What the diffusion task passes to the step from its config."""
    return {
        "ema_decay": 0.9,
        "accumulate": 2 if size == "portrait" else 1,  # the update is that of the whole batch
        "scaling_factor": 0.7,
        "snr_shift_scale": 3.0 if variant == "2b" else 1.0,
        "timestep_sampling": "explicit_uniform",
        "text_dropout": 0.5,
    }


class Numbers(NamedTuple):
    """What a step computes with; arrays in our layout (b, t, h, w, c)."""

    clean: Any
    noise: Any
    timesteps: Any
    context: Any


def drawn(batch, step: int, options: dict[str, Any]) -> Numbers:
    """The random numbers of a training step, drawn in its order from its key."""
    keys = jax.random.split(jax.random.fold_in(KEY, step), 4)
    noise = [np.asarray(jax.random.normal(key, batch["mean"].shape)) for key in (keys[0], keys[2])]
    keep = np.asarray(jax.random.uniform(keys[3], (BATCH, 1, 1))) >= options["text_dropout"]
    return Numbers(
        clean=(batch["mean"] + np.exp(0.5 * batch["logvar"]) * noise[0]) * np.float32(options["scaling_factor"]),
        noise=noise[1],
        timesteps=np.asarray(timesteps.SAMPLERS[options["timestep_sampling"]](keys[1], BATCH)),
        context=np.where(keep, batch["context"], np.float32(0)),
    )


def rate(step: int) -> float:
    """Linear warm-up from zero, then half a cosine down to a fraction of the peak."""
    peak, warmup, last = (OPTIMIZER[name] for name in ("learning_rate", "warmup_steps", "final_fraction"))
    if step < warmup:
        return peak * step / warmup
    cosine = (1 + math.cos(math.pi * (step - warmup) / (NUM_STEPS - warmup))) / 2
    return peak * (last + (1 - last) * cosine)


def torch_loop(libraries, given: Case, steps: list[Numbers], image, snr_shift_scale: float):
    """(parameters by name, losses, gradient norms) after AdamW on the velocity error."""
    torch, module = libraries.torch, given.module.train()
    config = samples.scheduler(snr_shift_scale=snr_shift_scale)
    scheduler = libraries.diffusers.CogVideoXDDIMScheduler.from_config(config)
    leaves = dict(module.named_parameters())
    if given.model.position == "rope+learned":
        leaves[TABLE] = module.patch_embed.pos_embedding.requires_grad_()
    # weight decay is for matrices: no biases, norms and tables
    matrices = [p for name, p in leaves.items() if name.endswith("weight") and p.ndim > 1]
    others = [p for name, p in leaves.items() if not (name.endswith("weight") and p.ndim > 1)]
    adamw = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        betas=(OPTIMIZER["b1"], OPTIMIZER["b2"]),
        eps=OPTIMIZER["eps"],
        weight_decay=OPTIMIZER["weight_decay"],
    )
    logs = []
    for step, numbers in enumerate(steps):
        clean, noise = (torch.from_numpy(x.transpose(0, 1, 4, 2, 3)) for x in (numbers.clean, numbers.noise))
        t = torch.from_numpy(numbers.timesteps).long()
        noisy = scheduler.add_noise(clean, noise, t)
        if image is not None:
            noisy = torch.cat([noisy, torch.from_numpy(image.transpose(0, 1, 4, 2, 3))], dim=2)
        prediction = theirs(torch, given, latents=noisy, context=torch.from_numpy(numbers.context), timesteps=t)
        loss = torch.nn.functional.mse_loss(prediction, scheduler.get_velocity(clean, noise, t))
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(leaves.values()), OPTIMIZER["clip_norm"])
        for group in adamw.param_groups:
            group["lr"] = rate(step)
        adamw.step()
        logs.append((float(loss), float(norm)))
    return {name: p.detach().numpy() for name, p in leaves.items()}, np.array(logs)


@functools.partial(jax.jit, static_argnames=("model", "ema_decay", "snr_shift_scale"))
def image_step(train, numbers: Numbers, image, grid, ofs, *, model, ema_decay, snr_shift_scale):
    """The training step of an image-to-video model, made of the pieces that steps.diffusion is made of."""
    alphas = jnp.asarray(schedule.alphas_cumprod(snr_shift_scale=snr_shift_scale), jnp.float32)
    alpha = alphas[numbers.timesteps]

    def objective(params):
        noisy = schedule.add_noise(numbers.clean, numbers.noise, alpha)
        prediction = model.apply(
            {"params": params},
            jnp.concatenate([noisy, image], axis=-1),
            numbers.context,
            numbers.timesteps.astype(jnp.float32),
            grid,
            ofs=ofs,
        )
        return jnp.mean(losses.mse_per_sample(prediction, schedule.velocity(numbers.clean, numbers.noise, alpha)))

    loss, gradients = jax.value_and_grad(objective)(train.params)
    train, norm = state.apply_gradients(train, gradients, OURS, ema_decay=ema_decay)
    return train, {"loss": loss, "grad_norm": norm}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("variant", "size"), CASES)
def test_training(libraries, variant, size, seed):
    given, options = case(libraries, variant, size, seed, batch=BATCH), step_options(variant, size)
    fields, rng = given.piece["model"], np.random.default_rng(seed + 300)
    latents = given.latents.transpose(0, 1, 3, 4, 2)
    shape = (*latents.shape[:-1], given.model.out_channels)
    batch = {
        "mean": rng.normal(size=shape).astype(np.float32),
        "logvar": rng.normal(-2, 1, size=shape).astype(np.float32),
        "context": given.context,
    }
    image = latents[..., given.model.out_channels :] if variant.endswith("i2v") else None
    steps = [drawn(batch, step, options) for step in range(STEPS)]
    kept = np.array([numbers.context.any(axis=(1, 2)) for numbers in steps])
    assert 0 < kept.sum() < kept.size, "texts are both kept and dropped"

    before = named("transformer", fields, given.params)
    train, logs = state.create(given.params, OURS), []
    for numbers in steps:
        if image is None:
            train, log = diffusion.train_step(
                train, batch, KEY, grid=given.positions, model=given.model, optimizer=OURS, **options
            )
        else:
            chosen = {name: options[name] for name in ("ema_decay", "snr_shift_scale")}
            train, log = image_step(train, numbers, image, given.positions, given.ofs, model=given.model, **chosen)
        logs.append((float(log["loss"]), float(log["grad_norm"])))
    got = named("transformer", fields, train.params)
    expected, expected_logs = torch_loop(libraries, given, steps, image, options["snr_shift_scale"])
    np.testing.assert_allclose(np.array(logs), expected_logs, rtol=1e-4)

    found, name = worst(got, expected)
    # a gradient that is zero moves by rounding alone, while every other tensor moves by about the same
    moved, where = worst(*({n: after[n] - before[n] for n in before} for after in (got, expected)), least=0.1)
    print(f"training {variant} {size} seed {seed}: {found:.1e} of the rms ({name}), movement {moved:.1e} ({where})")
    assert found <= BOUND, f"{name}: {found:.2e} of the rms"
    assert moved <= UPDATE_BOUND, f"movement of {where}: {moved:.2e} of the rms"
