#!/usr/bin/env bash
# Passes the tests. Usage: bash launch/test.sh [all] [PYTEST_OPTION...]
# Without `all` the slower markers (parity, tpu, fault, slow) are left out.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
install launch/locks/data.txt launch/locks/dev.txt
markers=(-m "not (parity or tpu or fault or slow)")
if [ "${1:-}" = all ]; then
  markers=()
  shift
  .venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
  install launch/locks/parity.txt launch/locks/tpu.txt
fi
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --check --quiet .
.venv/bin/python -m pyright --level error
# a file stays in one process: its fixtures hold what took long to make
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "${markers[@]}" "$@"
