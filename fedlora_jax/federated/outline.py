"""The shapes and types of what a round of a method makes, without computing anything."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fedlora_jax.methods import Context, Method, Server, Trained

PyTree: TypeAlias = Any


class Outline(NamedTuple):
    """Trees of `jax.ShapeDtypeStruct`.

    Attributes:
      server: The server's state after the round.
      upload: What one client sends.
      aggregated: What the server's step returns besides.
    """

    server: Server
    upload: PyTree
    aggregated: PyTree


def outline(
    method: Method, server: Server, client: PyTree, rank: jax.Array, cohort_size: int
) -> Outline:
    """The outline of a round, from the server's state, that of one client, and its rank."""

    def gradient(adapters: PyTree, **_: Any) -> PyTree:
        return adapters

    def everything(server: Server, client: PyTree, rank: jax.Array) -> Outline:
        context = Context(jax.random.key(0), gradient, rank)
        start = method.start(server, client, context)
        # Shapes do not depend on what training does.
        trained = Trained(start.trainable, start.trainable)
        start = start._replace(rank=rank if start.rank is None else start.rank)
        upload = method.finish(server, client, start, trained)[0]
        stacked = jax.tree.map(lambda x: jnp.stack([x] * cohort_size), upload)
        changed, aggregated = method.aggregate(server, stacked, jnp.ones(cohort_size))
        return Outline(changed, upload, aggregated)

    return jax.eval_shape(everything, server, client, rank)
