"""VAE, first stage: 17 frames of 256x256 from clip records (paper section 2.1).

    python -m cogvideox_jax.main --config=configs/vae_256.py --config.records=RUN/prepare/records --workdir=RUN/vae

What comes out, in the workdir: checkpoints/ (params, ema, opt_state), metrics.jsonl.
The full-size network needs an accelerator. `:tiny` is the same network with few channels on 9 frames of 64x64: on two CPU
cores it reaches more than 20 dB on ten clips in about five minutes.
"""

import ml_collections

from configs import models
from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(arg, tiny=False)
    config = ml_collections.ConfigDict()
    config.task = "train_vae"
    config.records = ""  # folder of clip records, written by prepare
    config.model = models.VAES["tiny" if args.tiny else "cogvideox"]
    # of activations; parameters, moments, the norms' statistics and the loss are float32
    config.compute_dtype = "float32" if args.tiny else "bfloat16"
    config.remat = not args.tiny  # the backward pass computes each residual block again
    config.num_frames = 9 if args.tiny else 17  # 4k+1
    config.height = 64 if args.tiny else 256
    config.width = 64 if args.tiny else 256
    config.batch_size = 1 if args.tiny else 64  # clips, over all devices
    config.num_steps = 1200 if args.tiny else 200_000
    config.kl_weight = 1e-6
    config.ema_decay = 0.99 if args.tiny else 0.9999
    config.optimizer = {
        "learning_rate": 1.2e-3 if args.tiny else 1e-4,
        "warmup_steps": 50 if args.tiny else 1000,
        "final_fraction": 0.05,  # of the learning rate, at the end of the cosine
        "weight_decay": 1e-4,
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "clip_norm": 1.0,
        "moment_dtype": "float32",  # of AdamW's moments in memory; bfloat16 saves a quarter of the state
    }
    config.seed = 0
    # sizes of the mesh axes; data=-1 takes the devices that are left; simulated_devices > 0 splits a CPU
    config.mesh = {"data": -1, "fsdp": 1, "sequence": 1, "simulated_devices": 0}
    config.log_steps = 10 if args.tiny else 50
    config.checkpoint_steps = 100 if args.tiny else 1000
    config.keep_checkpoints = 2
    return config
