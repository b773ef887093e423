"""FlexLoRA: the best adapter of rank r for the mean of the products."""

from typing import Any

from fedlora_jax import aggregation, bounds
from fedlora_jax.methods._base import OTHER_BASIS, READS_EACH_CLIENT, Method, averaging


def flexlora(**hyperparameters: Any) -> Method:
    """Clients start from the truncated SVD of the mean of their products.

    Args:
      **hyperparameters: Of `aggregation.flexlora`.

    References:
      Bai et al., *Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
      Client Resources*, NeurIPS 2024, arXiv:2402.11505.
    """
    bounds.check("flexlora", **hyperparameters)
    return averaging(
        lambda stacked, weights, server: aggregation.flexlora(stacked, weights, **hyperparameters),
        refuses={
            "scaffold": OTHER_BASIS,
            "server_optimizer": OTHER_BASIS,
            "privacy": READS_EACH_CLIENT,
        },
    )
