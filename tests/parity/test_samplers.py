"""Schedules and samplers against diffusers' schedulers, driven by the same model outputs and the same noise."""

import ast
import inspect
import math
import textwrap

import jax
import numpy as np
import pytest

from cogvideox_jax.core import samplers, schedule
from tests.models import folders as samples
from tests.parity.reference import error

pytestmark = pytest.mark.parity

step = jax.jit(samplers.sampler_step)
NAMES = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}
# 30 and 7 do not divide 1000: their steps aim at timesteps that are not visited next, and 7 ends at timestep 0, not at the data
LENGTHS = (50, 30, 7, 4, 2, 1)
STEP_BOUND = 1e-5  # of the sample's rms, at every step: the coefficients are float64 on both sides, the samples float32


def scheduler(libraries, name: str, shift: float):
    config = samples.scheduler(_class_name=NAMES[name], snr_shift_scale=shift, timestep_spacing="trailing")
    return getattr(libraries.diffusers, NAMES[name]).from_config(config)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_alphas(libraries, name, shift):
    expected = scheduler(libraries, name, shift).alphas_cumprod.numpy()
    assert expected.dtype == np.float64
    got = schedule.alphas_cumprod(snr_shift_scale=shift)
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    assert got[-1] == expected[-1] == 0


@pytest.mark.parametrize("name", NAMES)
def test_timesteps(libraries, name):
    theirs = scheduler(libraries, name, 1.0)
    for num_steps in range(1, 1001):
        theirs.set_timesteps(num_steps)
        np.testing.assert_array_equal(samplers.trailing_timesteps(num_steps), theirs.timesteps.numpy())


def test_noisy_sample_and_velocity(libraries):
    torch, rng = libraries.torch, np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 1000, 7)).astype(np.float32)
    theirs = scheduler(libraries, "ddim", 3.0)
    alpha = schedule.alphas_cumprod(snr_shift_scale=3.0).astype(np.float32)
    for ours, name in ((schedule.add_noise, "add_noise"), (schedule.velocity, "get_velocity")):
        expected = getattr(theirs, name)(torch.from_numpy(clean), torch.from_numpy(noise), torch.arange(1000)).numpy()
        found = error(ours(clean, noise, alpha), expected)
        print(f"{name}: {found:.1e} of the rms")
        assert found <= 1e-6


def trajectory(libraries, monkeypatch, name, shift, num_steps, velocities, noise) -> list[tuple]:
    """(sample, estimate of the clean one, number of draws not made) after each of their steps; noise: (steps, 2, *shape).

    The DPM scheduler draws at every step, and on second-order steps once more, discarding the first.
    """
    torch, theirs = libraries.torch, scheduler(libraries, name, shift)
    theirs.set_timesteps(num_steps)
    draws = iter(())
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor", lambda *_, **__: torch.from_numpy(next(draws))
    )
    sample, clean, found = torch.from_numpy(velocities[0]), None, []
    for i, t in enumerate(theirs.timesteps):
        velocity, draws = torch.from_numpy(velocities[i + 1]), iter(noise[i])
        if name == "ddim":
            sample, clean = theirs.step(velocity, t, sample, return_dict=False)
        else:
            back = theirs.timesteps[i - 1] if i > 0 else None
            sample, clean = theirs.step(velocity, clean, t, back, sample)
        found.append((sample.numpy(), clean.numpy(), len(list(draws))))
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("num_steps", LENGTHS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_steps(libraries, monkeypatch, name, shift, num_steps, seed):
    rng = np.random.default_rng(seed)
    velocities = rng.normal(size=(num_steps + 1, 2, 3, 4, 5)).astype(np.float32)  # before them, the first sample
    noise = rng.normal(size=(num_steps, 2, 2, 3, 4, 5)).astype(np.float32)
    expected = trajectory(libraries, monkeypatch, name, shift, num_steps, velocities, noise)
    table = samplers.SAMPLERS[name](schedule.alphas_cumprod(snr_shift_scale=shift), num_steps)
    state = samplers.SamplerState(velocities[0], np.zeros_like(velocities[0]))
    worst = 0.0
    for i, (sample, clean, undrawn) in enumerate(expected):
        row = samplers.Coefficients(*(column[i] for column in table))
        # the draw that their step did not discard
        state = step(state, velocities[i + 1], row, noise[i, 1 - undrawn] if name == "dpm" else None)
        found = max(error(state.sample, sample), error(state.clean, clean))
        assert found <= STEP_BOUND, f"step {i}: {found:.2e} of the rms"
        worst = max(worst, found)
    print(f"{name} shift {shift:.0f}, {num_steps} steps, seed {seed}: {worst:.1e} of the rms")


@pytest.mark.parametrize("pipeline", ["CogVideoXPipeline", "CogVideoXImageToVideoPipeline"])
@pytest.mark.parametrize("num_steps", LENGTHS)
def test_dynamic_guidance(libraries, pipeline, num_steps):
    """The formula is cut out of the pipeline's source and run."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(libraries.diffusers, pipeline).__call__)))
    (branch,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "use_dynamic_cfg"
    )
    formula = compile(ast.unparse(branch.body[0].value), pipeline, "eval")
    timesteps = samplers.trailing_timesteps(num_steps)
    for scale in (6.0, 1.5):
        expected = [
            eval(formula, {"math": math, "guidance_scale": scale, "num_inference_steps": num_steps, "t": t})
            for t in timesteps
        ]
        got = samplers.guidance_scales(scale, timesteps, dynamic="reference")
        np.testing.assert_allclose(got, expected, rtol=1e-6)
