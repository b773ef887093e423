"""FLoRA: the stacked adapters go into the backbone, and clients start afresh."""

import jax

from fedlora_jax import aggregation, lora
from fedlora_jax.methods._base import (
    READS_EACH_CLIENT,
    Context,
    Method,
    PyTree,
    Server,
    Start,
    averaging,
)


def flora() -> Method:
    """The exact mean of the products is merged each round; each client draws a new `a`, with b = 0.

    References:
      Wang et al., *FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
      Adaptations*, NeurIPS 2024, arXiv:2409.05976.
    """

    def start(server: Server, client: PyTree, context: Context) -> Start:
        fresh = lora.fresh(context.key, server.trainable.adapters)
        return Start(server.trainable._replace(adapters=fresh))

    method = averaging(
        lambda stacked, weights, server: aggregation.flora(stacked, weights),
        receives=lambda round_index: "",
        refuses={
            "fedprox": "its adapters are reset in every round, to a random start",
            "scaffold": "its adapters are reset in every round, to a random start",
            "server_optimizer": "its server merges the stacked adapters and returns no average",
            "privacy": READS_EACH_CLIENT,
            "robust_entries": READS_EACH_CLIENT,
        },
    )
    return method._replace(init=_without_adapters, start=start, stacked_residual=True)


def _without_adapters(key: jax.Array, server: Server) -> tuple[Server, tuple[()]]:
    zero = jax.tree.map(lambda x: x * 0, server.trainable.adapters)
    return server._replace(trainable=server.trainable._replace(adapters=zero)), ()
