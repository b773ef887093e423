"""One round of a federation as one jitted program."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fedlora_jax import aggregation
from fedlora_jax.data.clients import ClientData, local_batch
from fedlora_jax.federated import randomness
from fedlora_jax.federated.local import LocalTraining, train
from fedlora_jax.federated.task import Task
from fedlora_jax.methods import Context, Method, Server, Start, Trainable, change

PyTree: TypeAlias = Any


class Federation(NamedTuple):
    """The state of an experiment between rounds.

    Attributes:
      server: The server's state.
      clients: The clients' states, stacked along `[N]`; `()` for a method whose clients keep none.
    """

    server: Server
    clients: PyTree


class RoundMetrics(NamedTuple):
    """What a round measures, all on the device.

    Attributes:
      loss: Mean training loss of the cohort's clients that count, each by its weight, `[]`.
      client_loss: Mean training loss of each client of the cohort over its steps, `[K]`.
      aggregation_error: Relative distance of the server's update from the mean of the clients'
        updates (`aggregation.error`), `[]`; NaN if the method does not aggregate.
      excluded: Clients left out because something they sent was not finite, int32 `[]`.
    """

    loss: jax.Array
    client_loss: jax.Array
    aggregation_error: jax.Array
    excluded: jax.Array


RoundFunction: TypeAlias = Callable[
    [Federation, ClientData, jax.Array, jax.Array], tuple[Federation, RoundMetrics]
]


def create(key: jax.Array, method: Method, server: Server, num_clients: int) -> Federation:
    """The state before the first round, with the same initial state for each client."""
    server, client = method.init(key, server)
    clients = jax.tree.map(lambda x: jnp.repeat(x[None], num_clients, axis=0), client)
    return Federation(server, clients)


def make_round(
    task: Task, method: Method, training: LocalTraining, *, equal_weights: bool = False
) -> RoundFunction:
    """Builds the jitted round `(federation, data, cohort, seed) -> (federation, metrics)`.

    Clients of the cohort are trained under one `vmap` over one backbone. A client whose results
    are not all finite is left out: it has weight zero, and its state stays as it was. If none is
    left, the server's state stays too.

    Args:
      task: What is learned.
      method: How clients and server work together.
      training: How clients train.
      equal_weights: Weigh clients equally instead of by their number of examples.

    Returns:
      A function of the federation, the data, the identities of the cohort (int32 `[K]`, without
      repetition) and the seed's key. It compiles once for all rounds and seeds.
    """

    def of_client(
        server: Server, client: PyTree, data: ClientData, identity: jax.Array, seed: jax.Array
    ) -> tuple[Start, Trainable, PyTree, PyTree, jax.Array]:
        def key(name: str) -> jax.Array:
            return randomness.of_client(seed, name, server.round, identity)

        rows, count, batches = data.indices[identity], data.counts[identity], key("batches")

        def batch_of(step: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
            chosen, mask = local_batch(rows, count, batches, step, training.batch_size)
            return {name: values[chosen] for name, values in data.examples.items()}, mask

        start = method.start(server, client, Context(key("start")))
        trained, losses = train(
            task, training, server.backbone, server.scale, start, batch_of, server.round
        )
        upload, client = method.finish(server, client, start, trained)
        return start, trained, upload, client, jnp.mean(losses)

    @jax.jit
    def round_function(
        federation: Federation, data: ClientData, cohort: jax.Array, seed: jax.Array
    ) -> tuple[Federation, RoundMetrics]:
        server, clients = federation
        before = jax.tree.map(lambda x: x[cohort], clients)
        start, trained, uploads, after, losses = jax.vmap(
            of_client, in_axes=(None, 0, None, 0, None)
        )(server, before, data, cohort, seed)

        finite = _all_finite((trained, uploads, after))
        weights = jnp.ones(len(cohort)) if equal_weights else data.counts[cohort]
        weights = jnp.where(finite, weights.astype(jnp.float32), 0)
        somebody = jnp.any(finite)
        changed, aggregated = method.aggregate(server, uploads, weights)
        server = _select(somebody, changed, server)._replace(round=server.round + 1)
        kept = jax.tree.map(
            lambda new, old: jnp.where(finite.reshape(-1, *[1] * (new.ndim - 1)), new, old),
            after,
            before,
        )
        clients = jax.tree.map(lambda all_, new: all_.at[cohort].set(new), clients, kept)

        total = jnp.maximum(jnp.sum(weights), 1e-30)
        metrics = RoundMetrics(
            loss=jnp.sum(jnp.where(weights > 0, losses, 0) * weights) / total,
            client_loss=losses,
            aggregation_error=jnp.asarray(jnp.nan)
            if aggregated is None
            else aggregation.error(jax.vmap(change)(start, trained), weights, aggregated),
            excluded=jnp.sum(~finite, dtype=jnp.int32),
        )
        return Federation(server, clients), metrics

    return round_function


def message_bytes(method: Method, federation: Federation) -> tuple[int, int]:
    """Bytes that one client sends and receives in a round: of the arrays that cross, as stored."""
    server, clients = federation
    client = jax.tree.map(lambda x: x[0], clients)

    def upload(server: Server, client: PyTree) -> PyTree:
        start = method.start(server, client, Context(jax.random.key(0)))
        return method.finish(server, client, start, start.trainable)[0]

    if method.pooled:
        return 0, 0
    sent = jax.eval_shape(upload, server, client)
    received = jax.eval_shape(method.download, server)
    return _bytes(sent), _bytes(received)


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _all_finite(tree: PyTree) -> jax.Array:
    """Whether all arrays are finite, for each entry of their common leading axis."""
    checks = [
        jnp.all(jnp.isfinite(x).reshape(len(x), -1), axis=1)
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    return jnp.all(jnp.stack(checks), axis=0)


def _select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the condition holds; arrays that did not change are passed on untouched."""
    return jax.tree.map(lambda x, y: x if x is y else jnp.where(condition, x, y), new, old)
