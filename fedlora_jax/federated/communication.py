"""What crosses between clients and server, counted in bytes of the arrays as they are stored."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax import lora, lowrank
from fedlora_jax.aggregation import Aggregated
from fedlora_jax.federated.outline import outline
from fedlora_jax.lowrank import Factors
from fedlora_jax.methods import Method, Server

PyTree: TypeAlias = Any


class MessageBytes(NamedTuple):
    """Bytes of one client in one round.

    Attributes:
      up: What it sends.
      down: What it receives.
      catch_up: What it receives besides, because it was absent before: the residuals that the
        backbone has absorbed meanwhile, or the whole adapted kernels where these are smaller; and
        what else has changed of what it holds.
    """

    up: float
    down: float
    catch_up: float


class Messages(NamedTuple):
    """The shapes of what a round of a method makes, see `messages`."""

    upload: PyTree
    aggregated: PyTree


def messages(method: Method, server: Server, client: PyTree, cohort_size: int) -> Messages:
    """The shapes of a client's upload and of the aggregate, without computing anything.

    Args:
      method: How clients and server work together.
      server: The server's state.
      client: The state of any client.
      cohort_size: K.
    """
    made = outline(method, server, client, jnp.int32(1), cohort_size)
    return Messages(made.upload, made.aggregated)


def count(
    method: Method,
    server: Server,
    made: Messages,
    round_index: int,
    *,
    rank: int | None = None,
    absent: int = 0,
) -> MessageBytes:
    """Bytes of a client in a round.

    Args:
      method: How clients and server work together.
      server: Its state after the round. `spectral` looks at its values.
      made: From `messages`.
      round_index: The round.
      rank: The client's; by default that of the server's adapters. What is stacked from a cohort is
        counted as if all in it had this rank, so that the mean over a cohort is right. Any other
        residual is counted whole.
      absent: Rounds since the client last took part, without this one.
    """
    known, upload, aggregated = server, made.upload, made.aggregated
    if rank is not None:
        full = max(factors.rank for factors in server.trainable.adapters.values())
        known, upload, aggregated = _narrow((server, upload, aggregated), rank, full)
        if method.whole_adapters:
            known = known._replace(trainable=server.trainable)
        if aggregated is not None and not method.stacked_residual:
            aggregated = aggregated._replace(residual=made.aggregated.residual)
    return MessageBytes(
        up=_bytes(method.sent(upload, round_index)),
        down=_bytes(method.received(known, aggregated, round_index)),
        catch_up=_catch_up(method, known, aggregated, round_index, absent) if absent else 0,
    )


def _catch_up(
    method: Method, server: Server, aggregated: Aggregated | None, round_index: int, absent: int
) -> int:
    missed = _bytes(method.missed(server, aggregated, round_index, absent))
    if missed:
        missed = min(missed, _bytes(_adapted_kernels(server)))
    return missed + _bytes(method.outdated(server, aggregated, round_index))


def absences(last: np.ndarray, cohort: np.ndarray, round_index: int) -> np.ndarray:
    """For each client of a round, the rounds since it took part before; from the start on if never.

    Args:
      last: The last round before this one that each client took part in, or -1, `[N]`.
      cohort: The clients of the round, `[K]`.
      round_index: The round.
    """
    return round_index - last[cohort] - 1


def _adapted_kernels(server: Server) -> PyTree:
    kernels = jax.eval_shape(lora.kernels, server.backbone)
    return [kernels[path] for path in server.trainable.adapters]


def _narrow(tree: PyTree, rank: int, full: int) -> PyTree:
    """The tree as it would be with `rank` in place of `full`: all its factors are that narrower."""

    def narrow(node: Any) -> Any:
        if not lowrank.is_factors(node):
            return node
        width = node.rank * rank // full
        return Factors(_first(node.a, width, -1), _first(node.b, width, -2))

    return jax.tree.map(narrow, tree, is_leaf=lowrank.is_factors)


def _first(x: Any, width: int, axis: int) -> Any:
    if width == x.shape[axis]:
        return x
    if isinstance(x, jax.Array):
        return jax.lax.slice_in_dim(x, 0, width, axis=axis)
    shape = list(x.shape)
    shape[axis] = width
    return jax.ShapeDtypeStruct(shape, x.dtype)


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
