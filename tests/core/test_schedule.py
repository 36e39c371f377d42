import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox_jax.core import schedule

STEPS = [0, 1, 19, 99, 249, 499, 749, 899, 979, 998, 999]
ALPHAS = {  # spec 4.1
    3.0: ".9974543276 .9948006264 .9465729792 .7308668668 .3908897413 .09596956169 .01096589093 9.68787982e-4 "
    "2.71943604e-5 6.230788467e-8 0",
    1.0: ".99915 .9982334461 .9810104569 .8880858948 .6541890065 .2423591666 .03317148283 3.033072371e-3 "
    "8.57878434e-5 1.967888057e-7 0",
}


@pytest.mark.parametrize("shift", ALPHAS)
def test_alphas_of_the_reference(shift):
    golden = [float(v) for v in ALPHAS[shift].split()]
    np.testing.assert_allclose(schedule.alphas_cumprod(snr_shift_scale=shift)[STEPS], golden, rtol=2e-9)


def test_velocity_and_clean_sample_are_inverse():
    rng = np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 4))
    alpha = jnp.array([0.3, 0.0])
    noisy = schedule.add_noise(jnp.asarray(clean), jnp.asarray(noise), alpha)
    velocity = schedule.velocity(jnp.asarray(clean), jnp.asarray(noise), alpha)
    np.testing.assert_allclose(schedule.clean_from_velocity(noisy, velocity, alpha), clean, atol=1e-6)
    # at zero SNR the input is noise alone and the target is minus the clean sample
    np.testing.assert_allclose(noisy[1], noise[1], atol=1e-6)
    np.testing.assert_allclose(velocity[1], -clean[1], atol=1e-6)
