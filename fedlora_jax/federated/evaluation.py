"""Accuracy on held-out examples: per domain, and for each client on data like its own."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax.federated.round import Federation, PyTree
from fedlora_jax.federated.task import Batch, Task, outputs
from fedlora_jax.methods import Method, Server, Trainable

_CHUNK = 256
_CLIENTS_AT_ONCE = 8


class HeldOut(NamedTuple):
    """Held-out examples, and what of them each client is judged by.

    Attributes:
      examples: A dict of arrays `[M, ...]`.
      domains: The domain of each example, int32 `[M]`.
      shares: How much each example counts for each client, float32 `[N, M]`: examples are weighted
        so that their domains and labels are distributed as in the client's own data. Rows sum to 1.
      own: Indices of the examples in the domains of which a client holds training data, int32
        `[N, T]`, padded with -1.
    """

    examples: dict[str, jax.Array]
    domains: jax.Array
    shares: jax.Array
    own: jax.Array


class Accuracy(NamedTuple):
    """What an evaluation finds.

    Attributes:
      domains: Accuracy per domain, `[D]`: of the global model on all examples; for a method without
        one, of the clients' on the examples of their own domains, mean over clients.
      clients: Accuracy for each client on examples distributed as its own, `[N]`: of its personal
        model if the method keeps one, else of the global model.
    """

    domains: jax.Array
    clients: jax.Array


def held_out(
    examples: dict[str, np.ndarray],
    domains: np.ndarray,
    labels: np.ndarray,
    clients: Sequence[tuple[np.ndarray, np.ndarray]],
) -> HeldOut:
    """Puts held-out examples on the device.

    Args:
      examples: A dict of arrays `[M, ...]`.
      domains: The domain of each example, `[M]`.
      labels: The label of each example, `[M]`.
      clients: For each client, the domains and the labels of its training examples.
    """
    own = [np.flatnonzero(np.isin(domains, np.unique(mine))) for mine, _ in clients]
    longest = max(map(len, own))
    padded = np.stack([np.pad(x, (0, longest - len(x)), constant_values=-1) for x in own])
    shares = np.stack([_shares(domains, labels, *mine) for mine in clients])
    return HeldOut(
        {name: jnp.asarray(values) for name, values in examples.items()},
        jnp.asarray(domains, jnp.int32),
        jnp.asarray(shares, jnp.float32),
        jnp.asarray(padded, jnp.int32),
    )


def _shares(
    domains: np.ndarray, labels: np.ndarray, own_domains: np.ndarray, own_labels: np.ndarray
) -> np.ndarray:
    """Weights of held-out examples under which they are distributed as a client's, `[M]`.

    A kind of example that is not held out cannot be judged and is left out.
    """
    classes = 1 + max(labels.max(), own_labels.max())
    kinds = domains * classes + labels
    total = 1 + max(kinds.max(), (own_domains * classes + own_labels).max())
    wanted = np.bincount(own_domains * classes + own_labels, minlength=total)
    there = np.bincount(kinds, minlength=total)
    weights = wanted[kinds] / there[kinds]
    return weights / max(weights.sum(), 1e-12)


def make_evaluate(
    task: Task, method: Method, num_domains: int
) -> Callable[[Federation, HeldOut], Accuracy]:
    """Builds the jitted evaluation `(federation, test) -> Accuracy`."""

    def correct(federation: Federation, trainable: Trainable, examples: Batch) -> jax.Array:
        server = federation.server

        def one(example: Batch) -> jax.Array:
            batch = {name: value[None] for name, value in example.items()}
            values = outputs(task, server.backbone, trainable, batch, scale=server.scale)
            return task.correct(values, batch)[0]

        return jax.lax.map(one, examples, batch_size=_CHUNK)

    def of_server(federation: Federation, test: HeldOut) -> Accuracy:
        hits = correct(federation, federation.server.trainable, test.examples)
        return Accuracy(
            _mean_by_domain(hits, jnp.ones_like(hits), test.domains, num_domains),
            test.shares @ hits,
        )

    def of_clients(
        personal: Callable[[Server, PyTree], Trainable], federation: Federation, test: HeldOut
    ) -> Accuracy:
        def of_client(inputs: tuple) -> Accuracy:
            client, own, shares = inputs
            examples = {name: values[own] for name, values in test.examples.items()}
            hits = correct(federation, personal(federation.server, client), examples)
            there = (own >= 0) * 1.0
            return Accuracy(
                _mean_by_domain(hits, there, test.domains[own], num_domains),
                jnp.sum(shares[own] * hits * there),
            )

        each = jax.lax.map(
            of_client, (federation.clients, test.own, test.shares), batch_size=_CLIENTS_AT_ONCE
        )
        return Accuracy(jnp.nanmean(each.domains, axis=0), each.clients)

    def evaluate(federation: Federation, test: HeldOut) -> Accuracy:
        if method.personal is None:
            return of_server(federation, test)
        own = of_clients(method.personal, federation, test)
        return Accuracy(of_server(federation, test).domains, own.clients) if method.shared else own

    return jax.jit(evaluate)


def _mean_by_domain(
    values: jax.Array, weights: jax.Array, domains: jax.Array, num_domains: int
) -> jax.Array:
    """Weighted mean of the values of each domain, `[D]`; NaN for a domain without any."""
    total = jax.ops.segment_sum(values * weights, domains, num_domains)
    return total / jax.ops.segment_sum(weights, domains, num_domains)
