"""FedSA-LoRA: `a` is shared, `b` and the head stay with the client."""

import jax

from fedlora_jax.aggregation import Aggregated
from fedlora_jax.lora import Adapters
from fedlora_jax.lowrank import Factors
from fedlora_jax.methods._base import (
    Context,
    Method,
    Server,
    Start,
    Trainable,
    Trained,
    mean,
    sides,
)


def fedsa_lora() -> Method:
    """Clients train both factors, send `a`, and go on from the mean `a` and their own `b`.

    There is no one global model: each client is judged by its own.

    References:
      Guo et al., *Selective Aggregation for Low-Rank Adaptation in Federated Learning*, ICLR 2025,
      arXiv:2410.01463.
    """

    def init(key: jax.Array, server: Server) -> tuple[Server, Trainable]:
        return server, server.trainable

    def own(server: Server, client: Trainable) -> Trainable:
        adapters = _joined(server.trainable.adapters, client.adapters)
        return Trainable(adapters, client.head)

    def start(server: Server, client: Trainable, context: Context) -> Start:
        return Start(own(server, client))

    def finish(
        server: Server, client: Trainable, start: Start, trained: Trained
    ) -> tuple[Adapters, Trainable]:
        return trained.trainable.adapters, trained.trainable

    def aggregate(
        server: Server, uploads: Adapters, weights: jax.Array
    ) -> tuple[Server, Aggregated | None]:
        adapters = {
            path: factors._replace(a=mean(uploads[path].a, weights))
            for path, factors in server.trainable.adapters.items()
        }
        return server._replace(trainable=server.trainable._replace(adapters=adapters)), None

    return Method(
        init,
        start,
        finish,
        aggregate,
        sent=lambda upload, round_index: sides(upload, "a"),
        received=lambda server, aggregated, round_index: sides(server.trainable.adapters, "a"),
        personal=own,
        shared=False,
        refuses={
            "scaffold": "b and the head stay with the client, no server has a control variate of "
            "them",
            **dict.fromkeys(
                ("robust_selection", "robust_weights"),
                "b stays with the client, no server knows its product",
            ),
            "server_step": "b stays with the client, no server knows a product",
            "privacy": "its clients keep b and the head and are judged by them; a guarantee for a "
            "alone would mislead",
        },
    )


def _joined(ours: Adapters, theirs: Adapters) -> Adapters:
    return {path: Factors(a=ours[path].a, b=theirs[path].b) for path in ours}
