"""What the parity tests share: random weights that hide nothing, and the measure of agreement."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from cogvideox_jax.models.convert import folder, table

BOUND = 1e-4  # largest difference, in units of the output's rms


def randomise(module: Any, seed: int) -> None:
    """Every parameter and stored buffer random: no norm is the identity, no bias and no gate is zero."""
    rng = np.random.default_rng(seed)
    for name, tensor in module.state_dict().items():
        shape = tuple(tensor.shape)
        values = rng.normal(size=shape)
        if len(shape) > 1:
            values /= max(np.prod(shape[1:]), 1) ** 0.5
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.3 * values
        else:
            values *= 0.3
        tensor.copy_(tensor.new_tensor(values.astype(np.float32)))


def params_of(kind: str, fields: dict[str, Any], module: Any) -> Any:
    """A module's weights through our name table."""
    network = folder.NETWORKS[kind]
    tensors = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    if kind == "text_encoder":  # the same tensor under a second name, which files do not hold
        tensors.pop("encoder.embed_tokens.weight", None)
    return jax.tree.map(
        jax.numpy.asarray, table.to_params(network.entries(fields), tensors, network.shapes(fields), source="module")
    )


def named(kind: str, fields: dict[str, Any], params: Any) -> dict[str, np.ndarray]:
    """Our tree (parameters, gradients) under their names and in their layout: `params_of` backwards."""
    return dict(table.to_tensors(folder.NETWORKS[kind].entries(fields), params))


def config_of(module: Any) -> dict[str, Any]:
    """A diffusers module's config as its config.json has it."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in module.config.items() if name[0] != "_"} | {
        "_class_name": type(module).__name__
    }


def error(got: Any, expected: Any) -> float:
    """Largest difference in units of the expected output's rms."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    rms = np.sqrt(np.mean(expected**2))
    assert rms > 1e-2, "an output near zero shows nothing"
    return float(np.abs(got - expected).max() / rms)


@contextlib.contextmanager
def float64(torch: Any, module: Any) -> Iterator[Any]:
    """A copy of the module that computes in float64, where the reference asks for float32 (`x.float()`) too.

    What float32 itself costs is `error(module(x), copy(x.double()))`: the floor below which nothing can be asked of us.
    """
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), torch.no_grad():
        yield copy.deepcopy(module).double()


def close(got: Any, expected: Any, what: str, *, exact: Any = None) -> None:
    """At most BOUND; printed, so that `pytest -rP` reports the figures.

    Args:
      got, expected: ours and theirs.
      what: how the printed line starts.
      exact: theirs in float64; the reference's own distance from it is printed as the floor.
    """
    found = error(got, expected)
    floor = "" if exact is None else f", floor {error(expected, exact):.1e}"
    print(f"{what}: {found:.1e}{floor} of the rms")
    assert found <= BOUND, f"{what}: {found:.2e} of the rms"


def worst(got: dict[str, Any], expected: dict[str, Any], *, least: float = 1e-2) -> tuple[float, str]:
    """The largest difference over named tensors, each in units of its own rms, and the tensor that has it.

    A tensor whose rms is below `least` of that of all of them together is measured in this share. There are such gradients:
    the bias of the 2B model's key norm adds the same to all logits of a query, which the softmax forgets, so its true gradient
    is zero and each side holds its own rounding. Nothing else comes near: the next smallest are at three hundredths.
    """
    assert got.keys() == expected.keys()
    wide = {name: np.asarray(value, np.float64) for name, value in expected.items()}
    together = np.sqrt(np.mean(np.concatenate([value.ravel() for value in wide.values()]) ** 2))
    found = {}
    for name, value in wide.items():
        assert got[name].shape == value.shape, name
        assert np.isfinite(got[name]).all(), name
        rms = max(np.sqrt(np.mean(value**2)), least * together)
        found[name] = float(np.abs(np.asarray(got[name], np.float64) - value).max() / rms)
    name = max(found, key=found.__getitem__)
    return found[name], name
