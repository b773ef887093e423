"""The lower reference: no communication."""

import jax

from fedlora_jax.aggregation import Aggregated
from fedlora_jax.methods._base import (
    ROBUST,
    Context,
    Method,
    PyTree,
    Server,
    Start,
    Trainable,
    Trained,
)


def local() -> Method:
    """Each client goes on from its own last state and is judged by its own model."""

    def init(key: jax.Array, server: Server) -> tuple[Server, Trainable]:
        return server, server.trainable

    def start(server: Server, client: Trainable, context: Context) -> Start:
        return Start(client)

    def finish(
        server: Server, client: Trainable, start: Start, trained: Trained
    ) -> tuple[tuple[()], Trainable]:
        return (), trained.trainable

    def aggregate(
        server: Server, uploads: PyTree, weights: jax.Array
    ) -> tuple[Server, Aggregated | None]:
        return server, None

    return Method(
        init,
        start,
        finish,
        aggregate,
        sent=lambda upload, round_index: (),
        received=lambda server, aggregated, round_index: (),
        personal=lambda server, client: client,
        shared=False,
        refuses={
            "fedprox": "no server model holds its clients together",
            "server_optimizer": "its server learns nothing",
            "server_step": "its server learns nothing",
            **dict.fromkeys(("scaffold", "privacy", *ROBUST), "its clients send nothing"),
        },
    )
