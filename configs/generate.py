"""Prompts -> videos.

    python -m cogvideox_jax.main --config=configs/generate.py --config.pipeline=MODEL --config.prompts=PROMPTS.txt \\
        --workdir=RUN/generate

MODEL is a run (its folders vae, encode and diffusion side by side), what configs/convert.py made of a public model, or a
diffusers folder. PROMPTS.txt holds a prompt a line, for image-to-video models PROMPT@@IMAGE; without it every caption of the
run's records is a prompt. What comes out, in the workdir: NNN.mp4, videos.json, contact_sheet.png. `:tiny` takes under a minute
on two CPU cores. The same in Python: cogvideox_jax/pipeline.py.
"""

import ml_collections

from configs.common import parse_arg


def sampling(tiny: bool) -> ml_collections.ConfigDict:
    """What generation and evaluation share."""
    config = ml_collections.ConfigDict()
    config.pipeline = ""  # a run, an imported model or a diffusers folder
    config.weights = "ema"  # of a run; or params
    config.prompts = ""  # text file, one prompt a line
    config.num_frames = 9 if tiny else 49
    config.height = 64 if tiny else 256
    config.width = 64 if tiny else 384
    config.fps = 16.0 if tiny else 8.0
    config.compute_dtype = "float32" if tiny else "bfloat16"
    # "auto" is what the model was made with (cogvideox_jax/pipeline.py, Settings)
    config.sampler = "auto"  # or ddim, dpm, dpm_ode
    config.position_rule = "auto"  # or integer, linspace
    config.unconditional = "auto"  # or zeros; or prompt, which encodes negative_prompt
    config.image_latent_scale = "auto"  # or multiply, divide, none
    config.negative_prompt = ""
    config.num_inference_steps = 50
    config.guidance_scale = 2.0 if tiny else 6.0
    config.dynamic_guidance = "none"  # or reference, ramp
    config.chunk_latents = -1  # latent frames decoded at a time; 0: the whole clip; -1: as the model was made
    config.tiling = False  # decode in tiles: less memory, other numbers
    config.batch_size = 10 if tiny else 1
    config.mesh = {"data": -1, "fsdp": 1, "sequence": 1, "simulated_devices": 0}
    return config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(arg, tiny=False)
    config = sampling(args.tiny)
    config.task = "generate"
    config.seed = 0
    return config
