"""FlexLoRA: the best adapter of rank r for the mean of the products."""

from typing import Any

import jax

from fedlora_jax import aggregation, bounds
from fedlora_jax.aggregation import Aggregated
from fedlora_jax.lora import Adapters
from fedlora_jax.methods._base import OTHER_BASIS, READS_EACH_CLIENT, Method, Server, averaging
from fedlora_jax.names import check_choices


def flexlora(**hyperparameters: Any) -> Method:
    """Clients start from the truncated SVD of the mean of their products.

    Args:
      **hyperparameters: Of `aggregation.flexlora`.

    References:
      Bai et al., *Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
      Client Resources*, NeurIPS 2024, arXiv:2402.11505.
    """
    check_choices(aggregation.flexlora, **hyperparameters)
    bounds.check("flexlora", **hyperparameters)

    def aggregate(stacked: Adapters, weights: jax.Array, server: Server) -> Aggregated:
        rank = hyperparameters.get("rank")
        for path, factors in server.trainable.adapters.items():
            if rank not in (None, factors.rank):
                raise ValueError(
                    f"flexlora: clients go on with the rank {factors.rank} of {path!r}; the option "
                    f"rank, here {rank}, is for a single aggregation: leave it out"
                )
        return aggregation.flexlora(stacked, weights, **hyperparameters)

    return averaging(
        aggregate,
        refuses={
            "scaffold": OTHER_BASIS,
            "server_optimizer": OTHER_BASIS,
            "privacy": READS_EACH_CLIENT,
            "robust_entries": READS_EACH_CLIENT,
        },
    )
