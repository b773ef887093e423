"""SCAFFOLD: control variates against the drift of clients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedlora_jax.aggregation import Aggregated
from fedlora_jax.methods import (
    Context,
    Method,
    Server,
    Start,
    Trainable,
    Trained,
    check_combination,
    trained_mask,
)
from fedlora_jax.methods._base import ROBUST, PyTree
from fedlora_jax.transforms import _base


class _Client(NamedTuple):
    inner: PyTree
    control: Trainable


class _Upload(NamedTuple):
    inner: PyTree
    change: Trainable


def scaffold(method: Method) -> Method:
    r"""Corrects each local gradient by what a client's gradients differ from the average client's.

    A client k steps along :math:`g - c_k + c`, and then sets, of what it trained,

    .. math:: c_k \leftarrow \text{mean over its steps of } g

    It sends the change of :math:`c_k` beside its upload, and the server adds up the changes of the
    cohort, each by the client's share :math:`p_k` of the whole federation:

    .. math:: c \leftarrow c + \sum_{k \in S} p_k \Delta c_k

    so that :math:`c = \sum_k p_k c_k` over all N clients, whoever takes part. The paper has
    :math:`p_k = 1 / N`; as the models are averaged by examples, so are the control variates, or
    the clients would rest where their equal mean gradient is zero and not that of the loss. All
    control variates begin at zero. With plain SGD the mean gradient is the paper's option II,
    :math:`c_k - c + (\theta_{server} - \theta_k) / (\text{steps} \cdot \eta)`; said as a mean it
    serves any local optimiser. Gradients are as the optimiser sees them before its own clipping;
    factors that rest keep their control variates.

    Up and down: what the method sends and receives of trained factors and head, once more.

    Args:
      method: A method whose clients go on from averages of the same factors.

    Raises:
      ValueError: If the method's adapters do not keep their meaning from round to round.

    References:
      Karimireddy et al., *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*, ICML
      2020, arXiv:1910.06378, algorithm 1.
    """
    check_combination(method, "scaffold", "SCAFFOLD")

    def init(key: jax.Array, server: Server) -> tuple[Server, _Client]:
        server, client = method.init(key, server)
        zero = jax.tree.map(jnp.zeros_like, server.trainable)
        return _base.outer(server, zero), _Client(client, zero)

    def start(server: Server, client: _Client, context: Context) -> Start:
        return method.start(_base.inner(server), client.inner, context)

    def drift(server: Server, client: _Client) -> Trainable:
        return jax.tree.map(jnp.subtract, server.memory.own, client.control)

    def penalty(server: Server, client: _Client, start: Start, trainable: Trainable) -> jax.Array:
        """Linear, so that its gradient is the correction c - c_k."""
        terms = jax.tree.map(lambda x, y: jnp.sum(x * y), drift(server, client), trainable)
        linear = jax.tree.reduce(jnp.add, terms)
        if method.penalty is None:
            return linear
        return linear + method.penalty(_base.inner(server), client.inner, start, trainable)

    def finish(
        server: Server, client: _Client, start: Start, trained: Trained
    ) -> tuple[_Upload, _Client]:
        upload, kept = method.finish(_base.inner(server), client.inner, start, trained)
        control = jax.tree.map(
            lambda moves, g, d, old: jnp.where(moves, g - d, old),
            trained_mask(start),
            trained.gradient,
            drift(server, client),
            client.control,
        )
        change = jax.tree.map(jnp.subtract, control, client.control)
        return _Upload(upload, change), _Client(kept, control)

    def aggregate(
        server: Server, uploads: _Upload, weights: jax.Array
    ) -> tuple[Server, Aggregated | None]:
        def moved(control: jax.Array, changes: jax.Array) -> jax.Array:
            shares = weights.reshape(-1, *[1] * (changes.ndim - 1))
            return control + jnp.sum(jnp.where(shares > 0, shares * changes, 0), axis=0)

        control = jax.tree.map(moved, server.memory.own, uploads.change)
        changed, aggregated = method.aggregate(_base.inner(server), uploads.inner, weights)
        return _base.outer(changed, control), aggregated

    def received(server: Server, aggregated: Aggregated | None, round_index: int) -> PyTree:
        known = _base.inner(server)
        control = known._replace(trainable=server.memory.own)
        return (
            method.received(known, aggregated, round_index),
            method.received(control, None, round_index),
        )

    def outdated(server: Server, aggregated: Aggregated | None, round_index: int) -> PyTree:
        """Whatever of the server's factors has changed meanwhile, its control variate has too."""
        known = _base.inner(server)
        control = known._replace(trainable=server.memory.own)
        return (
            method.outdated(known, aggregated, round_index),
            method.outdated(control, None, round_index),
        )

    return _base.around(
        method,
        init=init,
        start=start,
        penalty=penalty,
        finish=finish,
        aggregate=aggregate,
        sent=lambda upload, round_index: (
            method.sent(upload.inner, round_index),
            method.sent(upload.change, round_index),
        ),
        received=received,
        outdated=outdated,
        free_basis=False,
        refuses={
            **method.refuses,
            "privacy": "its control variates would be sent unprotected",
            **dict.fromkeys(ROBUST, "its control variates would be averaged without the rule"),
        },
    )
