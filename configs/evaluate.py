"""How well a run learned: reconstruction PSNR, and whether each caption generates its own clip.

    python -m cogvideox_jax.main --config=configs/evaluate.py --config.records=RUN/prepare/records --config.pipeline=RUN \\
        --workdir=RUN/evaluate

What comes out, in the workdir: evaluation.json and three videos per clip (original, reconstruction, generated).
"""

import ml_collections

from configs.common import parse_arg
from configs.generate import sampling


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(arg, tiny=False)
    config = sampling(args.tiny)
    config.task = "evaluate"
    config.records = ""  # folder of clip records, written by prepare
    config.seed = 1  # not the seed of generation: a lucky noise would not count
    return config
