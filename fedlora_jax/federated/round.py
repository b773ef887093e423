"""One round of a federation as one jitted program."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fedlora_jax import aggregation
from fedlora_jax.data.clients import ClientData, local_batch
from fedlora_jax.federated import local, randomness
from fedlora_jax.federated.local import BatchOf, LocalTraining
from fedlora_jax.federated.task import Task
from fedlora_jax.lora import Adapters
from fedlora_jax.methods import Context, Method, Server, Start, Trainable, change, mean

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


class CohortResult(NamedTuple):
    """What the clients of a cohort did in a round; everything stacked along `[K]`.

    Attributes:
      start: Where they started from.
      trained: Where they arrived.
      uploads: What they send.
      clients: Their states after the round.
      loss: Mean training loss over the steps, `[K]`.
    """

    start: Start
    trained: Trainable
    uploads: PyTree
    clients: PyTree
    loss: jax.Array


def train_cohort(
    task: Task,
    method: Method,
    training: LocalTraining,
    federation: Federation,
    data: ClientData,
    cohort: jax.Array,
    seed: jax.Array,
) -> CohortResult:
    """Trains the clients of a cohort under one `vmap` over one backbone.

    Args:
      task: What is learned.
      method: How clients and server work together.
      training: How clients train.
      federation: The state before the round.
      data: The data of all clients.
      cohort: Identities, int32 `[K]`, without repetition.
      seed: The seed's key.
    """
    server, clients = federation

    def of_client(client: PyTree, identity: jax.Array) -> CohortResult:
        def key(name: str) -> jax.Array:
            return randomness.of_client(seed, name, server.round, identity)

        def batches_of(stream: str) -> BatchOf:
            rows, count, order = data.indices[identity], data.counts[identity], key(stream)

            def batch_of(step: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
                chosen, mask = local_batch(rows, count, order, step, training.batch_size)
                return {name: values[chosen] for name, values in data.examples.items()}, mask

            return batch_of

        def gradient(adapters: Adapters, *, offset: Adapters | None, batches: int) -> Adapters:
            at = server.trainable._replace(adapters=adapters)
            own = batches_of("calibration")
            frozen = (task, server.backbone, server.scale)
            return local.gradient(*frozen, at, offset, own, batches).adapters

        start = method.start(server, client, Context(key("start"), gradient))
        trained, losses = local.train(
            task,
            training,
            server.backbone,
            server.scale,
            start,
            batches_of("batches"),
            server.round,
        )
        upload, client = method.finish(server, client, start, trained)
        return CohortResult(start, trained, upload, client, jnp.mean(losses))

    return jax.vmap(of_client)(jax.tree.map(lambda x: x[cohort], clients), cohort)


def run_round(
    task: Task,
    method: Method,
    training: LocalTraining,
    federation: Federation,
    data: ClientData,
    cohort: jax.Array,
    seed: jax.Array,
    *,
    equal_weights: bool = False,
) -> tuple[Federation, RoundMetrics, CohortResult]:
    """One round: train a cohort, aggregate, and go on.

    A client whose results are not all finite is left out: it has weight zero, and its state stays
    as it was. If none is left, the server's state stays too.

    Args:
      task: What is learned.
      method: How clients and server work together.
      training: How clients train.
      federation: The state before the round.
      data: The data of all clients.
      cohort: Identities, int32 `[K]`, without repetition.
      seed: The seed's key.
      equal_weights: Weigh clients equally instead of by their number of examples.

    Returns:
      The state after the round, its metrics, and what the clients did.
    """
    server, clients = federation
    result = train_cohort(task, method, training, federation, data, cohort, seed)
    finite = _all_finite((result.trained, result.uploads, result.clients))
    counts = jnp.ones(len(cohort)) if equal_weights else data.counts[cohort]
    weights = jnp.where(finite, counts.astype(jnp.float32), 0)
    changed, aggregated = method.aggregate(server, result.uploads, weights)
    server = _select(jnp.any(finite), changed, server)._replace(round=server.round + 1)
    metrics = RoundMetrics(
        loss=mean(result.loss, weights),
        client_loss=result.loss,
        aggregation_error=_error(result, weights, aggregated),
        excluded=jnp.sum(~finite, dtype=jnp.int32),
    )
    return Federation(server, _put(clients, cohort, result.clients, finite)), metrics, result


def make_round(
    task: Task, method: Method, training: LocalTraining, *, equal_weights: bool = False
) -> RoundFunction:
    """Builds the jitted round `(federation, data, cohort, seed) -> (federation, metrics)`.

    See `run_round`. It compiles once for all rounds and seeds.
    """

    @jax.jit
    def round_function(
        federation: Federation, data: ClientData, cohort: jax.Array, seed: jax.Array
    ) -> tuple[Federation, RoundMetrics]:
        state = (federation, data, cohort, seed)
        return run_round(task, method, training, *state, equal_weights=equal_weights)[:2]

    return round_function


def _error(
    result: CohortResult, weights: jax.Array, aggregated: aggregation.Aggregated | None
) -> jax.Array:
    if aggregated is None:
        return jnp.asarray(jnp.nan)
    changes = jax.vmap(change)(result.start, result.trained)
    return aggregation.error(changes, weights, aggregated)


def _put(clients: PyTree, cohort: jax.Array, new: PyTree, finite: jax.Array) -> PyTree:
    """The states of all clients, with the new ones where they are finite."""

    def put(stacked: jax.Array, values: jax.Array) -> jax.Array:
        usable = finite.reshape(-1, *[1] * (values.ndim - 1))
        return stacked.at[cohort].set(jnp.where(usable, values, stacked[cohort]))

    return jax.tree.map(put, clients, new)


def message_bytes(
    method: Method, federation: Federation, cohort_size: int, round_index: int
) -> tuple[int, int]:
    """Bytes that one client sends and receives in a round: of the arrays that cross, as stored."""
    server, clients = federation
    client = jax.tree.map(lambda x: x[0], clients)

    def gradient(adapters: Adapters, **_: Any) -> Adapters:
        return adapters

    def upload(server: Server, client: PyTree) -> PyTree:
        start = method.start(server, client, Context(jax.random.key(0), gradient))
        return method.finish(server, client, start, start.trainable)[0]

    def received(server: Server, client: PyTree) -> PyTree:
        stacked = jax.tree.map(lambda x: jnp.stack([x] * cohort_size), upload(server, client))
        server, aggregated = method.aggregate(server, stacked, jnp.ones(cohort_size))
        return method.received(server, aggregated, round_index)

    sent = jax.eval_shape(lambda *x: method.sent(upload(*x), round_index), server, client)
    return _bytes(sent), _bytes(jax.eval_shape(received, server, client))


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
