import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cogvideox_jax.core import samplers
from cogvideox_jax.core.schedule import alphas_cumprod
from cogvideox_jax.models import transformer, vae
from cogvideox_jax.steps import diffusion, generate
from cogvideox_jax.steps import vae as vae_steps
from cogvideox_jax.train import optimizer, state

MODEL = transformer.Transformer(
    num_layers=2,
    num_heads=2,
    head_dim=16,
    time_dim=16,
    text_dim=12,
    max_text_tokens=6,
    in_channels=4,
    out_channels=4,
    zero_modulation=False,
)
SHAPE = (2, 4, 4)
GRID = diffusion.positions(MODEL, SHAPE, rule="integer", base=(2, 2))
FIELDS = {
    "scaling_factor": 0.7,
    "snr_shift_scale": 1.0,
    "timestep_sampling": "explicit_uniform",
    "text_dropout": 0.0,
}


@pytest.fixture(scope="module")
def params():
    # far from the small weights of a fresh network, so that every input shows in the output
    fresh = transformer.init(MODEL, jax.random.key(0), SHAPE)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), fresh)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "mean": rng.normal(size=(4, *SHAPE, 4)).astype(np.float32),
        "logvar": np.full((4, *SHAPE, 4), -30.0, np.float32),
        "context": rng.normal(size=(4, 6, 12)).astype(np.float32),
    }


def loss(params, batch, grid=GRID, **changes):
    drawn = diffusion.draw(batch, jax.random.key(3), **FIELDS | changes)
    return float(diffusion.objective(params, MODEL, drawn, grid)[0])


def step(params, batch, *, optimizer, model=MODEL, accumulate=1):
    train = state.create(jax.tree.map(jnp.copy, params), optimizer)
    return diffusion.train_step(
        train,
        batch,
        jax.random.key(0),
        GRID,
        model=model,
        optimizer=optimizer,
        ema_decay=0.99,
        accumulate=accumulate,
        **FIELDS,
    )


def test_the_objective_is_the_velocity_error(params, batch):
    # a network that answers zero is wrong by the velocity itself
    silent = params | {"proj_out": jax.tree.map(jnp.zeros_like, params["proj_out"])}
    _, key_time, key_noise, _ = jax.random.split(jax.random.key(3), 4)
    clean = batch["mean"] * 0.7
    alpha = alphas_cumprod()[np.asarray(diffusion.timesteps.explicit_uniform(key_time, 4))][:, None, None, None, None]
    noise = np.asarray(jax.random.normal(key_noise, clean.shape))
    velocity = np.sqrt(alpha) * noise - np.sqrt(1 - alpha) * clean
    assert loss(silent, batch) == pytest.approx(np.mean(velocity**2), rel=1e-5)


def test_text_matters_and_dropped_text_does_not(params, batch):
    other = batch | {"context": batch["context"][::-1].copy()}
    assert loss(params, batch) != pytest.approx(loss(params, other), rel=1e-4)
    zeros = batch | {"context": np.zeros_like(batch["context"])}
    assert loss(params, batch, text_dropout=1.0) == pytest.approx(loss(params, zeros), rel=1e-6)


def test_positions_matter(params, batch):
    fitted = diffusion.positions(MODEL, SHAPE, rule="linspace", base=(6, 6))
    assert np.abs(fitted - GRID).max() > 1
    assert loss(params, batch) != pytest.approx(loss(params, batch, fitted), rel=1e-4)


def test_latents_are_sampled_from_the_posterior(params, batch):
    wide = batch | {"logvar": np.zeros_like(batch["logvar"])}
    assert loss(params, batch) != pytest.approx(loss(params, wide), rel=1e-3)


def test_a_step_depends_on_its_number_and_lowers_the_loss(params, batch):
    opt = optax.adam(3e-3)
    train = state.create(jax.tree.map(jnp.copy, params), opt)
    losses = []
    for _ in range(40):
        train, logs = diffusion.train_step(
            train, batch, jax.random.key(0), GRID, model=MODEL, optimizer=opt, ema_decay=0.99, accumulate=1, **FIELDS
        )
        losses.append(float(logs["loss"]))
    assert int(train.step) == 40
    assert len({round(value, 5) for value in losses}) == 40
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_gives_the_whole_batch_s_update(params, batch, parts):
    whole, logs = step(params, batch, optimizer=optax.sgd(1.0))
    train, logs_in_parts = step(params, batch, optimizer=optax.sgd(1.0), accumulate=parts)
    for name in ("loss", "grad_norm"):
        assert float(logs_in_parts[name]) == pytest.approx(float(logs[name]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(train.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(logs["grad_norm"]))


@pytest.mark.parametrize("remat", [name for name in transformer.REMAT if name != "nothing"])
def test_what_the_backward_pass_computes_again_changes_no_number(params, batch, remat):
    model = dataclasses.replace(MODEL, remat=remat)
    expected, logs = step(params, batch, optimizer=optax.sgd(1.0))
    train, _ = step(params, batch, optimizer=optax.sgd(1.0), model=model)
    for a, b in zip(jax.tree.leaves(expected.params), jax.tree.leaves(train.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(logs["grad_norm"]))


def test_moments_in_bfloat16_take_half_the_memory_and_the_same_way(params, batch):
    fields = dict(learning_rate=1e-3, warmup_steps=0, num_steps=10, final_fraction=1.0, weight_decay=0.0)
    fields |= dict(b1=0.9, b2=0.95, eps=1e-8, clip_norm=1.0)
    outcome = {}
    for dtype in ("float32", "bfloat16"):
        opt = optimizer.adamw(**fields, moment_dtype=dtype)
        train, _ = step(params, batch, optimizer=opt)
        outcome[dtype] = train
    bytes_of = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(t.opt_state)) for name, t in outcome.items()}
    assert bytes_of["bfloat16"] < 0.51 * bytes_of["float32"]
    moved = [
        np.concatenate(
            [np.ravel(a - b) for a, b in zip(jax.tree.leaves(t.params), jax.tree.leaves(params), strict=True)]
        )
        for t in outcome.values()
    ]
    assert np.corrcoef(*moved)[0, 1] > 0.999


def test_the_moving_average_warms_up():
    opt = optax.sgd(1.0)
    train = state.create({"w": jnp.array(0.0)}, opt)
    for n in range(3):
        before = float(train.ema["w"])
        train, _ = state.apply_gradients(train, {"w": jnp.array(-1.0)}, opt, ema_decay=0.9999)
        decay = (1 + n) / (10 + n)
        assert float(train.ema["w"]) == pytest.approx(decay * before + (1 - decay) * (n + 1), rel=1e-6)


def test_weight_decay_applies_to_kernels_alone(params):
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, value in jax.tree_util.tree_leaves_with_path(optimizer.decay_mask(params))
        if value
    }
    assert "blocks/mlp_up/kernel" in decayed
    assert not any(name.endswith(("bias", "scale")) for name in decayed)


@pytest.fixture(scope="module")
def sample(params):
    coefficients = samplers.dpm(alphas_cumprod(), 3)
    rng = np.random.default_rng(1)
    context = rng.normal(size=(3, 6, 12)).astype(np.float32)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(np.arange(3))

    def run(which, scale=3.0, *, guided=True):
        which = np.array(which)
        scales = np.full(3, scale, np.float32)
        zeros = np.zeros((1, 6, 12), np.float32) if guided else None
        out = generate.denoise(
            params, context[which], zeros, keys[which], coefficients, scales, GRID, model=MODEL, latent_shape=SHAPE
        )
        return np.asarray(out)

    return run


def test_a_video_does_not_depend_on_its_batch(sample):
    together = sample([0, 1, 2])
    np.testing.assert_allclose(sample([2, 0])[1], together[0], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_guidance_moves_away_from_the_unconditional_branch(sample):
    assert np.abs(sample([0], 1.0) - sample([0], 3.0)).max() > 1e-3
    np.testing.assert_allclose(sample([0], 1.0), sample([0], guided=False), atol=1e-5)


def test_vae_step_learns_and_its_reconstruction_is_clipped():
    model = vae.VAE(channels=(4, 4, 4, 8), layers_per_block=1, latent_channels=16, groups=2)
    params = model.init(jax.random.key(0), jnp.zeros((1, 5, 16, 16, 3)))["params"]
    _, mean, logvar = model.apply({"params": params}, jnp.zeros((1, 5, 16, 16, 3)))
    assert mean.shape == (1, 2, 2, 2, 16)
    # a fresh posterior is narrow, or its noise drowns the latents
    assert float(logvar.mean()) < -4
    opt = optax.adam(1e-2)
    train = state.create(params, opt)
    video = np.random.default_rng(0).uniform(-1, 1, size=(2, 1, 4, 4, 3)).repeat(9, 1).repeat(4, 2).repeat(4, 3)
    first = last = None
    for _ in range(30):
        train, logs = vae_steps.train_step(
            train,
            {"video": video.astype(np.float32)},
            jax.random.key(0),
            vae=model,
            optimizer=opt,
            kl_weight=1e-6,
            ema_decay=0.5,
        )
        first, last = first or float(logs["l1"]), float(logs["l1"])
    assert last < 0.8 * first
    reconstruction, psnr = vae_steps.reconstruct(train.ema, 3 * video.astype(np.float32), vae=model)
    assert np.abs(reconstruction).max() <= 1
    assert psnr.shape == (2,)
