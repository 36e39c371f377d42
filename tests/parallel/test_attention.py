"""Attention against the textbook formula in float64, values and gradients: each form on one device, each way on each mesh."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.parallel import attention as ways
from cogvideox_jax.parallel import kernels
from cogvideox_jax.parallel.attention import attention


def textbook(q, k, v, dout, q_segments=None, kv_segments=None):
    """Float64 (out, dq, dk, dv) by JAX's own derivative; rows that see nothing are zero."""

    def formula(q, k, v):
        logits = jnp.einsum("blhd,bmhd->bhlm", q, k) / np.sqrt(q.shape[-1])
        if q_segments is not None:
            same = np.asarray(q_segments)[:, None, :, None] == np.asarray(kv_segments)[:, None, None, :]
            weights = jnp.where(same, jnp.exp(logits - logits.max()), 0)
            weights = weights / jnp.where(same.any(-1, keepdims=True), weights.sum(-1, keepdims=True), 1)
        else:
            weights = jax.nn.softmax(logits)
        return jnp.einsum("bhlm,bmhd->blhd", weights, v)

    with jax.enable_x64(True):
        operands = [np.asarray(x, np.float64) for x in (q, k, v, dout)]
        return [np.asarray(x) for x in with_gradients(formula, operands.pop())(*operands)]


def with_gradients(attend, dout):
    def run(q, k, v, *segments):
        out, gradient = jax.vjp(lambda *qkv: attend(*qkv, *segments), q, k, v)
        return out, *gradient(jnp.asarray(dout, out.dtype))

    return jax.jit(run)


def draw(b, l, heads, d, m=None, seed=0):
    """q, k, v, dout and segments of queries and keys."""
    rng = np.random.default_rng(seed)
    q, dout = rng.normal(size=(2, b, l, heads, d)).astype(np.float32)
    k, v = rng.normal(size=(2, b, m or l, heads, d)).astype(np.float32)
    return (q, k, v), dout, (rng.integers(0, 3, (b, l)), rng.integers(0, 2, (b, m or l)))


def close(actual, expected, atol=2e-6):
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), e, atol=atol, err_msg=name)


def one_form(monkeypatch, form):
    if form == "blockwise":
        monkeypatch.setattr(kernels, "SMALL", 0)
        monkeypatch.setattr(kernels, "BLOCK_LOGITS", 300)


@pytest.mark.parametrize("form", ["reference", "blockwise"])
@pytest.mark.parametrize("segmented", [False, True])
def test_each_form_is_the_textbook_formula(monkeypatch, form, segmented):
    one_form(monkeypatch, form)
    qkv, dout, segments = draw(2, 21, 3, 8, m=37)
    segments = segments if segmented else ()  # keys have no segment 2: its queries see nothing
    actual = with_gradients(lambda *operands: kernels.local_attention(*operands)[0], dout)(*qkv, *segments)
    close(actual, textbook(*qkv, dout, *segments))


@pytest.mark.parametrize("form", ["reference", "blockwise"])
def test_lse_has_a_value_and_a_gradient(monkeypatch, form):
    one_form(monkeypatch, form)
    (q, k, v), _, _ = draw(1, 21, 2, 8, m=37)

    def plain(q, k):
        return jax.nn.logsumexp(jnp.einsum("blhd,bmhd->bhlm", q, k) / np.sqrt(8), axis=-1)

    actual, pull = jax.vjp(lambda q, k: kernels.local_attention(q, k, v)[1], q, k)
    expected, plain_pull = jax.vjp(plain, q, k)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    cotangent = np.random.default_rng(1).normal(size=actual.shape).astype(np.float32)
    for a, e in zip(pull(cotangent), plain_pull(cotangent), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)


def test_parts_of_the_keys_merge_to_the_whole():
    (q, k, v), dout, (q_segments, kv_segments) = draw(2, 9, 2, 8, m=30)
    kv_segments[:, :10] = 7  # the first part holds no key that is seen
    out, lse = kernels.local_attention(q, k[:, :10], v[:, :10], q_segments, kv_segments[:, :10])
    assert not np.any(out)
    assert np.all(lse == kernels.MASKED)
    for part in (slice(10, 19), slice(19, 30)):
        more = kernels.local_attention(q, k[:, part], v[:, part], q_segments, kv_segments[:, part])
        out, lse = kernels.merge(out, lse, *more)
    expected = textbook(q, k, v, dout, q_segments, kv_segments)[0]
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert np.any(np.all(expected == 0, axis=(2, 3))), "no query saw nothing at all"


@pytest.mark.parametrize("form", ["reference", "blockwise"])
def test_bfloat16_rounds_inputs_and_outputs_alone(monkeypatch, form):
    one_form(monkeypatch, form)
    qkv, dout, _ = draw(1, 40, 2, 64)
    qkv, dout = [jnp.asarray(x, jnp.bfloat16) for x in qkv], jnp.asarray(dout, jnp.bfloat16)
    actual = with_gradients(attention, dout)(*qkv)
    assert all(x.dtype == jnp.bfloat16 for x in actual)
    for a, e in zip(actual, textbook(*qkv, dout), strict=True):
        assert np.abs(np.asarray(a, np.float64) - e).max() <= 2**-7 * np.abs(e).max()


def test_a_remat_policy_keeps_out_and_lse_by_name(capsys):
    qkv, _, _ = draw(1, 12, 2, 8)
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")

    def layer(q, k, v):
        return jnp.sin(attention(jnp.cos(q), k, v))

    def matmuls(policy):
        gradient = jax.grad(lambda *qkv: jnp.sum(jax.checkpoint(layer, policy=policy)(*qkv)), argnums=(0, 1, 2))
        return str(jax.make_jaxpr(gradient)(*qkv)).count("dot_general")

    print_saved_residuals(jax.checkpoint(layer, policy=policy), *qkv)
    saved = capsys.readouterr().out
    assert "f32[1,12,16] named 'attention_out'" in saved
    assert "f32[1,2,12] named 'attention_lse'" in saved
    # forward 2, backward 5, and the forward's once more where nothing is kept
    assert matmuls(policy) == 7
    assert matmuls(jax.checkpoint_policies.nothing_saveable) == 9


def test_a_way_that_is_impossible_is_refused():
    assert [ways.choose("auto", 48, 4), ways.choose("auto", 30, 4)] == ["all_to_all", "ring"]
    with pytest.raises(
        InputError, match=r"30 heads among sequence=4 .* attention=ring, or sequence from 1, 2, 3, 5, 6, "
    ):
        ways.choose("all_to_all", 30, 4)
    with pytest.raises(
        InputError, match="'ulysses' is not a way to attend: choose one of auto, all_to_all, ring, gather"
    ):
        ways.choose("ulysses", 48, 4)
    qkv, _, _ = draw(1, 4, 2, 8)
    with pytest.raises(InputError, match="not a way"):
        attention(*qkv, way="ulysses")


# One process with eight devices holds all meshes.
SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from cogvideox_jax.parallel import mesh as meshes
meshes.start(8)
from jax.sharding import NamedSharding, PartitionSpec as P
from cogvideox_jax.parallel import kernels
from cogvideox_jax.parallel.attention import attention
from tests.parallel.test_attention import close, draw, textbook, with_gradients

cases = {}
for heads, batch, tokens in ((4, 8, 16), (3, 8, 13), (6, 5, 10), (8, 8, 7)):
    operands, dout, segments = draw(batch, tokens, heads, 8, seed=heads)
    segments = segments[:1] if tokens % 2 else ()
    cases[heads] = operands, dout, segments, textbook(*operands, dout, *segments * 2)
done = 0
for shape in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)):
    mesh = meshes.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    with meshes.use(mesh):
        for heads, (operands, dout, segments, expected) in cases.items():
            for way in ("auto",) if shape[2] == 1 else ("auto", "ring", "gather"):
                if way == "ring" and heads % shape[2]:
                    continue  # as "auto"
                kernels.SMALL = 0 if (heads, way) == (3, "auto") else 2**20
                run = with_gradients(lambda *operands: attention(*operands, way=way), dout)
                close(run(*operands, *segments), expected, atol=5e-6)
                done += 1
        if shape[2] == 4:
            # operands that lie as the model's do are not gathered, and each way moves what it should
            operands, dout, *_ = cases[4]
            tokens = NamedSharding(mesh, P(("data", "fsdp"), "sequence"))
            for way, count in (
                # q, k, v in one; out; dout; its delta; dq, dk, dv in one
                ("auto", {"all-to-all(": 5, "collective-permute(": 0, "all-gather(": 0}),
                # k and v: the loop forward, one step and the loop backward; dk and dv: the loop and the way home
                ("ring", {"all-to-all(": 0, "collective-permute(": 10, "all-gather(": 0}),
            ):
                run = with_gradients(lambda *operands: attention(*operands, way=way), dout)
                placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=tokens) for x in operands]
                text = run.lower(*placed).compile().as_text()
                assert {name: text.count(name) for name in count} == count, way
            # the packed exchange is the only one that a block does again when its backward pass kept out and lse
            for names, exchanges in ((("attention_out", "attention_lse"), 6), ((), 7)):
                policy = jax.checkpoint_policies.save_only_these_names(*names)
                block = jax.checkpoint(lambda x: jnp.sin(attention(jnp.cos(x), x, x)), policy=policy, prevent_cse=False)
                run = jax.jit(jax.grad(lambda x: jax.lax.scan(lambda x, _: (block(x), None), x, length=3)[0].sum()))
                assert run.lower(placed[0]).compile().as_text().count("all-to-all(") == exchanges
        if shape == (2, 2, 2):
            try:
                attention(*cases[3][0], way="all_to_all")
            except ValueError as error:
                print(error)
print("equal", done)
"""


def test_each_way_on_each_mesh():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "shares 3 heads among sequence=2 devices" in done.stdout
    assert "equal 42" in done.stdout
