"""Held-out examples: each metric per domain, and for each client on data like its own."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax.federated.metrics import Score
from fedlora_jax.federated.round import Federation
from fedlora_jax.federated.task import Batch, Task, Weighted, outputs
from fedlora_jax.methods import Method, Trainable


class HeldOut(NamedTuple):
    """Held-out examples, and what of them each client is judged by.

    Attributes:
      examples: A dict of arrays `[M, ...]`.
      domains: The domain of each example, int32 `[M]`.
      shares: How much each example counts for each client, float32 `[N, M]`: examples are weighted
        so that their kinds are distributed as in the client's own data. Rows sum to 1, or to 0
        where nothing like the client's data is held out.
      own: Indices of the examples that a client's personal model is judged by, int32 `[N, T]`,
        padded with -1.
    """

    examples: dict[str, jax.Array]
    domains: jax.Array
    shares: jax.Array
    own: jax.Array


class Evaluation(NamedTuple):
    """What an evaluation finds, by the name of the metric: means before `Metric.finish`.

    Attributes:
      domains: Per domain, `[D]`: of the global model on all examples; for a method without one, of
        the clients' on the examples that are their own, mean over clients. NaN without any.
      clients: For each client on examples distributed as its own, `[N]`: of its personal model if
        the method keeps one, else of the global model. NaN without any.
    """

    domains: dict[str, Any]
    clients: dict[str, Any]


Evaluate = Callable[[Federation, HeldOut], Evaluation]


def held_out(
    examples: dict[str, np.ndarray],
    domains: np.ndarray,
    kinds: np.ndarray,
    clients: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    kinds_are_own: bool = False,
) -> HeldOut:
    """Puts held-out examples on the device.

    Args:
      examples: A dict of arrays `[M, ...]`.
      domains: The domain of each example, `[M]`.
      kinds: The kind of each example within its domain, such as its label, `[M]`, not negative.
      clients: For each client, the domains and the kinds of its training examples.
      kinds_are_own: Whether a client's personal model is judged by the examples of its kinds alone,
        as where the kind is whose text it is, instead of by all of its domains.
    """
    shares = np.stack([_shares(domains, kinds, *mine) for mine in clients])
    own = [
        np.flatnonzero(share > 0 if kinds_are_own else np.isin(domains, np.unique(mine)))
        for share, (mine, _) in zip(shares, clients, strict=True)
    ]
    longest = max(1, *map(len, own))
    padded = np.stack([np.pad(x, (0, longest - len(x)), constant_values=-1) for x in own])
    return HeldOut(
        {name: jnp.asarray(values) for name, values in examples.items()},
        jnp.asarray(domains, jnp.int32),
        jnp.asarray(shares, jnp.float32),
        jnp.asarray(padded, jnp.int32),
    )


def _shares(
    domains: np.ndarray, kinds: np.ndarray, own_domains: np.ndarray, own_kinds: np.ndarray
) -> np.ndarray:
    """Weights of held-out examples under which they are distributed as a client's, `[M]`.

    A kind of example that is not held out cannot be judged and is left out.
    """
    many = 1 + max(kinds.max(), own_kinds.max())
    pairs, own_pairs = domains * many + kinds, own_domains * many + own_kinds
    total = 1 + max(pairs.max(), own_pairs.max())
    wanted = np.bincount(own_pairs, minlength=total)
    there = np.bincount(pairs, minlength=total)
    weights = wanted[pairs] / there[pairs]
    return weights / max(weights.sum(), 1e-12)


class _Found(NamedTuple):
    """What models do on examples: values and weights by metric, and predictions where needed."""

    values: dict[str, Weighted]
    predictions: jax.Array | None


def make_evaluate(
    task: Task, method: Method, num_domains: int, *, batch_size: int = 256, clients_at_once: int = 8
) -> Evaluate:
    """Builds the evaluation `(federation, test) -> Evaluation`.

    Models run, and means are taken, in one jitted program. Metrics of sets are scored on the host.

    Args:
      task: What is learned, and its metrics.
      method: Whether there is a global model, personal ones, or both.
      num_domains: D.
      batch_size: Examples at once.
      clients_at_once: Personal models at once.

    Raises:
      ValueError: If a metric is of sets and the task predicts nothing.
    """
    of_sets = [metric for metric in task.metrics if metric.score is not None]
    if of_sets and task.predict is None:
        raise ValueError(f"{of_sets[0].name} needs predictions, and the task has none")

    def run(federation: Federation, trainable: Trainable, examples: Batch) -> _Found:
        server = federation.server

        def of_batch(batch: Batch) -> _Found:
            given = outputs(task, server.backbone, trainable, batch, scale=server.scale)
            values = {m.name: m.measure(given, batch) for m in task.metrics if m.measure}
            return _Found(values, task.predict(given) if of_sets and task.predict else None)

        return _in_batches(of_batch, examples, batch_size)

    def of_server(federation: Federation, test: HeldOut) -> tuple[Evaluation, jax.Array | None]:
        found = run(federation, federation.server.trainable, test.examples)
        means = Evaluation(
            {
                name: _mean_by_domain(*each, test.domains, num_domains)
                for name, each in found.values.items()
            },
            {
                name: _ratio(test.shares @ (value * weight), test.shares @ weight)
                for name, (value, weight) in found.values.items()
            },
        )
        return means, found.predictions

    def of_clients(federation: Federation, test: HeldOut) -> tuple[Evaluation, jax.Array | None]:
        personal = method.personal
        assert personal is not None

        def of_client(inputs: tuple[Any, jax.Array, jax.Array]) -> tuple[Evaluation, Any]:
            client, own, shares = inputs
            examples = {name: values[own] for name, values in test.examples.items()}
            found = run(federation, personal(federation.server, client), examples)
            there = own >= 0
            domains, clients = {}, {}
            for name, (value, weight) in found.values.items():
                counted = jnp.where(there, weight, 0.0)
                mine = shares[own] * counted
                domains[name] = _mean_by_domain(value, counted, test.domains[own], num_domains)
                clients[name] = _ratio(jnp.sum(mine * value), jnp.sum(mine))
            return Evaluation(domains, clients), found.predictions

        members = (federation.clients, test.own, test.shares)
        each, predictions = jax.lax.map(of_client, members, batch_size=clients_at_once)
        means = {name: jnp.nanmean(values, axis=0) for name, values in each.domains.items()}
        return Evaluation(means, each.clients), predictions

    @jax.jit
    def compute(federation: Federation, test: HeldOut) -> tuple[Any, Any]:
        of_all = method.shared or method.personal is None
        return (
            of_server(federation, test) if of_all else None,
            None if method.personal is None else of_clients(federation, test),
        )

    def evaluate(federation: Federation, test: HeldOut) -> Evaluation:
        found = jax.tree.map(np.asarray, compute(federation, test))
        parts = [part for part in found if part is not None]
        result = Evaluation(dict(parts[0][0].domains), dict(parts[-1][0].clients))
        if not of_sets:
            return result
        sets = _Sets(jax.tree.map(np.asarray, test._replace(examples={})), num_domains)
        labels = np.asarray(test.examples["label"])
        predictions = tuple(None if part is None else part[1] for part in found)
        for metric in of_sets:
            assert metric.score is not None
            judged = sets.judge(metric.score, labels, *predictions)
            result.domains[metric.name], result.clients[metric.name] = judged
        return result

    return evaluate


class _Sets(NamedTuple):
    """Scores of sets of predictions, on the host."""

    test: HeldOut
    num_domains: int

    def judge(
        self,
        score: Score,
        labels: np.ndarray,
        of_server: np.ndarray | None,
        of_clients: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`[D]` and `[N]`, as `Evaluation` has them, from predictions `[M]` and `[N, T]`."""
        test = self.test

        def over(index: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> float:
            kept = counts > 0
            if not kept.any():
                return float("nan")
            return score(labels[index[kept]], predictions[kept], counts[kept])

        def by_domain(index: np.ndarray, predictions: np.ndarray) -> np.ndarray:
            here = [
                (index >= 0) * (test.domains[index] == d) * 1.0 for d in range(self.num_domains)
            ]
            return np.array([over(index, predictions, counts) for counts in here])

        everything = np.arange(len(labels))
        if of_clients is None:
            assert of_server is not None
            clients = [over(everything, of_server, shares) for shares in test.shares]
        else:
            rows = list(zip(test.own, of_clients, test.shares, strict=True))
            clients = [over(own, mine, shares[own] * (own >= 0)) for own, mine, shares in rows]
        if of_server is not None:
            return by_domain(everything, of_server), np.array(clients)
        assert of_clients is not None
        each = np.array([by_domain(*pair) for pair in zip(test.own, of_clients, strict=True)])
        return mean_of_known(each, axis=0), np.array(clients)


def mean_of_known(values: np.ndarray, axis: int | None = None) -> Any:
    """The mean of what is not NaN; NaN where all is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, values, 0).sum(axis) / known.sum(axis)


def _in_batches(function: Callable[[Batch], Any], examples: Batch, batch_size: int) -> Any:
    """What a function of batches gives on M examples; its results stacked along `[M]`."""
    count = len(next(iter(examples.values())))
    size = min(batch_size, count)
    batches = -(-count // size)
    index = jnp.minimum(jnp.arange(batches * size), count - 1).reshape(batches, size)
    found = jax.lax.map(
        lambda rows: function({name: values[rows] for name, values in examples.items()}), index
    )
    return jax.tree.map(lambda x: x.reshape(batches * size, *x.shape[2:])[:count], found)


def _mean_by_domain(
    values: jax.Array, weights: jax.Array, domains: jax.Array, num_domains: int
) -> jax.Array:
    """Weighted mean of the values of each domain, `[D]`; NaN for a domain without any."""
    total = jax.ops.segment_sum(values * weights, domains, num_domains)
    return _ratio(total, jax.ops.segment_sum(weights, domains, num_domains))


def _ratio(total: jax.Array, weight: jax.Array) -> jax.Array:
    """The mean; NaN without any weight."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), jnp.nan)
