"""What the configurations share: their argument string, and the options of the methods."""

import difflib
from typing import Any

import ml_collections

from fedlora_jax import methods


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
    """Parses the part after the colon of `--config=configs/NAME.py:key=value,flag,...`.

    A value gets the type of its default; a key alone means True.

    Args:
      arg: The argument string, or None.
      **defaults: The keys there are.

    Raises:
      ValueError: On an unknown key (with the nearest one), or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            nearest = difflib.get_close_matches(key, defaults, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(
                f"unknown config argument {key!r}.{hint} Arguments: {', '.join(sorted(defaults))}"
            )
        kind = type(defaults[key])
        if kind is bool:
            if text.lower() not in ("", "true", "false", "1", "0"):
                raise ValueError(f"config argument {key!r}: expected a truth value, got {text!r}")
            values[key] = text.lower() in ("", "true", "1")
            continue
        try:
            values[key] = kind(text)
        except ValueError:
            raise ValueError(
                f"config argument {key!r}: expected a value of type {kind.__name__}, got {text!r}"
            ) from None
    return values


def method_options(rounds: int) -> ml_collections.ConfigDict:
    """The hyperparameters of every method with their defaults: `config.options.<method>.<name>`."""
    options = {name: methods.defaults(name) for name in sorted(methods.REGISTRY)}
    options["fedsmooth_lora"]["rounds"] = rounds
    # An option whose default is None takes any type.
    return ml_collections.ConfigDict(options, type_safe=False)
