"""What a stage will cost on a TPU, before it runs: the real training step, compiled for it on this machine, which needs no TPU.

    python -m cogvideox_jax.main --config=configs/plan.py:stage=t2v_480,variant=5b,tpu=v5p-128 --workdir=RUN/plan

What comes out, in the workdir: plan.json, and the compiled program (program.txt.gz); on the screen, a table. Needs the extra
`tpu` (launch/locks/tpu.txt); a network of 5B takes one to five minutes on two cores. All of it is predicted, by the compiler
and a model of the chip (cogvideox_jax/plan/cost.py); nothing is measured.

Arguments after the colon:
    stage        t2v_256, t2v_480, t2v_768, vae_256
    variant      of the transformer: configs/models.py
    tpu          v4-N, v5e-N, v5p-N, v6e-N, tpu7x-N; x2 behind it: two slices
    mesh         DATAxFSDPxSEQUENCE, such as 1x16x4; without it, the stage's sequence axis and as much fsdp as divides the width
    num_frames, height, width    another size than the stage's
    program      train; or encode, decode: of the VAE without training
    search       try meshes, samples a device and remat policies, and rank them (one compilation each)
    tiny         the small network that the tests train
Every key of the stage's own config is under --config.train: `--config.train.remat=everything`, `--config.train.accumulate=2`.
"""

import ml_collections

from configs import models, t2v_256, t2v_480, t2v_768, vae_256
from configs.common import parse_arg

TRANSFORMERS = {"t2v_256": t2v_256, "t2v_480": t2v_480, "t2v_768": t2v_768}
STAGES = (*TRANSFORMERS, "vae_256")
PROGRAMS = ("train", "encode", "decode")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(
        arg,
        tiny=False,
        stage="t2v_480",
        variant="",
        tpu="v5p-128",
        mesh="",
        num_frames=0,
        height=0,
        width=0,
        program="train",
        search=False,
    )
    for name, value, known in (
        ("stage", args.stage, STAGES),
        ("program", args.program, PROGRAMS),
        ("variant", args.variant, ("", *models.TRANSFORMERS)),
    ):
        if value not in known:
            raise ValueError(f"config argument {name}={value}: known are {', '.join(filter(None, known))}")
    if args.program != "train" and args.stage in TRANSFORMERS:
        raise ValueError(f"config argument program={args.program} is for the stage vae_256")
    wanted = {name: args[name] for name in ("num_frames", "height", "width") if args[name]}

    config = ml_collections.ConfigDict()
    config.task = "plan"
    config.tpu = args.tpu
    config.program = args.program
    if args.stage in TRANSFORMERS:
        stage = t2v_256 if args.tiny else TRANSFORMERS[args.stage]
        train = stage.get_config("tiny" if args.tiny else f"variant={args.variant}" if args.variant else "")
        size = {"num_frames": 9, "height": 64, "width": 64} if args.tiny else stage.SIZE
        config.size = size | wanted  # of the videos; a diffusion stage itself takes what was encoded
    else:
        train = vae_256.get_config("tiny" if args.tiny else "")
        train.update(wanted)
    config.train = train
    mesh = (args.mesh or f"-1x-1x{train.mesh.sequence}").split("x")
    try:
        data, fsdp, sequence = (int(size) for size in mesh)
    except ValueError:
        raise ValueError(f"config argument mesh={args.mesh}: write DATAxFSDPxSEQUENCE, such as 1x16x4") from None
    config.train.mesh = {"data": data, "fsdp": fsdp, "sequence": sequence, "simulated_devices": 0}
    # samples that a group of devices (one along data x fsdp) works on at a time, where the stage's batch is for another machine
    config.samples_per_group = 1
    config.flags = "default"  # of cogvideox_jax/parallel/flags.py; "compiler" for none
    config.price_per_chip_hour = 0.0  # in any currency; 0 leaves the money out
    config.search = args.search
    return config
