"""The one exception for what a person can put right: a bad path, key, size or file."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, expected and got, what to change.

    `cogvideox_jax.main` prints it without a traceback and leaves with exit code 2.
    """
