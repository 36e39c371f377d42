"""From a schedule to seconds, and from seconds to MFU and money: sums that can be done by hand."""

import jax
import jax.numpy as jnp
import pytest

from cogvideox_jax.plan import cost, hlo, topology

V5P = topology.parse("v5p-128")


def compute(seconds: float) -> hlo.Compute:
    instruction = hlo.Instruction("work", "f32[8]", "fusion", (), "", "")
    return hlo.Compute(instruction, round(seconds * V5P.chip.clock_hz), "elementwise")


def exchange(seconds: float, key: str = "", mode: str = "sync") -> hlo.Exchange:
    """Over 64 chips, which have six links of 90 GB/s each for it."""
    return hlo.Exchange(hlo.Collective("x", "all-reduce", "", 64, 1, seconds * 6 * 90e9, mode), key)


def scheduled(*events: hlo.Event) -> cost.Timeline:
    return cost.play(events, V5P)


def test_a_synchronous_exchange_holds_the_core():
    line = scheduled(compute(1), exchange(0.5), compute(1))
    assert line.scheduled == pytest.approx(2.5)
    assert (line.serial, line.overlapped, line.exposed) == pytest.approx((2.5, 2, 0.5))
    assert line.async_share == 0


def test_an_asynchronous_one_holds_it_only_for_what_is_left():
    line = scheduled(exchange(0.5, "a", "async"), compute(0.2), hlo.Done("a"), compute(1))
    assert line.scheduled == pytest.approx(1.5)
    assert line.exposed == pytest.approx(0.3)
    assert line.async_share == 1
    assert line.windows["all-reduce", 64, "async"] == pytest.approx(0.2)
    hidden = scheduled(exchange(0.5, "a", "async"), compute(0.8), hlo.Done("a"))
    assert (hidden.scheduled, hidden.exposed) == pytest.approx((0.8, 0))


def test_the_floor_is_the_bandwidth_for_all_but_matmuls():
    instruction = compute(1).instruction
    cycles = round(V5P.chip.clock_hz)
    quarter = int(V5P.chip.hbm_bandwidth / 4)
    line = scheduled(
        hlo.Compute(instruction, cycles, "matmul", quarter),
        hlo.Compute(instruction, cycles, "copy", quarter),
        hlo.Compute(instruction, cycles, "copy", 8 * quarter),  # takes a slice out of an operand: the estimate stands
    )
    assert line.scheduled == pytest.approx(3)
    assert line.floor == pytest.approx(1 + 0.25 + 1)


def test_exchanges_share_the_links():
    line = scheduled(
        exchange(0.5, "a", "async"), exchange(0.5, "b", "async"), compute(0.6), hlo.Done("a"), hlo.Done("b")
    )
    assert line.scheduled == pytest.approx(1.0)
    assert line.exposed == pytest.approx(0.4)


def test_a_loop_multiplies_all_sums():
    body = (compute(0.1), exchange(0.2), hlo.HostCopy(1000))
    line = scheduled(hlo.Loop(3, (*body, hlo.Loop(2, (compute(0.01),)))))
    assert line.scheduled == pytest.approx(3 * (0.3 + 0.02))
    assert line.xla == pytest.approx(0.36)
    assert line.links == pytest.approx(0.6)
    assert line.exposed == pytest.approx(0.6)
    assert line.host_bytes == 3000
    assert line.calls["all-reduce", 64, "sync"] == 3


def kernel(name: str, outputs: str, *operands: str) -> hlo.Kernel:
    instruction = hlo.Instruction(name, outputs, "custom-call", (), "", "")
    return hlo.Kernel(instruction, operands)


HEADS, LONG, KEYS, DIM = 4, 1024, 512, 64
Q, K = f"bf16[{HEADS},{LONG},{DIM}]", f"bf16[{HEADS},{KEYS},{DIM}]"
MATMUL = 2 * HEADS * LONG * KEYS * DIM


@pytest.mark.parametrize(
    ("name", "outputs", "matmuls", "direction"),
    [
        ("splash_mha_fwd_residuals.3", f"({Q}, f32[{HEADS},{LONG}])", 2, "forward"),
        ("splash_mha_dkv_no_residuals", f"({Q}, {K}, {K})", 5, "backward"),
        ("splash_mha_dkv_no_residuals", f"({K}, {K})", 4, "backward"),
        ("splash_mha_dq", Q, 3, "backward"),
    ],
)
def test_attention_kernels_cost_their_matmuls(name, outputs, matmuls, direction):
    call = kernel(name, outputs, "s32[3]", Q, K, K, "s32[4,1024,128]")
    assert cost.kernel_flops(call) == (matmuls * MATMUL, direction)
    share = {"forward": 0.44, "backward": 0.475}[direction]
    assert cost.kernel_seconds(call, V5P.chip) == pytest.approx(matmuls * MATMUL / (459e12 * share))


def test_wider_heads_fill_the_matrix_unit():
    wide = [shape.replace(f",{DIM}]", ",128]") for shape in (Q, K, K)]
    narrow_s = cost.kernel_seconds(kernel("splash_mha_fwd", Q, Q, K, K), V5P.chip)
    wide_s = cost.kernel_seconds(kernel("splash_mha_fwd", wide[0], *wide), V5P.chip)
    assert wide_s == pytest.approx(narrow_s)


def test_other_kernels_cost_their_bytes():
    call = kernel("fused_norm", Q, Q)
    assert cost.kernel_flops(call) == (0, "")
    size = 2 * HEADS * LONG * DIM * 2
    assert cost.kernel_seconds(call, V5P.chip) == pytest.approx(size / (2765e9 * 0.7))


def collective(kind: str, group: int, slices: int = 1) -> hlo.Collective:
    return hlo.Collective("x", kind, "", group, slices, 9e9, "sync")


def test_seconds_on_the_links():
    def seconds(kind: str, group: int, slices: int = 1, tpu: str = "v5p-128") -> float:
        return cost.exchange_seconds(collective(kind, group, slices), topology.parse(tpu))

    assert seconds("all-gather", 64) == pytest.approx(9 / (6 * 90))
    assert seconds("all-gather", 4) == pytest.approx(9 / (2 * 90))
    assert seconds("collective-permute", 2) == pytest.approx(9 / 90)
    assert seconds("all-to-all", 16) == pytest.approx(2 * 9 / (4 * 90))  # two hops on average
    assert seconds("all-gather", 256, tpu="v5e-256") == pytest.approx(9 / (4 * 45))
    assert seconds("all-reduce", 1) == 0
    # of 128 chips in two slices: a 127th of the bytes crosses
    assert seconds("all-reduce", 128, 2, "v5p-128x2") == pytest.approx(9 / 127 / 6.2 + 9 * 126 / 127 / (6 * 90))


def test_model_flops_are_those_of_the_spec():
    # spec/tpu.md section 4: 5.07e14 + 4.89e14 at 17,776 tokens
    assert cost.transformer_flops(num_layers=42, width=3072, tokens=17776) == pytest.approx(9.96e14, rel=1e-3)


def test_flops_of_a_function_are_counted_through_scans_and_calls():
    def f(x: jax.Array, w: jax.Array, k: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, _: (jax.jit(jnp.dot)(x, w), None), x, length=5)
        return jax.lax.conv_general_dilated(
            x[None, :, :, None], k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    jaxpr = jax.make_jaxpr(f)(jnp.zeros((8, 16)), jnp.zeros((16, 16)), jnp.zeros((3, 3, 1, 7)))
    assert cost.jaxpr_flops(jaxpr.jaxpr) == 5 * 2 * 8 * 16 * 16 + 2 * 8 * 16 * 7 * 9


def test_outlook():
    found = cost.outlook(
        2.0, topology=V5P, samples=64, flops_per_sample=459e12, stage_samples=64 * 1800, chip_price=4.0
    )
    assert found.samples_per_s == 32
    assert found.mfu == 0.5
    assert found.days == pytest.approx(1 / 24)
    assert found.chip_hours == pytest.approx(64)
    assert found.price == pytest.approx(256)


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(train_step)/jvp(Transformer)/while/body/closed_call/checkpoint/blocks/mul", "forward"),
        ("jit(train_step)/transpose(jvp(Transformer))/while/body/closed_call/checkpoint/blocks/mul", "backward"),
        (
            "jit(train_step)/transpose(jvp(Transformer))/while/body/checkpoint/rematted_computation/blocks/mul",
            "recomputed",
        ),
        ("jit(train_step)/add", "update"),
    ],
)
def test_phases(op_name, expected):
    assert cost.phase(op_name) == expected
