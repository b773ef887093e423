"""HetLoRA: means weighted by the norms of the clients' products."""

from typing import Any

from fedlora_jax import aggregation
from fedlora_jax.methods._base import Method, averaging


def hetlora(**hyperparameters: Any) -> Method:
    """Clients start from means in which a client counts by how far it has moved.

    Args:
      **hyperparameters: Of `aggregation.hetlora`.

    References:
      Cho et al., *Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models*,
      EMNLP 2024, arXiv:2401.06432.
    """
    return averaging(
        lambda stacked, weights, server: aggregation.hetlora(stacked, weights, **hyperparameters)
    )
