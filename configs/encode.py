"""Clip records -> latents and text embeddings, which the diffusion stages train on.

    python -m cogvideox_jax.main --config=configs/encode.py --config.records=RUN/prepare/records \\
        --config.vae=RUN/vae --workdir=RUN/encode

What comes out, in the workdir: records/ (posterior mean and log-variance, T5 embeddings of the caption), text_encoder/ (its
parameters), stats.json (scaling_factor). `:tiny` takes a few seconds.
"""

import ml_collections

from configs import models
from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(arg, tiny=False)
    config = ml_collections.ConfigDict()
    config.task = "encode"
    config.records = ""  # folder of clip records, written by prepare
    config.vae = ""  # workdir of train_vae, or a folder that configs/convert.py has filled
    config.vocabulary = "data/vocab/t5_spiece.model"
    config.max_text_tokens = 48 if args.tiny else 226
    # source: a folder that configs/convert.py has filled; without one, a T5 v1.1 encoder with random weights from the seed
    config.text_encoder = {"source": "", "model": models.T5["tiny" if args.tiny else "xxl"], "seed": 0}
    config.num_frames = 9 if args.tiny else 49
    config.height = 64 if args.tiny else 256
    config.width = 64 if args.tiny else 384
    # GroupNorm pools over a chunk, so this changes the numbers; 0 encodes whole clips, as a VAE is trained here;
    # -1: 8 with a public VAE, as its users do, else 0
    config.chunk_frames = -1
    config.mesh = {"data": -1, "fsdp": 1, "sequence": 1, "simulated_devices": 0}
    return config
