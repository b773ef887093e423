"""What a federated method is: who starts from what, trains what, sends what."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fedlora_jax import aggregation, lora, lowrank
from fedlora_jax.aggregation import Aggregated
from fedlora_jax.lora import Adapters, Params
from fedlora_jax.lowrank import Factors

PyTree: TypeAlias = Any
# Layers of equal shapes, by their paths.
Kind: TypeAlias = tuple[str, ...]

BOTH = Factors(a=True, b=True)  # type: ignore[arg-type]

# Rules by which some clients count and others do not, or more and less, or entry by entry.
ROBUST = ("robust_selection", "robust_weights", "robust_entries")

# What a method can be combined with, beside partial participation and weights.
COMBINATIONS = (
    "unequal_ranks",
    "fedprox",
    "scaffold",
    "server_optimizer",
    "server_step",
    "privacy",
    *ROBUST,
)

# Reasons that several methods give.
READS_EACH_CLIENT = "its server reads each client's factors, not their mean alone"
OTHER_BASIS = "its server gives the adapters another basis in every round"


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
        any rank, of the mean loss over so many batches of the client's own data, or one pass over
        them if that is less, at the server's backbone and head changed by them and by a frozen
        offset.
      rank: The rank r_k that the client can afford, int32 `[]`, at most that of the server's
        adapters.
    """

    key: jax.Array
    gradient: Callable[..., Adapters]
    rank: jax.Array


class Start(NamedTuple):
    """Where a client starts from.

    Attributes:
      trainable: Initial values.
      trains: Which side of the factors moves: two booleans, constant or computed from the round.
      offset: Frozen low-rank change of the backbone that is the client's own, or None.
      rank: The client trains the first so many columns of `a` and rows of `b`; the others are made
        zero and stay so. None for the rank that the client can afford.
    """

    trainable: Trainable
    trains: Factors = BOTH
    offset: Adapters | None = None
    rank: jax.Array | None = None


class Trained(NamedTuple):
    """What local training gives.

    Attributes:
      trainable: The values arrived at.
      gradient: The mean over the steps of the gradient that the optimiser saw, zero where nothing
        was trained.
    """

    trainable: Trainable
    gradient: Trainable


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
        `[K]` and weights `[K]`: each client's share of all N, which a mean over the cohort has to
        normalise, and zero for a client to be left out. `aggregated` is what the error of the
        aggregation is measured on; None if the method does not aggregate.
      sent: `(upload, round) -> pytree` of those arrays of an upload that cross in that round, an
        int; `aggregate` depends on no others.
      received: `(server, aggregated, round) -> pytree` of the arrays that each client then gets.
      missed: `(server, aggregated, round, absent) -> pytree` of what the backbone has absorbed
        while a client was absent for so many rounds, an int >= 1. It gets that besides, or the
        adapted kernels where these are smaller.
      outdated: `(server, aggregated, round) -> pytree` of the arrays that a client that was absent
        gets besides once, however long it was, and whether or not it gets the kernels.
      unmoved: `(server) -> upload` of a client that has learned nothing, as a robust rule knows it.
      penalty: `(server, client, start, trainable) -> []`, added to a client's loss; None for none.
      personal: `(server, client) -> Trainable`, a client's own model, if the method keeps one.
      shared: Whether the server has a model for all; if not, the method is judged by the clients'.
      pooled: Whether all data lie with one client, as a reference.
      equal_weights: Whether clients count equally in it, whatever their examples: a round then
        weighs them so, in what it measures too.
      free_basis: Whether nothing but the product of the server's adapters matters from round to
        round, so that `transforms.ordered` may give them another basis.
      whole_adapters: Whether each client is sent the server's adapters whole, whatever its rank.
      stacked_residual: Whether what is merged are the clients' own factors, side by side, so that
        there is less of it the smaller their ranks are. If not, each client is sent all of it,
        whatever its rank.
      diagnosed: Whether a round describes the clients' updates, by `aggregation.diagnostics`.
      refuses: Names from `COMBINATIONS` of what makes no sense with the method, and why.
    """

    init: Callable[[jax.Array, Server], tuple[Server, PyTree]]
    start: Callable[[Server, PyTree, Context], Start]
    finish: Callable[[Server, PyTree, Start, Trained], tuple[PyTree, PyTree]]
    aggregate: Callable[[Server, PyTree, jax.Array], tuple[Server, Aggregated | None]]
    sent: Callable[[PyTree, int], PyTree]
    received: Callable[[Server, Aggregated | None, int], PyTree]
    missed: Callable[[Server, Aggregated | None, int, int], PyTree] = lambda *_: ()
    outdated: Callable[[Server, Aggregated | None, int], PyTree] = lambda *_: ()
    unmoved: Callable[[Server], PyTree] = lambda server: server.trainable
    penalty: Callable[[Server, PyTree, Start, Trainable], jax.Array] | None = None
    personal: Callable[[Server, PyTree], Trainable] | None = None
    shared: bool = True
    pooled: bool = False
    equal_weights: bool = False
    free_basis: bool = False
    whole_adapters: bool = False
    stacked_residual: bool = False
    diagnosed: bool = False
    refuses: Mapping[str, str] = MappingProxyType({})


def averaging(
    aggregate_adapters: Callable[[Adapters, jax.Array, Server], Aggregated],
    *,
    trains: Callable[[jax.Array], Factors] = lambda round_index: BOTH,
    sends: Callable[[int], str] = lambda round_index: "ab",
    receives: Callable[[int], str] = lambda round_index: "ab",
    refuses: Mapping[str, str] = MappingProxyType({}),
    free_basis: bool = False,
) -> Method:
    """A method whose clients start from the server's adapters and keep nothing of their own.

    Args:
      aggregate_adapters: `(stacked, weights, server) -> Aggregated`.
      trains: From the round, traced, to the sides of the factors that move.
      sends: From the round, an int, to the sides that clients send.
      receives: Likewise to the sides that clients receive, beside a residual.
      refuses: What makes no sense with the method, and why.
      free_basis: As in `Method`.
    """

    def init(key: jax.Array, server: Server) -> tuple[Server, tuple[()]]:
        return server, ()

    def start(server: Server, client: PyTree, context: Context) -> Start:
        return Start(server.trainable, trains(server.round))

    def finish(
        server: Server, client: PyTree, start: Start, trained: Trained
    ) -> tuple[Trainable, PyTree]:
        return trained.trainable, client

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

    def missed(
        server: Server, aggregated: Aggregated | None, round_index: int, absent: int
    ) -> PyTree:
        """Of adapters the newest will do; a residual of each round is in the backbone for good."""
        return [None if aggregated is None else aggregated.residual] * absent

    return Method(
        init,
        start,
        finish,
        aggregate,
        sent,
        received,
        missed,
        refuses=refuses,
        free_basis=free_basis,
    )


def each_of(function: Callable[..., Any], *stacked: Any) -> Any:
    """`function` of each layer of a kind; what it returns is stacked again.

    A model has few kinds of layers and many of each: it then compiles in the time of its kinds.
    """

    def one(nodes: tuple[Any, ...]) -> Any:
        return function(*nodes)

    # A loop and not a batch: its results are arrays of their own, where the compiler would put the
    # end of the function into whatever reads a layer of them, once a layer.
    return jax.lax.map(one, stacked)


def layer_kinds(*trees: dict[str, Any]) -> list[Kind]:
    """The paths of dicts by path, layers of equal shapes together."""
    kinds: dict[Any, list[str]] = {}
    for path in trees[0]:
        nodes = [tree[path] for tree in trees]
        kind = (jax.tree.structure(nodes), *((x.shape, x.dtype) for x in jax.tree.leaves(nodes)))
        kinds.setdefault(kind, []).append(path)
    return [tuple(paths) for paths in kinds.values()]


def stacked_layers(*trees: dict[str, Any]) -> dict[Kind, list[Any]]:
    """Layers of equal shapes stacked: by the paths of a kind, the nodes of each tree."""

    def together(paths: Kind) -> list[Any]:
        rows = ([tree[path] for tree in trees] for path in paths)
        return jax.tree.map(lambda *x: _stack(x), *rows)

    return {paths: together(paths) for paths in layer_kinds(*trees)}


def unstacked_layers(kinds: Mapping[Kind, Any]) -> dict[str, Any]:
    """The layers by path again."""
    return {
        path: layer
        for paths, nodes in kinds.items()
        for path, layer in zip(paths, _rows(nodes, len(paths)), strict=True)
    }


@jax.custom_vjp
def _stack(rows: Sequence[jax.Array]) -> jax.Array:
    """`jnp.stack`, whose gradient is taken apart by `_rows`."""
    return jnp.stack(rows)


_stack.defvjp(
    lambda rows: (jnp.stack(rows), None), lambda _, slope: (tuple(_rows(slope, len(slope))),)
)


def _rows(stacked: Any, count: int) -> list[Any]:
    """`[stacked[0], stacked[1], ...]`, by way of blocks of as many rows as there are blocks.

    To the compiler a slice from another place is another operation. The blocks come out of a loop,
    as arrays of their own, and the slices of one are those of all.
    """
    size = math.isqrt(count - 1) + 1
    blocks = -(-count // size)

    def block(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, [(0, blocks * size - count), *[(0, 0)] * (x.ndim - 1)])
        return filled.reshape(blocks, size, *x.shape[1:])

    def shift(queue: tuple[Any, ...], new: Any) -> tuple[tuple[Any, ...], None]:
        return (*queue[1:], new), None

    rows = jax.tree.map(block, stacked)
    zero = jax.tree.map(lambda x: jnp.zeros_like(x[0]), rows)
    queue, _ = jax.lax.scan(shift, (zero,) * blocks, rows)
    return [jax.tree.map(lambda x, i=i: x[i % size], queue[i // size]) for i in range(count)]


def sides(adapters: Adapters, names: str) -> PyTree:
    """The factors `'a'`, `'b'` or `'ab'` of an adapter tree."""
    return {path: [getattr(factors, name) for name in names] for path, factors in adapters.items()}


def absorb(server: Server, aggregated: Aggregated, head: Params) -> Server:
    """The server after a round: residual merged into the backbone, adapters and head replaced.

    Adapters that are None become zero: the backbone then holds the whole model. Kernels that a
    residual is merged into become float32, or it would be rounded away; see
    `fedlora_jax.federated.round.create`.
    """
    adapters = aggregated.adapters
    if adapters is None:
        adapters = jax.tree.map(jnp.zeros_like, server.trainable.adapters)
    backbone = server.backbone
    if aggregated.residual is not None:
        backbone = lora.widen(backbone, aggregated.residual)
        backbone = lora.merge(backbone, aggregated.residual, scale=server.scale)
    return server._replace(backbone=backbone, trainable=Trainable(adapters, head))


def mean(stacked: PyTree, weights: jax.Array) -> PyTree:
    """The weighted mean of arrays stacked along `[K]`; weights as in an aggregation function."""
    shares = aggregation.shares(weights)

    def average(x: jax.Array) -> jax.Array:
        wide = lowrank.wide(x)
        here = shares.astype(wide.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.sum(jnp.where(here > 0, wide * here, 0), axis=0).astype(x.dtype)

    return jax.tree.map(average, stacked)


def check_combination(method: Method, name: str, title: str) -> None:
    """Raises ValueError with the method's reason if it refuses the combination `name`."""
    reason = method.refuses.get(name)
    if reason:
        raise ValueError(f"the method cannot be combined with {title}: {reason}")


def trained_mask(start: Start) -> Trainable:
    """Booleans that broadcast against `start.trainable`: True where training moves it."""

    def sides_of(factors: Factors) -> Factors:
        columns = jnp.arange(factors.rank) < (factors.rank if start.rank is None else start.rank)
        return Factors(start.trains.a & columns, (start.trains.b & columns)[:, None])

    adapters = {path: sides_of(factors) for path, factors in start.trainable.adapters.items()}
    return Trainable(adapters, jax.tree.map(lambda _: jnp.asarray(True), start.trainable.head))


def change(start: Start, trainable: Trainable) -> Adapters:
    """A client's whole change of the shared backbone: its adapters and its frozen offset."""
    if start.offset is None:
        return trainable.adapters
    offset = start.offset
    return {
        path: lowrank.concatenate([factors, offset[path]]) if path in offset else factors
        for path, factors in trainable.adapters.items()
    }
