#!/usr/bin/env bash
# Solve the dependencies anew: requirements.txt from requirements.in, and one lock per extra of pyproject.toml on top of it.
# Needs uv. Usage: bash launch/lock.sh
set -euo pipefail
cd "$(dirname "$0")/.."
compile=(uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --custom-compile-command "bash launch/lock.sh")
"${compile[@]}" requirements.in --output-file requirements.txt
# peft and accelerate ask for torch: pip takes the one that launch/test.sh has installed before
for extra in data dev parity tpu; do
  "${compile[@]}" pyproject.toml --extra "$extra" --excludes <(echo torch) --constraint requirements.txt --output-file "launch/locks/$extra.txt"
done
