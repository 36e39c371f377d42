"""One HTML page about a run whose stages lie side by side in the workdir (prepare, vae, encode, diffusion, generate, evaluate).

    python -m cogvideox_jax.main --config=configs/report.py --workdir=RUN

What comes out, in the workdir: report.html, samples.png, summary.json.
"""

import ml_collections

from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    parse_arg(arg, tiny=False)
    config = ml_collections.ConfigDict()
    config.task = "report"
    return config
