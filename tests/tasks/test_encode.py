"""Encoding with imported networks: their scale and their chunks, and a run made of them is found whole."""

import json

import numpy as np
import pytest

from cogvideox_jax.models import vae
from cogvideox_jax.pipeline import Pipeline, find_network, locate
from cogvideox_jax.tasks import convert, encode
from configs import convert as convert_config
from configs import encode as encode_config
from data import records, transforms
from tests.data.test_records import clip
from tests.models import folders


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """(folder of the records of clips, workdir of convert, workdir of encode)."""
    root = tmp_path_factory.mktemp("encode")
    config = convert_config.get_config()
    config.source = str(folders.write_pipeline(root / "diffusers", "5b", np.float32))
    imported = root / "imported"
    convert.check(config, imported)
    imported.mkdir()
    convert.run(config, imported)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, size=(17, 32, 48, 3), dtype=np.uint8)
    records.write_clips(root / "clips", [clip("a", transforms.encode_video(pictures, 8.0), 17)])
    config = encode_config.get_config("tiny")
    config.update({"records": str(root / "clips"), "vae": str(imported), "max_text_tokens": 6})
    config.update({"num_frames": 17, "height": 32, "width": 48})
    config.text_encoder.source = str(imported)
    config.vocabulary = str(imported / "tokenizer" / "spiece.model")
    workdir = root / "run" / "encode"
    encode.check(config, workdir)
    workdir.mkdir(parents=True)
    encode.run(config, workdir)
    (workdir / "config.json").write_text(config.to_json_best_effort())
    return root / "clips", imported, workdir


def test_the_imported_vae_s_scale_and_chunks_are_used(encoded):
    clips, imported, workdir = encoded
    stats = json.loads((workdir / "stats.json").read_text())
    assert stats == {"scaling_factor": 1.15258426, "chunk_frames": 8}
    pipeline = Pipeline.load(imported)
    frames = transforms.decode(records.read(clips, "clips")[0]["video"])
    mean, _ = vae.encode(pipeline.vae, pipeline.vae_params, transforms.normalize(frames)[None], chunk=8)
    whole, _ = vae.encode(pipeline.vae, pipeline.vae_params, transforms.normalize(frames)[None], chunk=None)
    record = records.read(workdir / "records", "latents")[0]
    np.testing.assert_allclose(record["mean"], mean[0], atol=1e-4)
    assert np.abs(record["mean"] - whole[0]).max() > 1e-2
    np.testing.assert_allclose(record["context"], pipeline.encode_text([record["caption"]])[0], atol=1e-4)
    assert not (workdir / "text_encoder").exists()


def test_a_run_on_imported_networks_is_found_whole(encoded, monkeypatch):
    _, imported, workdir = encoded
    stage = workdir.parent / "diffusion"
    stage.mkdir()
    fields = find_network("transformer", imported).piece["model"]
    rule = {"position_rule": "integer", "position_base": [30, 45]}
    config = {"task": "train_diffusion", "model": fields, "snr_shift_scale": 1.0, **rule}
    (stage / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("cogvideox_jax.train.checkpoint.newest_item", lambda folder, item: imported / "transformer")
    parts = locate(workdir.parent)
    assert parts.trees == {kind: imported / kind for kind in ("transformer", "vae", "text_encoder")}
    assert parts.pieces["vae"]["scaling_factor"] == 1.15258426
    assert (parts.settings.chunk_frames, parts.settings.unconditional) == (8, "zeros")
