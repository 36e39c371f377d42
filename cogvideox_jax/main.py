"""The one command: `python -m cogvideox_jax.main --config=configs/NAME.py[:args] --workdir=DIR [--config.key=value]`.

The config names its task; the workdir belongs to that config for ever after. A finished task is not run again.
Exit codes: 0 done, 2 wrong input (one line says what to change), 1 anything else.
"""

import difflib
import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from logging import WARNING, Formatter
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.train.workdir import check_owner, claim, write_json

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file of one stage; arguments after a colon.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder where this stage lives.")

EXIT_INPUT = 2


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with what it raises turned into one line."""
    try:
        flags.mark_flags_as_required(["config", "workdir"])
        rest = flags.FLAGS(argv)
        CONFIG.value.task  # noqa: B018 (a config that could not be loaded says so on its first use)
        return rest
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname.split(".")[0], ["config", "workdir"], 1)
        hint = f", did you mean --{near[0]}?" if near else ""
        message = f"unknown flag --{error.flagname}{hint}"
    except flags.Error as error:
        message = str(error)
    except OSError as error:
        message = f"--config cannot be loaded: {str(error).strip().splitlines()[-1]}"
    except (AttributeError, KeyError) as error:
        # config_flags raises these for a key that the config does not have
        message = f"unknown config key: {error.args[0] if error.args else error}"
    except (ValueError, TypeError) as error:
        message = str(error)
    _fail(message)
    raise AssertionError


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(EXIT_INPUT)


def peak_memory_mb() -> int:
    """Largest resident memory of this process or of one of its children so far."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024


def _processes() -> tuple[bool, Callable[[str], None]]:
    """Whether this process is the first of those that work as one, and how to wait for all; a task's check has joined them."""
    from cogvideox_jax.parallel import mesh  # here: a wrong flag should not wait for jax

    return mesh.is_first(), mesh.wait_for_all


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}: options look like --config.key=value")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    # libraries speak only when something is wrong: a checkpoint alone is forty of their lines
    ours = str(Path(__file__).parents[1])
    logging.get_absl_handler().addFilter(
        lambda record: (
            record.levelno >= WARNING or (record.pathname.startswith(ours) and ".venv" not in record.pathname)
        )
    )
    config, workdir = CONFIG.value, Path(str(WORKDIR.value))
    stored = json.loads(config.to_json_best_effort())
    name = f"{config.task} in {workdir}"
    done = workdir / "done.json"
    try:
        check_owner(workdir, stored)
        if done.exists():
            logging.info("%s: already done", name)
            return
        task = importlib.import_module(f"cogvideox_jax.tasks.{config.task}")
        # checked before the workdir is touched, so that a refusal leaves nothing behind
        task.check(config, workdir)
        first, wait = _processes()
        lock = claim(workdir, stored) if first else None
        wait("claimed")
        started = time.monotonic()
        results = task.run(config, workdir)
        seconds = round(time.monotonic() - started, 1)
        if lock:
            write_json(done, {"seconds": seconds, "peak_memory_mb": peak_memory_mb(), "results": results})
            lock.close()
        wait("done")
        logging.info("%s: done in %s s", name, seconds)
    except InputError as error:
        _fail(str(error))


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
