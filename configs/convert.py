"""Weights in and out: a public checkpoint -> this system's format, or what was trained here -> a diffusers folder.

    python -m cogvideox_jax.main --config=configs/convert.py --config.source=CogVideoX-2b --workdir=models/2b
    python -m cogvideox_jax.main --config=configs/convert.py --config.source=RUN --workdir=RUN/export

The direction follows from what `source` is:
    a diffusers folder (model_index.json)    import: transformer/, vae/, text_encoder/ (Orbax), tokenizer/, model.json
    its transformer, vae or text_encoder     import of that one
    a t5x checkpoint (checkpoint_N)          import of the text encoder
    a run (its vae, encode and diffusion)    export: diffusers/, which diffusers' pipelines load
    a workdir that this task has filled      export, the same
Only .safetensors are read, never pickles: SAT's .pt files first go through launch/convert_sat.py. A tokenizer that is a
tokenizer.json alone, as transformers 5 saves it, gets the spiece.model that this system reads. One tensor is in memory at a
time: no accelerator is needed, and as long as the disk takes. A run that was interrupted, or that filled the disk, goes on
with the first network that is not there yet.
"""

import ml_collections

from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    parse_arg(arg, tiny=False)
    config = ml_collections.ConfigDict()
    config.task = "convert"
    config.source = ""
    config.dtype = "keep"  # or float32, bfloat16, float16: of every tensor written
    config.weights = "ema"  # or params: which of a run's weights are exported
    config.sampler = "ddim"  # or dpm: what an exported run's scheduler/ says
    config.max_shard_bytes = 10_000_000_000  # of one exported weight file, as diffusers has it
    return config
