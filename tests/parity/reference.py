"""What the parity tests share: random weights that hide nothing, and the measure of agreement."""

from typing import Any

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


def close(got: Any, expected: Any, what: str) -> None:
    """At most BOUND; printed, so that `pytest -rP` reports the figures."""
    found = error(got, expected)
    print(f"{what}: {found:.2e} of the rms")
    assert found <= BOUND, f"{what}: {found:.2e} of the rms"
