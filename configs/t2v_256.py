"""Text to video, first stage: 256x384, up to 6 seconds (paper section 3).

    python -m cogvideox_jax.main --config=configs/t2v_256.py:variant=5b --config.encoded=RUN/encode --workdir=RUN/diffusion

What comes out, in the workdir: checkpoints/ (params, ema, opt_state), metrics.jsonl.
`:tiny` trains a small network of the same structure on eight simulated devices (data 2 x fsdp 2 x sequence 2); on two CPU
cores it learns ten clips by heart in about four minutes.
"""

import ml_collections

from configs import models
from configs.common import parse_arg

SIZE = {"num_frames": 49, "height": 256, "width": 384}  # that configs/encode.py has to be given, and that a plan is for


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(arg, tiny=False, variant="2b")
    variant = "tiny" if args.tiny else args.variant
    config = ml_collections.ConfigDict()
    config.task = "train_diffusion"
    config.encoded = ""  # workdir of encode
    config.model = models.TRANSFORMERS[variant]
    config.snr_shift_scale = models.SNR_SHIFT[variant]
    config.compute_dtype = "float32" if args.tiny else "bfloat16"  # parameters, moments and the loss are float32
    # what the backward pass computes again: "nothing"; "everything"; "attention", which is everything but the attention
    # itself; "offload" is "attention" with what is kept moved to the host's memory
    config.remat = "nothing" if args.tiny else "attention"
    # positions of tokens: "integer" counts, and so extrapolates at larger sizes; "linspace" fits them into position_base
    # (rows, columns of tokens), as diffusers does with the models of generation 1.0. Without effect on sin-cos models.
    config.position_rule = "integer"
    config.position_base = (30, 45)
    config.timestep_sampling = "explicit_uniform"  # or "uniform"
    config.text_dropout = 0.1
    config.batch_size = 16 if args.tiny else 2000  # samples, over all devices
    config.accumulate = 1  # parts of a batch that go through the network one after the other
    config.num_steps = 800 if args.tiny else 400_000
    config.ema_decay = 0.99 if args.tiny else 0.9999
    config.optimizer = {
        "learning_rate": 2e-3 if args.tiny else 1e-4,
        "warmup_steps": 50 if args.tiny else 1000,
        "final_fraction": 0.05,
        "weight_decay": 1e-4,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "clip_norm": 1.0,
        "moment_dtype": "float32",  # of AdamW's moments in memory; bfloat16 saves a quarter of the state
    }
    config.seed = 0
    # sizes of the mesh axes; data=-1 takes the devices that are left; simulated_devices > 0 splits a CPU
    tiny_mesh = {"data": 2, "fsdp": 2, "sequence": 2, "simulated_devices": 8}
    config.mesh = tiny_mesh if args.tiny else {"data": -1, "fsdp": 8, "sequence": 1, "simulated_devices": 0}
    config.log_steps = 10 if args.tiny else 50
    config.checkpoint_steps = 100 if args.tiny else 1000
    config.keep_checkpoints = 2
    return config
