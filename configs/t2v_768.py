"""Text to video, third stage: 768x1360, up to 10 seconds; CogVideoX 1.5's native size (paper section 3; spec 4.7).

    python -m cogvideox_jax.main --config=configs/encode.py --config.num_frames=81 --config.height=768 --config.width=1360 \\
        --config.records=RUN/prepare/records --config.vae=RUN/vae --workdir=RUN/encode
    python -m cogvideox_jax.main --config=configs/t2v_768.py:variant=1.5-5b --config.encoded=RUN/encode --workdir=RUN/diffusion

What comes out, in the workdir: checkpoints/ (params, ema, opt_state), metrics.jsonl. 81 frames are 45,104 tokens; 161 frames,
ten seconds at 16 a second, are 85,904. What it costs on a TPU, before it runs:
`--config=configs/plan.py:stage=t2v_768,variant=1.5-5b,num_frames=161,tpu=v5p-128`. The paper's fourth stage is this one with
`--config.num_steps=10000 --config.batch_size=100` on the best fifth of the data. All that is not said here is as in
configs/t2v_256.py.
"""

import ml_collections

from configs import t2v_256
from configs.common import parse_arg

SIZE = {"num_frames": 81, "height": 768, "width": 1360}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(arg, variant="1.5-5b")
    config = t2v_256.get_config(f"variant={args.variant}")
    config.batch_size = 256  # the paper's 250 does not divide over a pod
    config.num_steps = 120_000
    config.mesh = {"data": -1, "fsdp": 16, "sequence": 4, "simulated_devices": 0}
    return config
