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
    COMBINATIONS,
    Context,
    Method,
    Server,
    Start,
    Trainable,
    Trained,
    absorb,
    averaging,
    change,
    check_combination,
    mean,
    trained_mask,
)
from fedlora_jax.methods._central import central
from fedlora_jax.methods._fedex_lora import fedex_lora, oracle
from fedlora_jax.methods._fedit import fedit
from fedlora_jax.methods._fedrot_lora import fedrot_lora
from fedlora_jax.methods._fedsa_lora import fedsa_lora
from fedlora_jax.methods._fedsmooth_lora import fedsmooth_lora
from fedlora_jax.methods._fedsvd import fedsvd
from fedlora_jax.methods._ffa_lora import ffa_lora
from fedlora_jax.methods._flexlora import flexlora
from fedlora_jax.methods._flora import flora
from fedlora_jax.methods._flora_na import flora_na
from fedlora_jax.methods._frlora import frlora
from fedlora_jax.methods._hetlora import hetlora
from fedlora_jax.methods._local import local
from fedlora_jax.methods._lora_fair import lora_fair
from fedlora_jax.methods._random_basis_lora import random_basis_lora
from fedlora_jax.methods._rolora import rolora
from fedlora_jax.methods._spectral import spectral
from fedlora_jax.names import lookup

REGISTRY: dict[str, Callable[..., Method]] = {
    factory.__name__: factory
    for factory in (
        central,
        fedex_lora,
        fedit,
        fedrot_lora,
        fedsa_lora,
        fedsmooth_lora,
        fedsvd,
        ffa_lora,
        flexlora,
        flora,
        flora_na,
        frlora,
        hetlora,
        local,
        lora_fair,
        oracle,
        random_basis_lora,
        rolora,
        spectral,
    )
}


def get(name: str) -> Callable[..., Method]:
    """The factory of the method called `name`.

    Raises:
      ValueError: If there is none; it lists the names, the nearest one first.
    """
    return lookup(REGISTRY, name, "method")


def hyperparameters(name: str) -> dict[str, inspect.Parameter]:
    """The hyperparameters of a method, with their types and defaults.

    A factory that passes all it gets to the aggregation function of its name has the
    hyperparameters of that function.
    """
    parameters = inspect.signature(get(name)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        parameters = inspect.signature(aggregation.get(name)).parameters
    return {p.name: p for p in parameters.values() if p.kind is p.KEYWORD_ONLY}


def defaults(name: str) -> dict[str, Any]:
    """The defaults of the hyperparameters of a method."""
    return {name: parameter.default for name, parameter in hyperparameters(name).items()}


__all__ = [
    "COMBINATIONS",
    "REGISTRY",
    "Context",
    "Method",
    "Server",
    "Start",
    "Trainable",
    "Trained",
    "absorb",
    "averaging",
    "change",
    "check_combination",
    "defaults",
    "get",
    "hyperparameters",
    "mean",
    "trained_mask",
    "central",
    "fedex_lora",
    "fedit",
    "fedrot_lora",
    "fedsa_lora",
    "fedsmooth_lora",
    "fedsvd",
    "ffa_lora",
    "flexlora",
    "flora",
    "flora_na",
    "frlora",
    "hetlora",
    "local",
    "lora_fair",
    "oracle",
    "random_basis_lora",
    "rolora",
    "spectral",
]
