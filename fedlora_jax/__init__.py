"""Federated fine-tuning with LoRA in JAX.

`fedlora_jax.aggregation` and `fedlora_jax.lowrank` need nothing but jax and chex; everything else
is imported on first use.
"""

import importlib
from typing import TYPE_CHECKING

from fedlora_jax import aggregation
from fedlora_jax.lowrank import Factors

if TYPE_CHECKING:
    import fedlora_jax.lora as lora

__all__ = ["Factors", "aggregation", "lora"]


def __getattr__(name: str) -> object:
    if name == "lora":
        return importlib.import_module("fedlora_jax.lora")
    raise AttributeError(f"module 'fedlora_jax' has no attribute {name!r}")
