"""The TPU kernel: interpreted on this machine against the textbook formula, and compiled ahead of time for a TPU mesh."""

import re
import subprocess
import sys

import numpy as np
import pytest

from cogvideox_jax.parallel import kernels, splash
from tests.parallel.test_attention import close, draw, textbook


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("copies", [1, 8])
def test_interpreted_it_is_the_textbook_formula(monkeypatch, segmented, copies):
    """130 queries pad to 2 blocks and 300 keys to 3; with one copy of dq the backward pass takes 3 turns."""
    monkeypatch.setattr(splash, "Q_BLOCKS", (128,))
    monkeypatch.setattr(splash, "KV_BLOCKS", {128: 128})
    monkeypatch.setattr(splash, "DQ_COPIES", copies)
    (q, k, v), dout, ids = draw(2, 130, 2, 64, m=300)  # keys have no segment 2: its queries see nothing
    q_ids, kv_ids = ids if segmented else (None, None)
    out, lse = splash.forward(q, k, v, q_ids, kv_ids, interpret=True)
    reference_out, reference_lse = kernels.reference_forward(q, k, v, q_ids, kv_ids)
    np.testing.assert_allclose(lse, reference_lse, atol=1e-5)
    delta = kernels.row_delta(reference_out, dout).swapaxes(1, 2)
    gradients = splash.backward(q, k, v, q_ids, kv_ids, lse, delta, dout, interpret=True)
    close((out, *gradients), textbook(q, k, v, dout, q_ids, kv_ids))
    assert (lse.min() == kernels.MASKED) == segmented


@pytest.mark.parametrize(
    ("length", "queries", "keys", "turns"),
    [
        # (padded length, block)
        (17_776, (17_920, 512), (17_920, 2560), 1),
        (4_444, (4_480, 640), (4_608, 2304), 1),
        (85_906, (86_016, 512), (86_016, 2048), 6),
        (700, (768, 768), (768, 768), 1),
        (60, (128, 128), (128, 128), 1),
    ],
)
def test_blocks_pad_little(length, queries, keys, turns):
    blocks = splash._Blocks.of(length, length)
    assert (blocks.queries, blocks.q) == queries
    assert (blocks.keys, blocks.kv) == keys
    assert blocks.turns == turns


# A process of its own: libtpu wants its variables set before it is loaded, and speaks on stderr.
SCRIPT = """
import os
os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from cogvideox_jax.parallel import mesh as meshes
from cogvideox_jax.parallel.attention import attention

mesh = meshes.make_mesh(1, 2, 4, devices=topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)
with meshes.use(mesh):
    flat = jax.ShapeDtypeStruct((2, 2048, 8 * 64), jnp.bfloat16, sharding=NamedSharding(mesh, P(("data", "fsdp"), "sequence")))

    def run(q, k, v, dout):
        heads = [x.reshape(2, 2048, 8, 64) for x in (q, k, v, dout)]
        out, gradient = jax.vjp(lambda *qkv: attention(*qkv, way="WAY"), *heads[:3])
        return [x.reshape(2, 2048, 512) for x in (out, *gradient(heads[3]))]

    print(jax.jit(run).lower(*[flat] * 4).compile().as_text())
"""


def compiled(way: str) -> str:
    script = SCRIPT.replace("WAY", way)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(text: str, operation: str) -> list[str]:
    """Shapes that an HLO operation gives, e.g. bf16[4,3,1,512,128], without layouts."""
    lines = re.findall(rf"= (.*) {operation}\(", text)
    return sorted(re.findall(r"\w+\[[\d,]*\]", line)[0] for line in lines)


@pytest.mark.tpu
def test_compiled_all_to_all_exchanges_q_k_v_at_once():
    text = compiled("all_to_all")
    # out, dout; q, k, v and dq, dk, dv; delta: with 2 heads of 64 as one dimension of 128
    one, three = "bf16[4,1,1,512,128]", "bf16[4,3,1,512,128]"
    assert results(text, "all-to-all") == sorted([one, one, three, three, "f32[1,512,8]"])
    assert text.count('custom_call_target="tpu_custom_call"') == 2, "one kernel forward, one backward"
    assert not results(text, "all-gather(?:-start)?") + results(text, "all-reduce(?:-start)?")


@pytest.mark.tpu
def test_compiled_ring_hands_keys_on_while_it_attends():
    text = compiled("ring")
    # see test_attention.py for the ten
    assert results(text, "collective-permute-start") == ["bf16[1,512,8,64]"] * 8 + ["f32[1,512,8,64]"] * 2
    assert text.count('custom_call_target="tpu_custom_call"') == 4, "forward and backward, in a loop and beside it"
    assert not results(text, "all-gather(?:-start)?") + results(text, "all-to-all")
    # the text is the schedule: during each kernel something travels (the forward pass hands nothing on in its last, but the
    # backward pass's first keys can leave already)
    travelling, beside = 0, []
    for line in text.splitlines():
        travelling += (" collective-permute-start(" in line) - (" collective-permute-done(" in line)
        if 'custom_call_target="tpu_custom_call"' in line:
            beside.append(travelling > 0)
    assert beside == [True] * 4
