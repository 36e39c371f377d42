import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox_jax.core import samplers
from cogvideox_jax.core.schedule import alphas_cumprod


def row(coefficients, timestep):
    index = list(coefficients.timesteps).index(timestep)
    return samplers.Coefficients(*(column[index] for column in coefficients))


def test_trailing_timesteps():
    assert list(samplers.trailing_timesteps(50)[[0, 1, -1]]) == [999, 979, 19]
    assert list(samplers.trailing_timesteps(30)[[0, 1, 2, -2, -1]]) == [999, 966, 932, 66, 32]


@pytest.mark.parametrize(  # spec 5.2: x = .3, v = -.7, 50 steps
    ("shift", "timestep", "sample", "clean"),
    [
        (3.0, 999, 0.3036463, 0.7),
        (3.0, 499, 0.31552977, 0.75850047),
        (3.0, 19, 0.45367595, None),
        (1.0, 999, 0.30647065, 0.7),
        (1.0, 499, 0.32198165, 0.75698793),
        (1.0, 19, 0.3935997, None),
    ],
)
def test_ddim_step(shift, timestep, sample, clean):
    coefficients = samplers.ddim(alphas_cumprod(snr_shift_scale=shift), 50)
    state = samplers.SamplerState(jnp.array([0.3]), jnp.zeros(1))
    state = samplers.sampler_step(state, jnp.array([-0.7]), row(coefficients, timestep), None)
    assert float(state.sample[0]) == pytest.approx(sample, abs=2e-7)
    if clean is not None:
        assert float(state.clean[0]) == pytest.approx(clean, abs=2e-7)


@pytest.mark.parametrize(  # spec 5.3: m1, m2, m3, m4, sigma
    ("shift", "timestep", "golden"),
    [
        (3.0, 999, (0, -0.0052148212, 1, 0, 0.9999864)),
        (3.0, 979, (0.47780604, -0.0084214203, 1, 0, 0.8784011)),
        (3.0, 499, (0.92216923, -0.045229419, 1.4909606, 0.4909606, 0.34887831)),
        (1.0, 999, (0, -0.0092621727, 1, 0, 0.99995711)),
        (1.0, 979, (0.4780604, -0.014940998, 1, 0, 0.87812454)),
        (1.0, 499, (0.91299371, -0.070106978, 1.4909493, 0.4909493, 0.31385665)),
        (1.0, 19, (0, -1, 1, 0, 0)),
    ],
)
def test_dpm_coefficients(shift, timestep, golden):
    r = row(samplers.dpm(alphas_cumprod(snr_shift_scale=shift), 50), timestep)
    np.testing.assert_allclose((r.keep, -r.pull, r.now, -r.before, r.spread), golden, rtol=2e-6, atol=2e-8)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 30, 50, 1000])
def test_a_perfect_prediction_ends_at_the_clean_sample(name, num_steps):
    alphas = alphas_cumprod()
    coefficients = samplers.SAMPLERS[name](alphas, num_steps)
    assert all(np.isfinite(column).all() for column in coefficients)
    rng = np.random.default_rng(0)
    clean = jnp.asarray(rng.normal(size=8), jnp.float32)
    state = samplers.SamplerState(jnp.asarray(rng.normal(size=8), jnp.float32), jnp.zeros(8))
    for i in range(num_steps):
        r = samplers.Coefficients(*(column[i] for column in coefficients))
        velocity = (r.signal * state.sample - clean) / r.sigma
        state = samplers.sampler_step(state, velocity, r, jnp.asarray(rng.normal(size=8), jnp.float32))
    np.testing.assert_allclose(state.sample, clean, atol=2e-3)


def test_guidance():
    timesteps = samplers.trailing_timesteps(50)
    golden = (
        "2.2915 2.5435 6.9744 6.4204 2.7881 4.2719 1.0376 4.1704 1.618 6.9831 1.0048 2.872 6.9768 1.6331 4.3297 2.4366 "
        "6.3773 6.0068 3.4479 3.1981 1.6548 6.61 1.1947 4.2953 6.9854 1.5213 1.7616 1.0579 4.1275 1.4823 2.0026 5.9477 "
        "4.1432 6.5305 6.1398 6.9999 6.1684 1.1199 2.0975 6.685 6.9992 2.3432 6.2128 1.2505 6.9996 6.8644 1.0636 1.0 1.0 "
        "1.1234"
    )
    reference = samplers.guidance_scales(6.0, timesteps, dynamic="reference")
    np.testing.assert_allclose(reference, [float(v) for v in golden.split()], atol=6e-5)
    ramp = samplers.guidance_scales(6.0, timesteps, dynamic="ramp")
    assert ramp[0] == 1
    assert (np.diff(ramp) >= 0).all()
    assert (samplers.guidance_scales(6.0, timesteps) == 6).all()
    with pytest.raises(ValueError, match="dynamic guidance"):
        samplers.guidance_scales(6.0, timesteps, dynamic="cosine")
    np.testing.assert_allclose(samplers.guide(jnp.array(1.0), jnp.array(2.0), 6.0), 7)
