"""The reference libraries (extra `parity`), imported only when a parity test runs."""

import importlib
import warnings
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def libraries() -> SimpleNamespace:
    """torch, diffusers and transformers."""
    with warnings.catch_warnings():
        # their imports' deprecations are not ours to mend
        warnings.simplefilter("ignore")
        found = SimpleNamespace(
            **{name: importlib.import_module(name) for name in ("torch", "diffusers", "transformers")}
        )
        # both import their classes' files when a class is first asked for
        for name in ("CogVideoXPipeline", "CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX"):
            getattr(found.diffusers, name)
        for name in ("T5EncoderModel", "T5Tokenizer"):
            getattr(found.transformers, name)
    found.torch.manual_seed(0)
    return found


@pytest.fixture(autouse=True)
def _their_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
