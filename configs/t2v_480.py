"""Text to video, second stage: 480x720, up to 6 seconds (paper section 3; spec 4.7).

    python -m cogvideox_jax.main --config=configs/encode.py --config.num_frames=49 --config.height=480 --config.width=720 \\
        --config.records=RUN/prepare/records --config.vae=RUN/vae --workdir=RUN/encode
    python -m cogvideox_jax.main --config=configs/t2v_480.py:variant=5b --config.encoded=RUN/encode --workdir=RUN/diffusion

What comes out, in the workdir: checkpoints/ (params, ema, opt_state), metrics.jsonl. What it costs on a TPU, before it runs:
`--config=configs/plan.py:stage=t2v_480,variant=5b,tpu=v5p-128`. All that is not said here is as in configs/t2v_256.py.
"""

import ml_collections

from configs import t2v_256
from configs.common import parse_arg

SIZE = {"num_frames": 49, "height": 480, "width": 720}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(arg, variant="5b")
    config = t2v_256.get_config(f"variant={args.variant}")
    config.batch_size = 1000
    config.num_steps = 220_000
    # 17,776 tokens fit a chip whole: no sequence axis is the fastest (docs/plan.md)
    config.mesh = {"data": -1, "fsdp": 64, "sequence": 1, "simulated_devices": 0}
    return config
