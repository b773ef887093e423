"""HetLoRA: means weighted by the norms of products, and clients that prune their rank."""

import functools

import jax
import jax.numpy as jnp

from fedlora_jax import aggregation, bounds
from fedlora_jax.aggregation._hetlora import Per, pruned_rank
from fedlora_jax.methods._base import (
    READS_EACH_CLIENT,
    Context,
    Method,
    Server,
    Start,
    Trainable,
    Trained,
    averaging,
    stacked_layers,
)
from fedlora_jax.names import check_choices


def hetlora(*, per: Per = "client", pruning: float = 1e-3, decay: float = 0.99) -> Method:
    r"""Clients start from means in which a client counts by how far it has moved.

    A client of rank :math:`r_k` starts from the first :math:`r_k` columns and adds to its loss

    .. math::
      \lambda \sum \lVert a_{[:, t:]} \rVert \lVert b_{[t:, :]} \rVert, \qquad
      t = \lfloor \gamma r_k \rfloor .

    If that tail is smaller after training than it was before, the client goes on with rank t from
    its next round. A rank of 1 stays. The penalty is what puts directions in order, so that their
    basis is not free.

    Args:
      per: As in `aggregation.hetlora`.
      pruning: lambda; 0 for no pruning.
      decay: gamma.

    References:
      Cho et al., *Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models*,
      EMNLP 2024, arXiv:2401.06432.
    """
    check_choices(aggregation.hetlora, per=per)
    bounds.check("hetlora", pruning=pruning, decay=decay)
    method = averaging(
        lambda stacked, weights, server: aggregation.hetlora(stacked, weights, per=per),
        refuses={
            "privacy": READS_EACH_CLIENT,
            "robust_entries": READS_EACH_CLIENT,
            "robust_weights": "in it a client counts by the norm of its product",
        },
    )
    if not pruning:
        return method

    def init(key: jax.Array, server: Server) -> tuple[Server, jax.Array]:
        """A client's state is the rank that its pruning has left."""
        return server, jnp.int32(_largest(server))

    def start(server: Server, client: jax.Array, context: Context) -> Start:
        return Start(server.trainable, rank=jnp.minimum(client, context.rank))

    def tail(start: Start, trainable: Trainable) -> jax.Array:
        rank = _rank(start)
        one = functools.partial(aggregation.tail_penalty, rank=rank, decay=decay)
        kinds = stacked_layers(trainable.adapters).values()
        size = sum(jnp.sum(jax.vmap(one)(layers)) for (layers,) in kinds)
        return jnp.where(rank > 1, size, 0.0)

    def finish(
        server: Server, client: jax.Array, start: Start, trained: Trained
    ) -> tuple[Trainable, jax.Array]:
        shrunk = tail(start, trained.trainable) < tail(start, start.trainable)
        smaller = pruned_rank(_rank(start), _largest(server), decay)
        return trained.trainable, jnp.where(shrunk, smaller, _rank(start))

    return method._replace(
        init=init,
        start=start,
        finish=finish,
        penalty=lambda server, client, start, trainable: pruning * tail(start, trainable),
    )


def _largest(server: Server) -> int:
    return max(factors.rank for factors in server.trainable.adapters.values())


def _rank(start: Start) -> jax.Array:
    assert start.rank is not None
    return start.rank
