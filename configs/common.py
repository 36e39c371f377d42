"""The argument after a config file's colon."""

import ml_collections


def parse_arg(arg: str, **defaults: bool | int | float | str) -> ml_collections.ConfigDict:
    """Parses `--config=FILE.py:ARG`: "tiny" or "key=value,key=value", each value of its default's type.

    parse_arg("tiny,steps=5", tiny=False, steps=100) -> {tiny: True, steps: 5}. A key alone is a flag set. An unknown
    key, a key without a value, or a value of the wrong type raises ValueError, which names what is known.
    """
    result = ml_collections.ConfigDict(defaults)
    for item in filter(None, (item.strip() for item in (arg or "").split(","))):
        key, equals, text = item.partition("=")
        if key not in defaults:
            raise ValueError(f"unknown config argument {key!r}: known are {', '.join(defaults) or 'none'}")
        default = defaults[key]
        try:
            if isinstance(default, bool):
                result[key] = (
                    True if not equals else {"true": True, "1": True, "false": False, "0": False}[text.lower()]
                )
            elif not equals:
                raise ValueError("no value")
            else:
                result[key] = type(default)(text)
        except (ValueError, KeyError):
            kind = type(default).__name__
            raise ValueError(f"config argument {item!r}: {key} takes a value of type {kind}") from None
    return result
