"""Prompts -> videos from a trained run.

    python -m cogvideox_jax.main --config=configs/generate.py --config.vae=RUN/vae --config.encoded=RUN/encode \\
        --config.diffusion=RUN/diffusion --config.prompts=PROMPTS.txt --workdir=RUN/generate

Without prompts, every caption of the encoded records is one. What comes out, in the workdir: NNN.mp4, videos.json,
contact_sheet.png. `:tiny` takes under a minute on two CPU cores.
"""

import ml_collections

from configs.common import parse_arg


def sampling(tiny: bool) -> ml_collections.ConfigDict:
    """What generation and evaluation share."""
    config = ml_collections.ConfigDict()
    config.vae = ""  # workdir of train_vae
    config.encoded = ""  # workdir of encode
    config.diffusion = ""  # workdir of train_diffusion
    config.prompts = ""  # text file, one prompt a line
    config.num_frames = 9 if tiny else 49
    config.height = 64 if tiny else 256
    config.width = 64 if tiny else 384
    config.fps = 16.0 if tiny else 8.0
    config.sampler = "ddim"  # or dpm, dpm_ode
    config.num_inference_steps = 50
    config.guidance_scale = 2.0 if tiny else 6.0
    config.dynamic_guidance = "none"  # or reference, ramp
    config.chunk_latents = 0 if tiny else 2  # latent frames decoded at a time; 0: the whole clip
    config.batch_size = 10 if tiny else 1
    config.mesh = {"data": -1, "fsdp": 1, "sequence": 1, "simulated_devices": 0}
    return config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(arg, tiny=False)
    config = sampling(args.tiny)
    config.task = "generate"
    config.seed = 0
    return config
