"""Whole folders: written by diffusers, through this system, and loaded by diffusers again."""

import importlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from cogvideox_jax.models import t5, vae
from cogvideox_jax.models.convert import files, folder, trees
from cogvideox_jax.models.transformer import Transformer
from cogvideox_jax.tasks import convert
from configs.convert import get_config
from tests.models import folders as samples
from tests.models.test_convert_files import LAYOUT, LYING, TENSORS
from tests.models.test_convert_tokenizer import same_ids
from tests.parity.reference import close, randomise
from tests.parity.test_transformer import positions
from tests.tasks.test_convert import trained  # noqa: F401  (a fixture)

pytestmark = pytest.mark.parity


def run(source: Path, workdir: Path, **options) -> None:
    config = get_config()
    config.source = str(source)
    config.update(options)
    convert.check(config, workdir)
    workdir.mkdir()
    convert.run(config, workdir)


def write(libraries, root: Path, variant: str, dtype: str) -> Path:
    """A pipeline as diffusers saves it, its transformer in parts."""
    diffusers, transformers = libraries.diffusers, libraries.transformers
    transformer = diffusers.CogVideoXTransformer3DModel.from_config(samples.tiny_transformer(variant))
    autoencoder = diffusers.AutoencoderKLCogVideoX.from_config(samples.tiny_vae(latent_channels=4, scaling_factor=0.7))
    text = {"vocab_size": 32128, "d_model": 12, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2}
    encoder = transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj="gated-gelu", **text))
    for seed, module in enumerate((transformer, autoencoder, encoder)):
        randomise(module, seed)
        module.to(getattr(libraries.torch, dtype))
    folder.write_tokenizer(samples.VOCABULARY, root / "vocabulary", 6)
    name = "CogVideoXImageToVideoPipeline" if variant.endswith("i2v") else "CogVideoXPipeline"
    pipeline = getattr(diffusers, name)(
        tokenizer=transformers.T5Tokenizer.from_pretrained(root / "vocabulary"),
        text_encoder=encoder,
        vae=autoencoder,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDPMScheduler.from_config(samples.scheduler(snr_shift_scale=1.0)),
    )
    pipeline.save_pretrained(root / "pipeline")
    shutil.rmtree(root / "pipeline" / "transformer")  # saving does not remove what an earlier one left
    transformer.save_pretrained(root / "pipeline" / "transformer", max_shard_size="40KB")
    return root / "pipeline"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", samples.VARIANTS)
def test_in_and_out_again(libraries, tmp_path, variant, dtype):
    before = write(libraries, tmp_path, variant, dtype)
    # transformers 5 saves no spiece.model
    assert not (before / "tokenizer" / "spiece.model").exists()
    run(before, tmp_path / "in")
    same_ids((tmp_path / "in" / "tokenizer" / "spiece.model").read_bytes())
    run(tmp_path / "in", tmp_path / "out", max_shard_bytes=40_000)
    after = tmp_path / "out" / "diffusers"
    for kind in folder.NETWORKS:
        assert samples.read(before / kind) == samples.read(after / kind)
        assert len(list((after / kind).glob("*.safetensors"))) > 1
    for name in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        assert json.loads((after / name).read_text()) == json.loads((before / name).read_text())
    name = json.loads((before / "model_index.json").read_text())["_class_name"]
    kwargs = {"torch_dtype": getattr(libraries.torch, dtype)}
    theirs = getattr(libraries.diffusers, name).from_pretrained(before, **kwargs)
    ours = getattr(libraries.diffusers, name).from_pretrained(after, **kwargs)
    for kind in folder.NETWORKS:
        expected, got = getattr(theirs, kind).state_dict(), getattr(ours, kind).state_dict()
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert got[key].dtype == value.dtype
            assert libraries.torch.equal(got[key], value), key
    for path in (before / "tokenizer").iterdir():
        assert (after / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    assert dict(ours.scheduler.config) == dict(theirs.scheduler.config)
    assert ours.text_encoder.config.to_dict().items() >= {"d_model": 12, "feed_forward_proj": "gated-gelu"}.items()
    text = ["a cat, a dog and a very long sentence that is cut"]
    assert ours.tokenizer(text).input_ids == theirs.tokenizer(text).input_ids


def test_an_exported_run_computes_the_same_in_diffusers(libraries, trained, tmp_path):  # noqa: F811
    run(trained, tmp_path / "out")
    pipeline = libraries.diffusers.CogVideoXPipeline.from_pretrained(tmp_path / "out" / "diffusers")
    pieces, _ = folder.read_pipeline(tmp_path / "out" / "diffusers")
    torch, rng = libraries.torch, np.random.default_rng(0)
    places = {
        "transformer": trained / "diffusion" / "checkpoints" / "10" / "ema",
        "vae": trained / "vae" / "checkpoints" / "10" / "ema",
        "text_encoder": trained / "encode" / "text_encoder",
    }
    params = {kind: jax.tree.map(np.asarray, trees.open_tree(path)) for kind, path in places.items()}

    ids = pipeline.tokenizer(["a cat"], padding="max_length", max_length=6).input_ids
    with torch.no_grad():
        expected = pipeline.text_encoder(torch.tensor(ids)).last_hidden_state
    context = t5.encode(
        t5.T5Encoder(**pieces["text_encoder"]["model"]), params["text_encoder"], np.array(ids, np.int32)
    )
    close(context, expected.numpy(), "text encoder of a run")

    model = Transformer(**pieces["transformer"]["model"])
    latents = rng.normal(size=(1, 3, 16, 8, 12)).astype(np.float32)
    rotary = pipeline._prepare_rotary_positional_embeddings(64, 96, 3, torch.device("cpu"))
    with torch.no_grad():
        predicted = pipeline.transformer(
            torch.from_numpy(latents), expected, torch.tensor([500]), image_rotary_emb=rotary
        ).sample.numpy()
    ours = model.apply(
        {"params": params["transformer"]},
        latents.transpose(0, 1, 3, 4, 2),
        context,
        np.array([500.0], np.float32),
        positions(pieces["transformer"], (3, 4, 6)),
    )
    close(np.asarray(ours).transpose(0, 1, 4, 2, 3), predicted, "denoiser of a run")

    with torch.no_grad():
        frames = pipeline.vae.decode(torch.from_numpy(latents).transpose(1, 2)).sample.numpy()
    got = vae.decode(vae.VAE(**pieces["vae"]["model"]), params["vae"], latents.transpose(0, 1, 3, 4, 2))
    close(np.asarray(got).transpose(0, 4, 1, 2, 3), frames, "autoencoder of a run")


def test_the_safetensors_library_agrees(libraries, tmp_path):
    """It reads what we write, and refuses what we refuse (it does not look for pickles and doubled keys)."""
    library = importlib.import_module("safetensors.torch")
    files.write_tensors(tmp_path, LAYOUT, TENSORS.items(), basename="model")
    found = library.load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        tensor = found[name]
        assert tuple(tensor.shape) == array.shape
        np.testing.assert_array_equal(tensor.double().numpy(), array.astype(np.float64), err_msg=name)
    library.save_file(found, tmp_path / "theirs.safetensors")
    for name, tensor in files.open_tensors(tmp_path / "theirs.safetensors").items():
        assert np.asarray(tensor).tobytes() == TENSORS[name].tobytes()
    for fault, (content, _) in LYING.items():
        path = tmp_path / "lying.safetensors"
        path.write_bytes(content)
        if fault != "a key twice":
            with pytest.raises((importlib.import_module("safetensors").SafetensorError, OSError, ValueError)):
                library.load_file(path)
