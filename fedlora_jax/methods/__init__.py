"""Federated methods: who starts from what, trains what, sends what.

A `Method` is a NamedTuple of pure functions, as an optax `GradientTransformation` is. The factories
here close over hyperparameters: `methods.get("lora_fair")(steps=500)`. To add one, write one file
with a factory and name it in `REGISTRY`.
"""

import inspect
from collections.abc import Callable
from typing import Any

from fedlora_jax import aggregation
from fedlora_jax.methods._base import (
    Context,
    Method,
    Server,
    Start,
    Trainable,
    absorb,
    averaging,
    change,
    mean,
)
from fedlora_jax.methods._central import central
from fedlora_jax.methods._fedit import fedit
from fedlora_jax.methods._fedsmooth_lora import fedsmooth_lora
from fedlora_jax.methods._flora_na import flora_na
from fedlora_jax.methods._local import local
from fedlora_jax.methods._lora_fair import lora_fair
from fedlora_jax.names import lookup

REGISTRY: dict[str, Callable[..., Method]] = {
    factory.__name__: factory
    for factory in (central, fedit, fedsmooth_lora, flora_na, local, lora_fair)
}


def get(name: str) -> Callable[..., Method]:
    """The factory of the method called `name`.

    Raises:
      ValueError: If there is none; it lists the names, the nearest one first.
    """
    return lookup(REGISTRY, name, "method")


def defaults(name: str) -> dict[str, Any]:
    """The hyperparameters of a method and their defaults.

    A factory that passes all it gets to the aggregation function of its name has the
    hyperparameters of that function.
    """
    parameters = inspect.signature(get(name)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        parameters = inspect.signature(aggregation.get(name)).parameters
    return {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}


__all__ = [
    "REGISTRY",
    "Context",
    "Method",
    "Server",
    "Start",
    "Trainable",
    "absorb",
    "averaging",
    "change",
    "defaults",
    "get",
    "mean",
    *sorted(REGISTRY),
]
