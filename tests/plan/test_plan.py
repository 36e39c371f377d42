"""The plan as a task: what it refuses before the compiler is loaded, and (marker tpu) whole plans of the tiny network."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.parallel import flags
from cogvideox_jax.parallel import mesh as meshes
from cogvideox_jax.parallel.sharding import named
from cogvideox_jax.plan import page, topology
from cogvideox_jax.tasks import plan as task
from configs import plan as configs

ROOT = Path(__file__).parents[2]
TOP = {
    "predicted_step_s", "predicted_mfu", "memory_gib_per_chip", "memory_limit_gib", "wire_gb_per_chip", "async_share",
    "compile_s", "chip_hours", "fits", "detail",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tpu": "v5p-100"}, ["v5p-100", "v5p-64 and v5p-128"]),
        ({"flags": "fast"}, ["unknown profile 'fast'", "default"]),
        ({"train.remat": "some"}, ["config.train.remat='some'", "attention"]),
        ({"train.compute_dtype": "float16"}, ["config.train.compute_dtype", "bfloat16"]),
        ({"train.accumulate": 0}, ["config.train.accumulate=0"]),
        ({"samples_per_group": 0}, ["samples_per_group=0"]),
        ({"size.num_frames": 50}, ["num_frames=50", "49 or 53"]),
        ({"size.height": 470}, ["height=470", "464 or 480"]),
        ({"price_per_chip_hour": -1.0}, ["price_per_chip_hour=-1.0"]),
    ],
)
def test_wrong_input_is_refused_without_the_compiler(change, words, tmp_path, monkeypatch):
    monkeypatch.setattr(topology.Topology, "devices", lambda self: pytest.fail("the compiler was loaded"))
    config = configs.get_config("stage=t2v_480,variant=5b,tpu=v5p-128")
    config.update_from_flattened_dict(change)
    with pytest.raises(InputError) as error:
        task.check(config, tmp_path)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("stage=t2v_999", ["stage=t2v_999", "t2v_480"]),
        ("variant=7b", ["variant=7b", "1.5-5b"]),
        ("mesh=8x8", ["mesh=8x8", "1x16x4"]),
        ("program=encode", ["program=encode", "vae_256"]),
    ],
)
def test_wrong_arguments(arg, words):
    with pytest.raises(ValueError, match="config argument") as error:
        configs.get_config(arg)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("arg", "mesh", "tokens"),
    [
        ("stage=t2v_480,variant=5b,tpu=v5p-128", (1, 64, 1), 17776),
        ("stage=t2v_480,variant=2b,tpu=v5e-256", (2, 128, 1), 17776),  # 1920 is no multiple of 256
        ("stage=t2v_480,variant=5b,tpu=v5p-128x2", (2, 64, 1), 17776),
        ("stage=t2v_480,variant=5b,tpu=v5p-128,mesh=4x-1x2", (4, 8, 2), 17776),
        ("stage=t2v_768,tpu=v5p-128,num_frames=161", (1, 16, 4), 85904),
        ("stage=t2v_768,tpu=v5p-128", (1, 16, 4), 45104),  # 21 latent frames are filled up to 22
        ("stage=vae_256,tpu=v5p-8", (4, 1, 1), 5 * 32 * 32),
    ],
)
def test_mesh_and_tokens_by_default(arg, mesh, tokens):
    config = configs.get_config(arg)
    assert task._shapes(config, topology.parse(config.tpu)) == mesh
    assert task._tokens(config) == tokens


def test_a_search_varies_what_divides():
    config = configs.get_config("search,stage=t2v_480,variant=5b,tpu=v5p-128")
    variants = task._variants(config, topology.parse("v5p-128"))
    assert variants[0] == task.Variant((1, 64, 1), 1, "attention")
    assert len({variant.name for variant in variants}) == len(variants)
    assert {variant.mesh for variant in variants} == {(1, 64, 1), (1, 32, 2), (1, 16, 4), (1, 8, 8), (1, 4, 16)}
    assert {variant.remat for variant in variants} == {"nothing", "attention", "everything"}


def test_plans_are_ranked_by_speed_then_by_what_is_missing():
    fast, slow = ({"fits": True, "predicted_mfu": mfu, "memory_gib_per_chip": 1.0} for mfu in (0.4, 0.3))
    near, far = ({"fits": False, "predicted_mfu": 0.5, "memory_gib_per_chip": gib} for gib in (100.0, 200.0))
    unknown = {"fits": False, "predicted_mfu": None, "memory_gib_per_chip": None}
    assert sorted([unknown, far, slow, near, fast], key=task.rank) == [fast, slow, near, far, unknown]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (894.07G) exceeds "
            "available HBM (30.75G).",
            (894.07, 30.75),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.77G of 15.75G "
            "hbm. Exceeded hbm capacity by 5.02G.",
            (20.77, 15.75),
        ),
        ("RESOURCE_EXHAUSTED: Used 512.00M of 256.00M hbm.", (0.5, 0.25)),
        ("RESOURCE_EXHAUSTED: vmem", (None, None)),
    ],
)
def test_what_the_compiler_says_of_memory(message, expected):
    assert task.exceeded(message) == expected


def test_unknown_profiles_are_refused():
    with pytest.raises(InputError, match="did you mean v5p"):
        flags.profile("v5")
    with pytest.raises(InputError, match="known are default"):
        flags.profile("v5e", "quick")
    assert flags.init_args({"xla_a": "true", "xla_b": "4"}) == "--xla_a=true --xla_b=4"


def command(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "cogvideox_jax.main", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.tpu
@pytest.mark.parametrize(("tpu", "mesh"), [("v5e-8", [1, 4, 2]), ("v5p-8", [1, 2, 2])])
def test_a_plan_of_the_tiny_network(tpu, mesh, tmp_path):
    workdir = tmp_path / "plan"
    done = command(
        f"--config=configs/plan.py:tiny,stage=t2v_256,tpu={tpu}", f"--workdir={workdir}",
        "--config.price_per_chip_hour=2.0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads((workdir / "plan.json").read_text())
    detail, seconds = plan["detail"], plan["detail"]["seconds"]
    assert set(plan) == TOP
    assert plan["fits"]
    assert list(detail["mesh"].values()) == mesh
    assert detail["tokens_per_sample"] == 48 + 3 * 4 * 4
    assert 0 < plan["memory_gib_per_chip"] < 1
    # what the program is given is what the abstract state says that a device holds
    held = sum(detail["held_gib_per_device"].values())
    assert detail["memory_gib_per_device"]["argument"] == pytest.approx(held, rel=0.3)
    assert seconds["full_overlap"] <= plan["predicted_step_s"] <= seconds["no_overlap"]
    assert 1e-4 < plan["predicted_step_s"] < 1e-1
    assert 0 < plan["predicted_mfu"] < 0.1
    assert 0 < plan["async_share"] <= 1
    # both kernels run once a layer: the attention's results are kept, or all is
    assert sorted(kernel["calls"] for kernel in detail["kernels"]) == [4, 4]
    assert plan["chip_hours"] == pytest.approx(
        800 * 16 / detail["samples_per_step"] * plan["predicted_step_s"] / 3600 * detail["chips"]
    )
    assert detail["price"] == pytest.approx(2 * plan["chip_hours"])
    for words in ("MFU", "fits: ", "measured on no TPU", "Not predicted", "all-to-all"):
        assert words in done.stdout


@pytest.mark.tpu
def test_a_plan_that_does_not_fit_says_by_how_much(tmp_path):
    done = command(
        "--config=configs/plan.py:tiny,stage=t2v_256,tpu=v5e-4", f"--workdir={tmp_path / 'plan'}",
        "--config.samples_per_group=400000",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert not plan["fits"]
    assert plan["memory_gib_per_chip"] > plan["memory_limit_gib"] == 15.75
    assert f"{page.number(plan['memory_gib_per_chip'] - 15.75)} more than the 15.8 there are" in done.stdout


@pytest.fixture
def without_cache():
    """A program for absent devices cannot be read from the persistent cache, and jax warns when it tries."""
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", cached)


@pytest.mark.tpu
@pytest.mark.usefixtures("without_cache")
@pytest.mark.parametrize(
    ("chip", "profile"), [(chip, profile) for chip, profiles in flags.PROFILES.items() for profile in profiles]
)
def test_the_compiler_knows_every_option(chip, profile):
    number = {"v5e": 4, "v6e": 4}.get(chip, 8)
    devices = topology.parse(f"{chip}-{number}").devices()
    mesh = meshes.make_mesh(1, len(devices), 1, devices=devices)
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=named(mesh, jax.P("fsdp")))
    lowered = jax.jit(lambda a, b: (a @ b).sum()).lower(x, x)
    lowered.compile(compiler_options=dict(flags.profile(chip, profile)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={**flags.profile(chip, profile), "xla_tpu_fly": "true"})
