"""Raw videos -> captioned clips of 4k+1 frames.

    python -m cogvideox_jax.main --config=configs/prepare.py --config.input=VIDEOS --workdir=runs/mine/clips

VIDEOS is a folder of .mp4, .mov, .mkv, .webm, .avi or .m4v files. Beside each lies its caption: NAME.txt (first line,
for the whole video) or NAME.json (a list of {"start": seconds, "end": seconds, "caption": text}).
Needs the extra `data`.

What comes out, in the workdir:
    records/      the clips, as array_record through tensorflow-datasets: what `train_vae` and `encode` read
    funnel.json   how many videos, shots and clips, and each rejected one with its reason

One CPU core; no accelerator. The default is CogVideoX's own shape (49 frames at 8 fps, 480 pixels high).
`:tiny` takes the clips of data/samples to ten clips of 9 frames, 96 pixels high, in about ten seconds.
"""

import ml_collections

from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(arg, tiny=False)
    config = ml_collections.ConfigDict()
    config.task = "prepare"
    config.input = "data/samples"  # folder of videos and their captions
    config.fps = 16.0 if args.tiny else 8.0  # of the clips
    config.num_frames = 9 if args.tiny else 49  # longest clip, 4k+1
    config.min_frames = 9 if args.tiny else 49  # shortest clip, 4k+1
    config.short_side = 96 if args.tiny else 480  # pixels
    config.max_clips_per_shot = 1 if args.tiny else 4
    config.trim_frames = 2  # source frames left out at both ends of a shot: a cut is found to a frame or two
    config.min_motion = 1.0  # mean grey level change from frame to frame; a text card has less, a talking head about 5
    config.crf = 17  # h264 quality, 0 (best) to 51
    return config
