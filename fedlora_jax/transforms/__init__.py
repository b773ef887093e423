"""From a federated method to another: what combines with any method for which it makes sense.

Each function takes a `Method` and returns one, so that they chain:

    method = scaffold(server_optimizer(methods.fedit(), optax.sgd(1.0, 0.9)))

A combination that makes no sense raises ValueError with the reason, which the method gives
(`Method.refuses`).
"""

from fedlora_jax.transforms._fedprox import fedprox
from fedlora_jax.transforms._ordered import ordered
from fedlora_jax.transforms._privacy import epsilon, private
from fedlora_jax.transforms._robust import ROBUST_RULES, robust
from fedlora_jax.transforms._scaffold import scaffold
from fedlora_jax.transforms._server_optimizer import SERVER_OPTIMIZERS, server_optimizer
from fedlora_jax.transforms._server_step import server_step

__all__ = [
    "ROBUST_RULES",
    "SERVER_OPTIMIZERS",
    "epsilon",
    "fedprox",
    "ordered",
    "private",
    "robust",
    "scaffold",
    "server_optimizer",
    "server_step",
]
