"""FedEx-LoRA: means, and what their product misses goes into the backbone."""

from typing import Any

from fedlora_jax import aggregation, bounds
from fedlora_jax.methods._base import READS_EACH_CLIENT, Method, averaging


def fedex_lora(**hyperparameters: Any) -> Method:
    """Clients start from the means; the backbone absorbs the residual, so that the mean is exact.

    Args:
      **hyperparameters: Of `aggregation.fedex_lora`.

    References:
      Singhal et al., *FedEx-LoRA*, ACL 2025, arXiv:2410.09432.
    """
    bounds.check("fedex_lora", **hyperparameters)
    return averaging(
        lambda stacked, weights, server: aggregation.fedex_lora(
            stacked, weights, **hyperparameters
        ),
        refuses={
            "unequal_ranks": "its residual is defined for clients of one rank; flora is exact for "
            "any ranks",
            "server_optimizer": "its residual makes the plain means exact, and no others",
            "privacy": READS_EACH_CLIENT,
            "robust_entries": READS_EACH_CLIENT,
        },
    )


def oracle() -> Method:
    """A reference arm: FedEx-LoRA with all of its residual, whatever that costs to send."""
    return fedex_lora()
