"""Accuracy on held-out examples: of the global model per domain, or of each client's own model."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax.federated.round import Federation
from fedlora_jax.federated.task import Batch, Task, outputs
from fedlora_jax.methods import Method, Trainable

_CHUNK = 256
_CLIENTS_AT_ONCE = 8


class HeldOut(NamedTuple):
    """Held-out examples, and which of them each client is judged by if it is judged by its own.

    Attributes:
      examples: A dict of arrays `[M, ...]`.
      domains: The domain of each example, int32 `[M]`.
      own: Indices of the examples in the domains of which a client holds training data, int32
        `[N, T]`, padded with -1.
    """

    examples: dict[str, jax.Array]
    domains: jax.Array
    own: jax.Array


def held_out(
    examples: dict[str, np.ndarray], domains: np.ndarray, client_domains: list[np.ndarray]
) -> HeldOut:
    """Puts held-out examples on the device.

    Args:
      examples: A dict of arrays `[M, ...]`.
      domains: The domain of each example, `[M]`.
      client_domains: For each client, the domains in which it holds training examples.
    """
    own = [np.flatnonzero(np.isin(domains, mine)) for mine in client_domains]
    longest = max(map(len, own))
    padded = np.stack([np.pad(x, (0, longest - len(x)), constant_values=-1) for x in own])
    return HeldOut(
        {name: jnp.asarray(values) for name, values in examples.items()},
        jnp.asarray(domains, jnp.int32),
        jnp.asarray(padded, jnp.int32),
    )


def make_evaluate(
    task: Task, method: Method, num_domains: int
) -> Callable[[Federation, HeldOut], jax.Array]:
    """Builds the jitted evaluation `(federation, test) -> accuracy per domain [D]`.

    The model is the server's, on all examples. A method with a `personal` model is judged by that
    instead: each client on its own examples, and a domain by the mean over the clients that have
    examples in it.
    """

    def correct(federation: Federation, trainable: Trainable, examples: Batch) -> jax.Array:
        server = federation.server

        def one(example: Batch) -> jax.Array:
            batch = {name: value[None] for name, value in example.items()}
            values = outputs(task, server.backbone, trainable, batch, scale=server.scale)
            return task.correct(values, batch)[0]

        return jax.lax.map(one, examples, batch_size=_CHUNK)

    def of_server(federation: Federation, test: HeldOut) -> jax.Array:
        hits = correct(federation, federation.server.trainable, test.examples)
        return _mean_by_domain(hits, jnp.ones_like(hits), test.domains, num_domains)

    def of_clients(federation: Federation, test: HeldOut) -> jax.Array:
        assert method.personal is not None
        personal = method.personal

        def of_client(inputs: tuple) -> jax.Array:
            client, own = inputs
            examples = {name: values[own] for name, values in test.examples.items()}
            hits = correct(federation, personal(federation.server, client), examples)
            return _mean_by_domain(hits, (own >= 0) * 1.0, test.domains[own], num_domains)

        each = jax.lax.map(of_client, (federation.clients, test.own), batch_size=_CLIENTS_AT_ONCE)
        return jnp.nanmean(each, axis=0)

    return jax.jit(of_server if method.personal is None else of_clients)


def _mean_by_domain(
    values: jax.Array, weights: jax.Array, domains: jax.Array, num_domains: int
) -> jax.Array:
    """Weighted mean of the values of each domain, `[D]`; NaN for a domain without any."""
    total = jax.ops.segment_sum(values * weights, domains, num_domains)
    return total / jax.ops.segment_sum(weights, domains, num_domains)
