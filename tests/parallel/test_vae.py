"""The VAE's frames over `sequence`: the same numbers and gradients on every mesh as on one device."""

import os
import subprocess
import sys

import pytest

from cogvideox_jax.core import video
from cogvideox_jax.core.errors import InputError

# One process per mesh would compile everything twice; one process with eight devices holds all meshes.
SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from cogvideox_jax.parallel import mesh as meshes
meshes.start(8)
import optax
from jax.sharding import AxisType
from cogvideox_jax.models import vae
from cogvideox_jax.parallel import halo
from cogvideox_jax.parallel.sharding import place
from cogvideox_jax.steps import vae as steps
from cogvideox_jax.train import state

# no block on the encoder's levels, one on the decoder's: each kind of layer at each resolution, and half the compile time
model = vae.VAE(channels=(4, 4, 8, 8), layers_per_block=0, latent_channels=4, groups=2)
remat = model.clone(remat=True)
params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 5, 16, 16, 3)))["params"]
rng = np.random.default_rng(0)
# every weight counts: fresh biases and norms are zeros and ones
params = jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32), params)
pixels = rng.uniform(-1, 1, size=(8, 33, 16, 24, 3)).astype(np.float32)
pixels[:, 0] += 1.5  # a first frame unlike the others: its own rules and its weight in the norms show
latents = rng.normal(size=(8, 9, 2, 3, 4)).astype(np.float32)
key = jax.random.key(1)


def make(shape):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, meshes.AXES, axis_types=(AxisType.Auto,) * 3)


def train(frames, shape):
    # logs and gradients of a step
    # plain descent at rate 1: what a step takes off the parameters is the gradient
    optimizer = optax.sgd(1.0)
    init = lambda: state.create(params, optimizer)
    with meshes.use(make(shape)):
        batch = meshes.global_batch({"video": pixels[:, :frames]}, make(shape))
        before = jax.jit(init, out_shardings=place(jax.eval_shape(init), make(shape)))()
        net = remat if shape == (2, 2, 2) else model
        after, logs = steps.train_step(before, batch, key, vae=net, optimizer=optimizer, kl_weight=0.01, ema_decay=0.9)
        gradients = jax.tree.map(lambda x, y: x - y, params, jax.device_get(after.params))
        return {name: float(x) for name, x in logs.items()}, gradients


def same(one, two, bound, what):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True):
        scale = np.sqrt(np.mean(a**2)) + 1e-5
        error = np.abs(a - b).max() / scale if a.shape == b.shape else np.inf
        assert error <= bound, (what, jax.tree_util.keystr(path), error)
"""

TRAIN = """
logs, gradients = train(33, (1, 1, 1))
for shape in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)):
    logs2, gradients2 = train(33, shape)
    np.testing.assert_allclose([logs2[n] for n in logs], [logs[n] for n in logs], rtol=2e-5, err_msg=str(shape))
    same(gradients, gradients2, 5e-4, shape)
    print("equal", shape, flush=True)
"""

INFER = """
def infer(frames, chunk, batch, shape, gradient):
    # an encoding and a decoding, and with `gradient` those of a sum over each
    count = (frames - 1) // 4 + 1
    weights = np.random.default_rng(3).normal(size=(batch, count, 2, 3, 4)).astype(np.float32)

    def encode(x):
        mean, logvar = vae.encode(model, params, x, chunk=chunk)
        return jnp.sum(mean * weights) + jnp.sum(logvar * weights[..., ::-1]), (mean, logvar)

    def decode(z):
        y = vae.decode(model, params, z, chunk=chunk and chunk // 4)
        return jnp.sum(y**2), y

    with meshes.use(make(shape)):
        given = (encode, pixels[:batch, :frames]), (decode, latents[:batch, :count])
        call = (lambda f: jax.jit(jax.value_and_grad(f, has_aux=True))) if gradient else (lambda f: f)
        return jax.device_get([call(f)(x) for f, x in given])


for frames, chunk, batch, shapes, gradient in (
    (17, None, 8, ((2, 2, 2), (1, 2, 4)), True),
    (1, None, 8, ((1, 1, 8),), False),  # images: nothing to split
    (17, 8, 8, ((2, 2, 2), (1, 2, 4)), False),  # in chunks: split over two, whole over four
    (17, None, 1, ((2, 2, 2),), False),  # fewer clips than data x fsdp
):
    one = infer(frames, chunk, batch, (1, 1, 1), gradient)
    for shape in shapes:
        same(one, infer(frames, chunk, batch, shape, gradient), 2e-4, (frames, chunk, batch, shape))
        print("equal", frames, chunk, batch, shape, flush=True)

# and it was split: one exchange for each of six convolutions, two more where stretches are of one frame (the last five)
with meshes.use(make((1, 1, 8))):
    text = vae._encode_chunk.lower(model, params, pixels, None, apart=True).as_text()
    assert text.count("collective_permute") == 6 + 5, text.count("collective_permute")
"""


# the encoder's 30 causal convolutions on four chips, its channels and pixels made small
COLLECTIVES = """
import collections, os, re
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType
from cogvideox_jax.models import vae
from cogvideox_jax.parallel import halo
from cogvideox_jax.parallel import mesh as meshes

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
mesh = jax.sharding.Mesh(np.array(devices).reshape(1, 1, 4), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
model = vae.VAE(channels=(8, 8, 8, 8), layers_per_block=3, latent_channels=4, groups=2, dtype=jnp.bfloat16)
with meshes.use(mesh):
    # inside of eval_shape: an array on these devices cannot be made
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 5, 16, 16, 3))))["params"]
    pixels = jax.ShapeDtypeStruct((1, 33, 32, 48, 3), jnp.float32)
    encode = lambda params, pixels: model.apply({"params": params}, halo.split(pixels, 4), method="encode")[:2]
    text = jax.jit(encode).lower(params, pixels).compile().as_text()
kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\\(", text)
print(collections.Counter(kind for _, kind in found))
assert sum(kind == "collective-permute" for _, kind in found) == 30
# besides, the sums of the norms: arrays of at most (rows, channels)
others = [(shape, kind) for shape, kind in found if kind != "collective-permute"]
assert all(kind == "all-reduce" and max(map(len, re.findall(r"\\[([0-9,]*)\\]", shape))) <= 3 for shape, kind in others), others
print("halos only", flush=True)
os._exit(0)  # the TPU library takes its time to say that there is no TPU
"""


def run(script: str, **environment: str) -> str:
    environment = os.environ | environment
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.tpu
def test_the_encoder_exchanges_halos_only():
    assert "halos only" in run(COLLECTIVES, ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1")


def test_training_step_on_every_mesh():
    assert run(SCRIPT + TRAIN).count("equal") == 5


def test_encode_and_decode_on_every_mesh():
    assert run(SCRIPT + INFER).count("equal") == 6


@pytest.mark.parametrize(
    ("frames", "sequence", "advice"),
    [
        (49, 8, "use num_frames=33 or 65, or sequence=6 or 12"),
        (49, 5, "use num_frames=41 or 81, or sequence=4 or 6"),
        (17, 8, "use num_frames=33, or sequence=4"),
        (9, 4, "use num_frames=17, or sequence=2"),
    ],
)
def test_frames_that_do_not_divide_are_refused(frames, sequence, advice):
    with pytest.raises(InputError, match=f"num_frames={frames} does not divide over sequence={sequence}: .*{advice}$"):
        video.check_sequence(frames, sequence)


@pytest.mark.parametrize(("frames", "sequence"), [(1, 8), (9, 2), (17, 4), (33, 8), (49, 6), (49, 1)])
def test_frames_that_divide_are_not_refused(frames, sequence):
    video.check_sequence(frames, sequence)
