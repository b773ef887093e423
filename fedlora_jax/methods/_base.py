"""What a federated method is: who starts from what, trains what, sends what."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fedlora_jax import lora, lowrank
from fedlora_jax.aggregation import Aggregated
from fedlora_jax.lora import Adapters, Params
from fedlora_jax.lowrank import Factors

PyTree: TypeAlias = Any

BOTH = Factors(a=True, b=True)  # type: ignore[arg-type]


class Trainable(NamedTuple):
    """What clients train: the adapters and, where the task has one, the new head."""

    adapters: Adapters
    head: Params


class Server(NamedTuple):
    """The state of the server. Its model is `backbone + scale * adapters`, with the head.

    Attributes:
      backbone: Frozen parameters, without the head. Shared by all clients.
      trainable: The global adapters and head.
      scale: The factor s, one for the whole federation, float32 `[]`.
      memory: What the method remembers between rounds; `()` for most.
      round: Rounds finished, int32 `[]`.
    """

    backbone: Params
    trainable: Trainable
    scale: jax.Array
    memory: PyTree
    round: jax.Array


class Context(NamedTuple):
    """What a client has in a round besides the server's state and its own.

    Attributes:
      key: A random key that depends on the seed, the round and the client's identity alone.
      gradient: `(adapters, *, offset, batches) -> adapters`: the gradient for these adapters, of
        any rank, of the mean loss over so many batches of the client's own data, at the server's
        backbone and head changed by them and by a frozen offset.
    """

    key: jax.Array
    gradient: Callable[..., Adapters]


class Start(NamedTuple):
    """Where a client starts from.

    Attributes:
      trainable: Initial values.
      trains: Which side of the factors moves: two booleans, constant or computed from the round.
      offset: Frozen low-rank change of the backbone that is the client's own, or None.
    """

    trainable: Trainable
    trains: Factors = BOTH
    offset: Adapters | None = None


class Method(NamedTuple):
    """A federated method: pure functions over pytrees, closed over its hyperparameters.

    A round calls `start`, trains, and calls `finish` for each client of the cohort under one
    `vmap`, then `aggregate` once; all of it inside one jitted program.

    Attributes:
      init: `(key, server) -> (server, client)`: completes the server's state (its `memory`, or a
        changed backbone) and gives the state in which every client begins.
      start: `(server, client, context) -> Start`.
      finish: `(server, client, start, trained) -> (upload, client)`: what the server may read,
        any pytree of arrays, and what the client keeps.
      aggregate: `(server, uploads, weights) -> (server, aggregated)` from uploads stacked along
        `[K]` and weights `[K]`, zero for a client to be left out. `aggregated` is what the error
        of the aggregation is measured on; None if the method does not aggregate.
      sent: `(upload, round) -> pytree` of those arrays of an upload that cross in that round, an
        int; `aggregate` depends on no others.
      received: `(server, aggregated, round) -> pytree` of the arrays that each client then gets.
      personal: `(server, client) -> Trainable`, a client's own model, if the method is to be
        judged by that; None if by the global one.
      pooled: Whether all data lie with one client, as a reference.
    """

    init: Callable[[jax.Array, Server], tuple[Server, PyTree]]
    start: Callable[[Server, PyTree, Context], Start]
    finish: Callable[[Server, PyTree, Start, Trainable], tuple[PyTree, PyTree]]
    aggregate: Callable[[Server, PyTree, jax.Array], tuple[Server, Aggregated | None]]
    sent: Callable[[PyTree, int], PyTree]
    received: Callable[[Server, Aggregated | None, int], PyTree]
    personal: Callable[[Server, PyTree], Trainable] | None = None
    pooled: bool = False


def averaging(
    aggregate_adapters: Callable[[Adapters, jax.Array, Server], Aggregated],
    *,
    trains: Callable[[jax.Array], Factors] = lambda round_index: BOTH,
    sends: Callable[[int], str] = lambda round_index: "ab",
    receives: Callable[[int], str] = lambda round_index: "ab",
) -> Method:
    """A method whose clients start from the server's adapters and keep nothing of their own.

    Args:
      aggregate_adapters: `(stacked, weights, server) -> Aggregated`.
      trains: From the round, traced, to the sides of the factors that move.
      sends: From the round, an int, to the sides that clients send.
      receives: Likewise to the sides that clients receive, beside a residual.
    """

    def init(key: jax.Array, server: Server) -> tuple[Server, tuple[()]]:
        return server, ()

    def start(server: Server, client: PyTree, context: Context) -> Start:
        return Start(server.trainable, trains(server.round))

    def finish(
        server: Server, client: PyTree, start: Start, trained: Trainable
    ) -> tuple[Trainable, PyTree]:
        return trained, client

    def aggregate(
        server: Server, uploads: Trainable, weights: jax.Array
    ) -> tuple[Server, Aggregated]:
        aggregated = aggregate_adapters(uploads.adapters, weights, server)
        return absorb(server, aggregated, mean(uploads.head, weights)), aggregated

    def sent(upload: Trainable, round_index: int) -> PyTree:
        return sides(upload.adapters, sends(round_index)), upload.head

    def received(server: Server, aggregated: Aggregated | None, round_index: int) -> PyTree:
        residual = None if aggregated is None else aggregated.residual
        adapters = sides(server.trainable.adapters, receives(round_index))
        return adapters, residual, server.trainable.head

    return Method(init, start, finish, aggregate, sent, received)


def each_layer(function: Callable[..., Any], *trees: dict[str, Any]) -> dict[str, Any]:
    """`{path: function(*nodes)}` for dicts by path, layers of equal shapes in one vmapped call.

    A model has few kinds of layers and many of each: it then compiles in the time of its kinds.
    """
    kinds: dict[Any, list[str]] = {}
    for path in trees[0]:
        nodes = [tree[path] for tree in trees]
        kind = (jax.tree.structure(nodes), *((x.shape, x.dtype) for x in jax.tree.leaves(nodes)))
        kinds.setdefault(kind, []).append(path)
    results = {}
    for paths in kinds.values():
        rows = ([tree[path] for tree in trees] for path in paths)
        outputs = jax.vmap(function)(*jax.tree.map(lambda *x: jnp.stack(x), *rows))
        for index, path in enumerate(paths):
            results[path] = jax.tree.map(lambda x, i=index: x[i], outputs)
    return {path: results[path] for path in trees[0]}


def sides(adapters: Adapters, names: str) -> PyTree:
    """The factors `'a'`, `'b'` or `'ab'` of an adapter tree."""
    return {path: [getattr(factors, name) for name in names] for path, factors in adapters.items()}


def absorb(server: Server, aggregated: Aggregated, head: Params) -> Server:
    """The server after a round: residual merged into the backbone, adapters and head replaced.

    Adapters that are None become zero: the backbone then holds the whole model.
    """
    adapters = aggregated.adapters
    if adapters is None:
        adapters = jax.tree.map(jnp.zeros_like, server.trainable.adapters)
    backbone = server.backbone
    if aggregated.residual is not None:
        backbone = lora.merge(backbone, aggregated.residual, scale=server.scale)
    return server._replace(backbone=backbone, trainable=Trainable(adapters, head))


def mean(stacked: PyTree, weights: jax.Array) -> PyTree:
    """The weighted mean of arrays stacked along `[K]`; weights as in an aggregation function."""
    total = jnp.sum(weights)
    shares = weights / jnp.where(total > 0, total, 1)

    def average(x: jax.Array) -> jax.Array:
        here = shares.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.sum(jnp.where(here > 0, x.astype(jnp.float32) * here, 0), axis=0).astype(x.dtype)

    return jax.tree.map(average, stacked)


def change(start: Start, trainable: Trainable) -> Adapters:
    """A client's whole change of the shared backbone: its adapters and its frozen offset."""
    if start.offset is None:
        return trainable.adapters
    offset = start.offset
    return {
        path: lowrank.concatenate([factors, offset[path]]) if path in offset else factors
        for path, factors in trainable.adapters.items()
    }
