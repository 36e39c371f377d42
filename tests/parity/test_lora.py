"""LoRA against diffusers and peft: their file read by us, our file loaded by them, several at once with weights."""

import importlib
import json

import jax
import numpy as np
import pytest

from cogvideox_jax.models import lora
from cogvideox_jax.models.convert import files
from cogvideox_jax.models.convert import lora as lora_files
from tests.models import folders as samples
from tests.models.test_lora import adapter
from tests.parity.reference import BOUND, close, error
from tests.parity.test_transformer import Case, case, theirs

pytestmark = pytest.mark.parity
RANK = 3
THEIR_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def peft(libraries):
    return importlib.import_module("peft")


def pipeline(libraries, module):
    """The pipeline's LoRA methods need its transformer only."""
    return libraries.diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=module,
        scheduler=libraries.diffusers.CogVideoXDDIMScheduler(),
    )


def save(libraries, peft, given: Case, folder, seed: int, targets=THEIR_TARGETS, metadata=True, **settings):
    """Put a LoRA with random A and B on their transformer and save it as the training script does."""
    module, torch = given.module, libraries.torch
    module.add_adapter(peft.LoraConfig(target_modules=list(targets), **{"r": RANK} | settings))
    rng = np.random.default_rng(seed)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            values = rng.normal(size=tuple(parameter.shape)) / parameter.shape[1] ** 0.5
            parameter.data = torch.from_numpy(values.astype(np.float32))
    layers = peft.utils.get_peft_model_state_dict(module)
    assert len(layers) == 2 * len(targets) * given.model.num_layers
    config = module.peft_config["default"].to_dict() if metadata else None
    libraries.diffusers.CogVideoXPipeline.save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config
    )
    return folder


def expected(libraries, given: Case) -> np.ndarray:
    with libraries.torch.no_grad():
        return theirs(libraries.torch, given).numpy()


def ours(given: Case, tree=None, params=None) -> np.ndarray:
    variables = {"params": given.params if params is None else params} | ({} if tree is None else {"lora": tree})
    got = jax.jit(given.model.apply)(
        variables,
        given.latents.transpose(0, 1, 3, 4, 2),
        given.context,
        given.timesteps.astype(np.float32),
        given.positions,
        ofs=given.ofs,
    )
    return np.asarray(got).transpose(0, 1, 4, 2, 3)


def random_lora(given: Case, seed: int, targets=lora.TARGETS, rank=RANK):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) / leaf.shape[1] ** 0.5).astype(np.float32),
        lora.shapes(given.model, rank, targets),
    )


@pytest.mark.parametrize("variant", samples.VARIANTS)
def test_their_file_is_read(libraries, peft, tmp_path, variant):
    given = case(libraries, variant, "portrait", 0)
    plain = expected(libraries, given)
    save(libraries, peft, given, tmp_path, 1, lora_alpha=5)
    tree, info = lora_files.read(tmp_path, given.model)
    assert info == (RANK, 5, lora.TARGETS)
    with_lora = expected(libraries, given)
    assert error(with_lora, plain) > 0.3
    scaled = lora.scaled(tree, info.scale)
    close(ours(given, scaled), with_lora, f"lora {variant}, applied")
    close(ours(given, params=lora.merge(given.params, scaled)), with_lora, f"lora {variant}, merged")
    # their own weight of it
    pipeline(libraries, given.module).set_adapters("default", 0.4)
    close(ours(given, lora.scaled(tree, 0.4 * info.scale)), expected(libraries, given), f"lora {variant}, weight 0.4")


@pytest.mark.parametrize(
    ("settings", "targets", "scale"),
    [
        (dict(lora_alpha=7, use_rslora=True), THEIR_TARGETS, 7 / RANK**0.5),
        (dict(lora_alpha=2, lora_dropout=0.2, init_lora_weights="gaussian"), ("to_k", "to_out.0"), 2 / RANK),
        (dict(lora_alpha=9, metadata=False), ("to_v",), 1),
    ],
    ids=["rslora", "two targets", "no metadata"],
)
def test_their_other_files_are_read_as_they_load_them(libraries, peft, tmp_path, settings, targets, scale):
    given = case(libraries, "5b", "landscape", 0)
    save(libraries, peft, given, tmp_path, 1, targets, **settings)
    tree, info = lora_files.read(tmp_path, given.model)
    assert info.scale == pytest.approx(scale)
    assert info.targets == tuple(name for name in lora.TARGETS if lora_files.NAMES[name] in targets)
    fresh = case(libraries, "5b", "landscape", 0)
    pipeline(libraries, fresh.module).load_lora_weights(tmp_path)
    # loading leaves the dropout that the metadata tells of in training mode
    fresh.module.eval()
    close(ours(given, lora.scaled(tree, info.scale)), expected(libraries, fresh), f"lora {settings}")


def test_their_metadata_is_the_one_that_the_other_tests_use(libraries, peft, tmp_path):
    given = case(libraries, "2b", "landscape", 0)
    save(libraries, peft, given, tmp_path, 1)
    _, metadata = files.open_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert metadata.keys() == {"format", "lora_adapter_metadata"}
    assert json.loads(adapter()["lora_adapter_metadata"]).keys() <= json.loads(metadata["lora_adapter_metadata"]).keys()


@pytest.mark.parametrize(
    ("variant", "targets", "alpha"),
    [
        ("2b", lora.TARGETS, 5),
        ("5b", lora.TARGETS, 0.6),
        ("5b", ("query", "out"), 5),
        ("1.5_5b", ("value",), 0.6),
    ],
    ids=str,
)
def test_our_file_is_loaded(libraries, peft, tmp_path, variant, targets, alpha):
    given = case(libraries, variant, "portrait", 1)
    tree = random_lora(given, 2, targets)
    plain = expected(libraries, given)
    lora_files.write(tmp_path, tree, alpha)
    pipeline(libraries, given.module).load_lora_weights(tmp_path)
    with_lora = expected(libraries, given)
    close(ours(given, lora.scaled(tree, alpha / RANK)), with_lora, f"lora {variant}, ours, alpha {alpha}")
    assert error(ours(given, tree), with_lora) > 0.05, "the scale of 1 would not be told from alpha"
    assert error(with_lora, plain) > 0.05
    (config,) = given.module.peft_config.values()
    assert (config.r, config.lora_alpha) == (RANK, alpha)
    assert set(config.target_modules) == {lora_files.NAMES[name] for name in targets}


def test_what_they_saved_we_write_as_they_did(libraries, peft, tmp_path):
    given = case(libraries, "5b", "landscape", 0)
    save(libraries, peft, given, tmp_path / "theirs", 1, lora_alpha=5)
    tree, info = lora_files.read(tmp_path / "theirs", given.model)
    lora_files.write(tmp_path / "ours", tree, info.alpha)
    found = {}
    for folder in ("theirs", "ours"):
        tensors, metadata = files.open_file(tmp_path / folder / "pytorch_lora_weights.safetensors")
        config = json.loads(metadata["lora_adapter_metadata"])
        config["transformer.target_modules"] = sorted(config["transformer.target_modules"])
        found[folder] = {name: np.asarray(tensor).tobytes() for name, tensor in tensors.items()}, config
    assert found["ours"][0] == found["theirs"][0]
    assert found["ours"][1].items() <= found["theirs"][1].items()


def test_several_with_weights(libraries, peft, tmp_path):
    given = case(libraries, "5b", "landscape", 0)
    pipe = pipeline(libraries, given.module)
    settings = {"style": (lora.TARGETS, 3, 5.0, 0.7), "subject": (("query", "value"), 2, 1.0, -1.3)}
    parts = []
    for seed, (name, (targets, rank, alpha, weight)) in enumerate(settings.items()):
        tree = random_lora(given, seed, targets, rank)
        pipe.load_lora_weights(lora_files.write(tmp_path / name, tree, alpha).parent, adapter_name=name)
        parts.append(lora.scaled(tree, weight * alpha / rank))
    pipe.set_adapters(list(settings), [weight for *_, weight in settings.values()])
    both = expected(libraries, given)
    close(ours(given, lora.combine(parts)), both, "lora, two of them")
    for part in parts:
        assert error(ours(given, part), both) > 0.1


def swapped(tree, one: str, other: str, part: str):
    pairs = {name: dict(zip(("a", "b"), pair, strict=True)) for name, pair in lora.pairs(tree).items()}
    pairs[one][part], pairs[other][part] = pairs[other][part], pairs[one][part]
    return lora.tree_of({name: (pair["a"], pair["b"]) for name, pair in pairs.items()})


def test_a_mistake_would_be_seen(libraries, peft, tmp_path):
    """Each mistake that a name table or a layout rule could make is far above the bound."""
    given = case(libraries, "5b", "portrait", 0)
    save(libraries, peft, given, tmp_path, 1, lora_alpha=5)
    tree, info = lora_files.read(tmp_path, given.model)
    tree = lora.scaled(tree, info.scale)
    with_lora = expected(libraries, given)
    close(ours(given, tree), with_lora, "lora, no mistake")
    mistakes = {
        "A of q and k": swapped(tree, "query", "key", "a"),
        "B of q and k": swapped(tree, "query", "key", "b"),
        "A of v and out": swapped(tree, "value", "out", "a"),
        "layers in reverse": jax.tree.map(lambda leaf: leaf[::-1], tree),
        "scale": lora.scaled(tree, 1 / info.scale),
        "not transposed": lora.tree_of(
            {
                name: (a.reshape(a.shape[0], a.shape[2], -1).transpose(0, 2, 1), b)
                for name, (a, b) in lora.pairs(tree).items()
            }
        ),
    }
    for what, wrong in mistakes.items():
        found = error(ours(given, wrong), with_lora)
        print(f"lora, {what}: {found:.1e} of the rms")
        assert found > 100 * BOUND, what
