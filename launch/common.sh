# Sourced by the launch scripts, from the repository's root: the environment in .venv, made once per lock.

# install LOCK...: make .venv if it is missing, and install each lock into it unless just that one is there already
install() {
  local python=${PYTHON:-python3} lock stamp wanted
  if [ ! -x .venv/bin/python ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "error: $python is $("$python" --version 2>&1), Python 3.11 or newer is needed: set PYTHON=/path/to/python3.11" >&2
      return 2
    }
    "$python" -m venv .venv || return 1
  fi
  for lock in "$@"; do
    stamp=.venv/$(basename "$lock").installed
    wanted=$(sha256sum < "$lock")
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
      echo "installing $lock into .venv" >&2
      .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement "$lock" || return 1
      echo "$wanted" > "$stamp"
    fi
  done
}

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# compiled programs are kept between runs
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}
# XLA on CPU takes and returns large buffers at each step: keep them, in large pages (a fifth of a VAE step otherwise)
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296}
