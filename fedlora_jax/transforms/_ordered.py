"""Clients of a smaller rank get the best of the server's adapters, not the first that lie there."""

import jax

from fedlora_jax import aggregation
from fedlora_jax.aggregation import Aggregated
from fedlora_jax.methods import Method, Server
from fedlora_jax.methods._base import PyTree


def ordered(method: Method) -> Method:
    """For unequal ranks: the server puts its adapters in order after each round.

    A client of rank q starts from the first q columns of the server's factors. Here these are the
    best approximation at rank q (`aggregation.ordered`), where the basis is free
    (`Method.free_basis`); the global model is the same. Any other method comes back as it is: its
    directions are in order already, or it holds something in its basis from round to round. So do
    SCAFFOLD and a server optimiser.

    A configuration with unequal `lora.ranks` has it; whoever calls `federated.round.create` with
    ranks applies it, last of all.

    Args:
      method: Any method.
    """
    if not method.free_basis:
        return method

    def aggregate(
        server: Server, uploads: PyTree, weights: jax.Array
    ) -> tuple[Server, Aggregated | None]:
        changed, aggregated = method.aggregate(server, uploads, weights)
        adapters = aggregation.ordered(changed.trainable.adapters)
        return changed._replace(trainable=changed.trainable._replace(adapters=adapters)), aggregated

    return method._replace(aggregate=aggregate)
