#!/usr/bin/env bash
# The whole chain, from raw videos to generated ones, on this machine's CPU.
# Usage: bash launch/quickstart.sh [FOLDER_OF_VIDEOS [RUN_DIRECTORY]]
# Run it again after an interruption: finished stages are skipped, training goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
videos=${1:-data/samples}
run=${2:-runs/quickstart}
. launch/common.sh
install launch/locks/data.txt

stage() { # stage WORKDIR CONFIG [OPTION...]
  local workdir=$1 config=$2
  shift 2
  .venv/bin/python -m cogvideox_jax.main --config="configs/$config.py:tiny" --workdir="$workdir" "$@"
}

stage "$run/prepare" prepare --config.input="$videos"
stage "$run/vae" vae_256 --config.records="$run/prepare/records"
stage "$run/encode" encode --config.records="$run/prepare/records" --config.vae="$run/vae"
stage "$run/diffusion" t2v_256 --config.encoded="$run/encode"
stage "$run/generate" generate --config.pipeline="$run"
stage "$run/evaluate" evaluate --config.records="$run/prepare/records" --config.pipeline="$run"
stage "$run" report
stage "$run/export" convert --config.source="$run"

cat <<TXT

report       $run/report.html
videos       $run/generate/*.mp4 (all at once: $run/generate/contact_sheet.png)
checkpoints  $run/vae/checkpoints, $run/diffusion/checkpoints
diffusers    $run/export/diffusers (DiffusionPipeline.from_pretrained loads it)
summary      $run/summary.json
TXT
