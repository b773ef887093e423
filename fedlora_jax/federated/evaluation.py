"""Held-out examples: each metric per domain, and for each client on data like its own.

Examples fall into cells, a kind within a domain. How much an example counts for a client is the
same for all of a cell, so that a client's score is a combination of the few cells that it has data
of, and nothing is as large as clients times examples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import sparse

from fedlora_jax.federated import cohort, placement
from fedlora_jax.federated.metrics import Score, by_example
from fedlora_jax.federated.task import Batch, Task, Weighted, outputs
from fedlora_jax.lora import Params
from fedlora_jax.methods import Method, Server, Trainable

PyTree: TypeAlias = Any


class Panel(NamedTuple):
    """The clients whose personal models are judged, and of all methods each one's score is told.

    Attributes:
      clients: Who they are, ascending, `[P]`.
      examples: Indices of the examples that a client's personal model is judged by, int32
        `[P, T]`, padded with -1.
      shares: How much each of these counts for the client, float32 `[P, T]`; 0 for padding.
    """

    clients: np.ndarray
    examples: jax.Array
    shares: jax.Array


class HeldOut(NamedTuple):
    """Held-out examples, and what of them each client is judged by.

    Attributes:
      examples: A dict of arrays `[M, ...]`.
      cells: The cell of each example, int32 `[M]` in `0 .. C - 1`.
      domains: The domain of each cell, int32 `[C]`.
      panel: The clients that are judged one by one.
      shares: How much an example of a cell counts for each client, float64 `[N, C]`, on the host:
        examples are weighted so that their kinds are distributed as in the client's own data. Over
        examples a row sums to 1; it is empty where nothing like the client's data is held out.
    """

    examples: dict[str, jax.Array]
    cells: jax.Array
    domains: jax.Array
    panel: Panel
    shares: sparse.csr_array


class Owned(NamedTuple):
    """Of which domain and kind the clients' training examples are, client after client.

    Attributes:
      counts: How many each client has, `[N]`.
      domains: The domain of each, `[P]`.
      kinds: The kind of each, `[P]`.
    """

    counts: np.ndarray
    domains: np.ndarray
    kinds: np.ndarray


class Evaluation(NamedTuple):
    """What an evaluation finds, by the name of the metric: means before `Metric.finish`.

    Attributes:
      domains: Per domain, `[D]`: of the global model on all examples; for a method without one, of
        the panel's on the examples that are their own, mean over clients. NaN without any.
      clients: For each client of the panel on examples distributed as its own, `[P]`: of its
        personal model if the method keeps one, else of the global model. NaN without any.
      everyone: The same of as many clients as are judged: of all, `[N]`, where the global model is,
        by a metric of examples; else of the panel, `[P]`.
      panel: Who the panel is, `[P]`; None if it is everybody.
    """

    domains: dict[str, np.ndarray]
    clients: dict[str, np.ndarray]
    everyone: dict[str, np.ndarray]
    panel: np.ndarray | None


Evaluate: TypeAlias = Callable[[Server, PyTree, HeldOut], Evaluation]


def held_out(
    examples: dict[str, np.ndarray],
    domains: np.ndarray,
    kinds: np.ndarray,
    owned: Owned,
    *,
    seed: jax.Array,
    judged_clients: int,
    kinds_are_own: bool = False,
    personal_models: bool = True,
) -> HeldOut:
    """Puts held-out examples on the device.

    Args:
      examples: A dict of arrays `[M, ...]`.
      domains: The domain of each example, `[M]`.
      kinds: The kind of each example within its domain, such as its label, `[M]`, not negative.
      owned: The same of the clients' training examples.
      seed: The seed's key. Which clients are the panel depends on it and on the data alone, so that
        methods are judged by the same ones.
      judged_clients: The largest panel. Of more clients it is a sample of those like whose data
        something is held out.
      kinds_are_own: Whether a client's personal model is judged by the examples of its kinds alone,
        as where the kind is whose text it is, instead of by all of its domains.
      personal_models: Whether there are any; if not, the panel has no examples of its own.
    """
    many = 1 + max(int(np.max(kinds)), int(np.max(owned.kinds)))
    there, cells, sizes = np.unique(
        _pairs(domains, kinds, many), return_inverse=True, return_counts=True
    )
    shares = _shares(there, sizes, _pairs(owned.domains, owned.kinds, many), owned.counts)
    who = cohort.panel(seed, np.diff(shares.indptr) > 0, judged_clients)
    ends = np.cumsum(owned.counts)
    own, weights = [], []
    for client in who if personal_models else []:
        mine = np.unique(owned.domains[ends[client] - owned.counts[client] : ends[client]])
        counted = _row(shares, client)[cells]
        own.append(np.flatnonzero(counted > 0 if kinds_are_own else np.isin(domains, mine)))
        weights.append(counted[own[-1]])
    shape = (len(who), max([1, *map(len, own)]))
    padded, padded_weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    for place, (each, counted) in enumerate(zip(own, weights, strict=True)):
        padded[place, : len(each)] = each
        padded_weights[place, : len(each)] = counted
    return HeldOut(
        {name: jnp.asarray(values) for name, values in examples.items()},
        jnp.asarray(cells, jnp.int32),
        jnp.asarray(there // many, jnp.int32),
        Panel(who, jnp.asarray(padded), jnp.asarray(padded_weights)),
        shares,
    )


def _pairs(domains: np.ndarray, kinds: np.ndarray, many: int) -> np.ndarray:
    """A number for each pair of a domain and one of so many kinds."""
    return np.asarray(domains, np.int64) * many + kinds


def _shares(
    there: np.ndarray, sizes: np.ndarray, own: np.ndarray, counts: np.ndarray
) -> sparse.csr_array:
    """Weights of examples by cell under which they are distributed as each client's, `[N, C]`.

    A kind of example that is not held out cannot be judged and is left out.

    Args:
      there: The pairs that are held out, ascending, `[C]`.
      sizes: How many examples are of each, `[C]`.
      own: The pairs of the clients' examples, client after client.
      counts: How many each client has, `[N]`.
    """
    cells = np.minimum(np.searchsorted(there, own), len(there) - 1)
    known = there[cells] == own
    owners = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[known]
    places = (owners, cells[known].astype(np.int32))
    shares = sparse.csr_array((np.ones(len(owners)), places), shape=(len(counts), len(there)))
    total = np.bincount(owners, minlength=len(counts))
    shares.data /= np.repeat(total, np.diff(shares.indptr)) * sizes[shares.indices]
    return shares


def _row(shares: sparse.csr_array, client: int) -> np.ndarray:
    """What an example of each cell counts for one client, `[C]`."""
    mine = slice(shares.indptr[client], shares.indptr[client + 1])
    row = np.zeros(shares.shape[1])
    row[shares.indices[mine]] = shares.data[mine]
    return row


def panel_states(method: Method, read: Callable[[np.ndarray], PyTree], test: HeldOut) -> PyTree:
    """What an evaluation needs of the clients' states: the panel's, `[P, ...]`.

    For a method without personal models that is nothing.

    Args:
      method: How clients and server work together.
      read: From identities to these clients' states, stacked.
      test: What is held out.
    """
    return () if method.personal is None else read(test.panel.clients)


class _Found(NamedTuple):
    """What models do on examples: values and weights by metric, and predictions where needed."""

    values: dict[str, Weighted]
    predictions: jax.Array | None


class _OfServer(NamedTuple):
    """What the global model does: sums over the examples of each cell, `[C]`, by metric."""

    totals: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    predictions: jax.Array | None


class _OfPanel(NamedTuple):
    """What personal models do: means over clients by domain, `[D]`, and of each client, `[P]`."""

    domains: dict[str, jax.Array]
    clients: dict[str, jax.Array]
    predictions: jax.Array | None


def make_evaluate(
    task: Task,
    method: Method,
    num_domains: int,
    *,
    batch_size: int = 256,
    clients_at_once: int = 8,
    mesh: Mesh | None = None,
) -> Evaluate:
    """Builds the evaluation `(server, the panel's states, test) -> Evaluation`.

    The states are those of `panel_states`. Models run, and sums are taken, in one jitted program; a
    product of sparse matrices on the host makes means of clients of them. Metrics of sets are
    scored on the host, one client after the other, and so for the panel alone.

    Args:
      task: What is learned, and its metrics.
      method: Whether there is a global model, personal ones, or both.
      num_domains: D.
      batch_size: Examples at once.
      clients_at_once: Personal models at once.
      mesh: Devices that share each batch, along `placement.CLIENTS`; None for one.

    Raises:
      ValueError: If a metric is of sets and the task predicts nothing.
    """
    of_sets = [metric for metric in task.metrics if metric.score is not None]
    if of_sets and task.predict is None:
        raise ValueError(f"{of_sets[0].name} needs predictions, and the task has none")

    def run(frozen: Params, scale: jax.Array, trainable: Trainable, examples: Batch) -> _Found:
        def of_batch(batch: Batch) -> _Found:
            given = outputs(task, frozen, trainable, batch, scale=scale)
            size = len(next(iter(batch.values())))
            values = {
                m.name: by_example(m.name, m.measure(given, batch), size)
                for m in task.metrics
                if m.measure
            }
            return _Found(values, task.predict(given) if of_sets and task.predict else None)

        return _in_batches(of_batch, examples, batch_size, mesh)

    def of_server(server: Server, frozen: Params, test: HeldOut) -> _OfServer:
        found = run(frozen, server.scale, server.trainable, test.examples)
        totals, weights = {}, {}
        for name, (value, weight) in found.values.items():
            totals[name] = jax.ops.segment_sum(
                _weighed(value, weight), test.cells, len(test.domains)
            )
            weights[name] = jax.ops.segment_sum(weight, test.cells, len(test.domains))
        return _OfServer(totals, weights, found.predictions)

    def of_panel(server: Server, frozen: Params, clients: PyTree, test: HeldOut) -> _OfPanel:
        personal = method.personal
        assert personal is not None

        def of_client(inputs: tuple[PyTree, jax.Array, jax.Array]) -> _OfPanel:
            client, own, shares = inputs
            examples = {name: values[own] for name, values in test.examples.items()}
            found = run(frozen, server.scale, personal(server, client), examples)
            of_domain = test.domains[test.cells[own]]
            domains, means = {}, {}
            for name, (value, weight) in found.values.items():
                counted = jnp.where(own >= 0, weight, 0.0)
                domains[name] = _mean_by_domain(value, counted, of_domain, num_domains)
                mine = shares * counted
                means[name] = _ratio(jnp.sum(_weighed(value, mine)), jnp.sum(mine))
            return _OfPanel(domains, means, found.predictions)

        members = (clients, test.panel.examples, test.panel.shares)
        each = jax.lax.map(of_client, members, batch_size=clients_at_once)
        means = {name: jnp.nanmean(values, axis=0) for name, values in each.domains.items()}
        return each._replace(domains=means)

    @jax.jit
    def compute(
        server: Server, clients: PyTree, test: HeldOut
    ) -> tuple[_OfServer | None, _OfPanel | None]:
        of_all = method.shared or method.personal is None
        frozen = task.frozen(server.backbone)
        return (
            of_server(server, frozen, test) if of_all else None,
            None if method.personal is None else of_panel(server, frozen, clients, test),
        )

    def evaluate(server: Server, clients: PyTree, test: HeldOut) -> Evaluation:
        on_device = test._replace(shares=None)
        all_of_it, each = jax.tree.map(np.asarray, compute(server, clients, on_device))
        who = test.panel.clients
        result = Evaluation({}, {}, {}, None if len(who) == test.shares.shape[0] else who)
        if all_of_it is not None:
            domains = np.asarray(test.domains)
            for name, total in all_of_it.totals.items():
                sums = (total.astype(np.float64), all_of_it.weights[name].astype(np.float64))
                by_domain = (np.bincount(domains, x, minlength=num_domains) for x in sums)
                result.domains[name] = _mean(*by_domain)
                result.everyone[name] = _mean(*(test.shares @ x for x in sums))
                result.clients[name] = result.everyone[name][who]
        if each is not None:
            result.clients.update(each.clients)
            result.everyone.update(each.clients)
            result.domains.update(each.domains if all_of_it is None else {})
        predictions = tuple(
            None if part is None else part.predictions for part in (all_of_it, each)
        )
        for metric in of_sets:
            assert metric.score is not None
            judged = _judge_sets(metric.score, test, num_domains, *predictions)
            result.domains[metric.name], result.clients[metric.name] = judged
            result.everyone[metric.name] = result.clients[metric.name]
        return result

    return evaluate


def _judge_sets(
    score: Score,
    test: HeldOut,
    num_domains: int,
    of_server: np.ndarray | None,
    of_panel: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """`[D]` and `[P]`, as `Evaluation` has them, from predictions `[M]` and `[P, T]`."""
    labels, cells = np.asarray(test.examples["label"]), np.asarray(test.cells)
    domains, own = np.asarray(test.domains)[cells], np.asarray(test.panel.examples)

    def over(index: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> float:
        kept = counts > 0
        if not kept.any():
            return float("nan")
        return score(labels[index[kept]], predictions[kept], counts[kept], labels)

    def by_domain(index: np.ndarray, predictions: np.ndarray) -> np.ndarray:
        here = [(index >= 0) * (domains[index] == d) * 1.0 for d in range(num_domains)]
        return np.array([over(index, predictions, counts) for counts in here])

    everything = np.arange(len(labels))
    if of_panel is None:
        assert of_server is not None
        rows = (_row(test.shares, client)[cells] for client in test.panel.clients)
        clients = [over(everything, of_server, shares) for shares in rows]
    else:
        shares = np.asarray(test.panel.shares)
        clients = [over(*each) for each in zip(own, of_panel, shares, strict=True)]
    if of_server is not None:
        return by_domain(everything, of_server), np.array(clients)
    assert of_panel is not None
    each = np.array([by_domain(*pair) for pair in zip(own, of_panel, strict=True)])
    return mean_of_known(each, axis=0), np.array(clients)


def _mean(total: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The mean, on the host; NaN without any weight."""
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)


def mean_of_known(values: np.ndarray, axis: int | None = None) -> Any:
    """The mean of what is not NaN; NaN where all is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, values, 0).sum(axis) / known.sum(axis)


def _in_batches(
    function: Callable[[Batch], Any], examples: Batch, batch_size: int, mesh: Mesh | None
) -> Any:
    """What a function of batches gives on M examples; its results stacked along `[M]`."""
    count = len(next(iter(examples.values())))
    devices = placement.devices(mesh)
    size = -(-min(batch_size, count) // devices) * devices
    batches = -(-count // size)
    index = jnp.minimum(jnp.arange(batches * size), count - 1).reshape(batches, size)

    def of_rows(rows: jax.Array) -> Any:
        batch = {name: values[rows] for name, values in examples.items()}
        if mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, placement.rows(mesh))
        return function(batch)

    found = jax.lax.map(of_rows, index)
    return jax.tree.map(lambda x: x.reshape(batches * size, *x.shape[2:])[:count], found)


def _weighed(values: jax.Array, weights: jax.Array) -> jax.Array:
    """What examples add to a sum: nothing if they do not count, whatever their value.

    NaN says that there was nothing to judge: one that a model gives is infinite instead.
    """
    values = jnp.where(jnp.isnan(values), jnp.inf, values)
    return jnp.where(weights > 0, values * weights, jnp.zeros_like(values))


def _mean_by_domain(
    values: jax.Array, weights: jax.Array, domains: jax.Array, num_domains: int
) -> jax.Array:
    """Weighted mean of the values of each domain, `[D]`; NaN for a domain without any."""
    total = jax.ops.segment_sum(_weighed(values, weights), domains, num_domains)
    return _ratio(total, jax.ops.segment_sum(weights, domains, num_domains))


def _ratio(total: jax.Array, weight: jax.Array) -> jax.Array:
    """The mean; NaN without any weight."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), jnp.nan)
