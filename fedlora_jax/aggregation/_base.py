"""What every aggregation function shares: its result, the checks on entry, and the jitted core."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax import lowrank
from fedlora_jax.lowrank import Factors

PyTree: TypeAlias = Any
Core: TypeAlias = Callable[..., "Aggregated"]


class Aggregated(NamedTuple):
    """What a server makes of its clients' adapters.

    The new global model is `backbone + scale * (residual + adapters)`.

    Attributes:
      adapters: The adapter tree from which clients continue, without the client axis; None if they
        start afresh.
      residual: A low-rank change to be merged into the frozen backbone, a tree of the same
        structure with ranks of its own; None if the backbone stays.
    """

    adapters: PyTree | None
    residual: PyTree | None


def leaves(tree: PyTree) -> list[Factors]:
    """The `Factors` nodes of an adapter tree, in order; anything else in it is an error.

    Raises:
      ValueError: If the tree holds no `Factors`, or something beside them.
    """
    nodes = jax.tree.leaves(tree, is_leaf=lowrank.is_factors)
    if not nodes or not all(map(lowrank.is_factors, nodes)):
        found = sorted({type(node).__name__ for node in nodes}) or ["nothing"]
        raise ValueError(
            "an adapter tree must have Factors(a, b) as its leaves and nothing else; "
            f"found {', '.join(found)}"
        )
    return nodes


def stack(clients: Sequence[PyTree], rank: int | None = None) -> PyTree:
    """Stacks the adapter trees of K clients along a new leading axis.

    Args:
      clients: Adapter trees of one structure, `Factors(a [d_in, r_k], b [r_k, d_out])`; the ranks
        may differ between clients and are zero-padded, which leaves the products as they are.
      rank: The rank to pad to; by default the largest of each kernel.

    Returns:
      Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.

    Raises:
      ValueError: If the trees differ in structure or in a dimension other than the rank.
    """

    def stacked(*factors: Factors) -> Factors:
        largest = max(f.rank for f in factors) if rank is None else rank
        padded = [lowrank.pad(f, largest) for f in factors]
        return jax.tree.map(lambda *x: jnp.stack(x), *padded)

    if not clients:
        raise ValueError("no clients to stack")
    return map_factors(stacked, *clients)


def names(tree: PyTree) -> list[str]:
    """The path of each `Factors` node as one string, keys joined by a slash."""
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lowrank.is_factors)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def map_factors(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` over the `Factors` nodes of adapter trees of one structure."""
    return jax.tree.map(function, tree, *rest, is_leaf=lowrank.is_factors)


def map_kernels(function: Callable[..., Any], *trees: PyTree) -> list[Any]:
    """`function(*factors)` for every kernel, kernels of equal shapes as one batch.

    A model has few kinds of kernels and many of each. One vmapped call a kind compiles in the time
    of one kernel and runs as a few batched operations.

    Args:
      function: From the `Factors` of one kernel, one for each tree, to any pytree of arrays.
      *trees: Adapter trees of one structure.

    Returns:
      A list of results in the order of `leaves`.
    """
    rows = list(zip(*(leaves(tree) for tree in trees), strict=True))
    kinds: dict[Hashable, list[int]] = {}
    for index, row in enumerate(rows):
        kinds.setdefault(tuple((x.shape, x.dtype) for x in jax.tree.leaves(row)), []).append(index)
    results: list[Any] = [None] * len(rows)
    for indices in kinds.values():
        if len(indices) == 1:
            results[indices[0]] = function(*rows[indices[0]])
            continue
        batch = jax.tree.map(lambda *x: jnp.stack(x), *(rows[i] for i in indices))
        outputs = jax.vmap(function)(*batch)
        for position, index in enumerate(indices):
            results[index] = jax.tree.map(lambda x, p=position: x[p], outputs)
    return results


def unflatten(tree: PyTree, nodes: Sequence[Any]) -> PyTree:
    """A tree of the structure of `tree` with `nodes` in place of its `Factors`."""
    structure = jax.tree.structure(tree, is_leaf=lowrank.is_factors)
    return jax.tree.unflatten(structure, nodes)


def run(
    core: Core,
    stacked: PyTree,
    weights: jax.Array,
    arrays: dict[str, Any] | None = None,
    **options: Hashable,
) -> Aggregated:
    """Checks the input, then runs `core(stacked, weights, **arrays, **options)` under jit.

    The core sees factors in float32 (float64 if they are), weights that sum to one, and zeros for
    clients of weight zero. What it returns goes back to the storage type of the input.

    Args:
      core: A function at module level, so that a second call finds its compiled program.
      stacked: Adapter tree with a leading client axis K.
      weights: `[K]`.
      arrays: Keyword arguments of the core that are pytrees of arrays.
      **options: Keyword arguments of the core that are fixed at compile time.

    Raises:
      ValueError: As described in the docstring of `fedlora_jax.aggregation`.
    """
    weights = jnp.asarray(weights)
    check(stacked, weights)
    result, finite = _run(stacked, weights, arrays or {}, core=core, options=tuple(options.items()))
    if _concrete(finite) and not np.all(finite):
        raise ValueError(_blame(stacked, np.flatnonzero(~np.asarray(finite))))
    return result


def check(stacked: PyTree, weights: jax.Array) -> None:
    """Raises ValueError unless shapes fit together and concrete weights are usable."""
    if weights.ndim != 1:
        raise ValueError(f"weights must have one axis [K], got shape {weights.shape}")
    clients = weights.shape[0]
    for name, node in zip(names(stacked), leaves(stacked), strict=True):
        a, b = jnp.shape(node.a), jnp.shape(node.b)
        if len(a) != 3 or len(b) != 3 or a[2] != b[1] or not a[0] == b[0] == clients:
            raise ValueError(
                f"adapter {name!r}: expected a [K={clients}, d_in, r] and b [K={clients}, r, "
                f"d_out] for {clients} weights, got a {list(a)} and b {list(b)}"
            )
    if not _concrete(weights):
        return
    values = np.asarray(weights, np.float64)
    if not np.all(np.isfinite(values)) or np.any(values < 0) or not np.any(values > 0):
        raise ValueError(
            "weights must be finite, non-negative and not all zero, got "
            f"{np.array2string(values, threshold=20)}"
        )


def present_clients(stacked: PyTree, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which clients count, and which of positive weight must not: two `[K]` boolean arrays.

    Returns:
      `present`: finite adapters and a finite weight above zero; and `finite`: False for a client
      of non-zero weight that is not present because something in it is not finite.
    """
    finite = jnp.isfinite(weights)
    for node in leaves(stacked):
        for x in node:
            finite &= jnp.all(jnp.isfinite(x), axis=(1, 2))
    present = finite & (weights > 0)
    return present, finite | (weights == 0)


def normalized(weights: jax.Array, present: jax.Array) -> jax.Array:
    """Weights of the present clients over their sum; all zero if nobody is present."""
    weights = jnp.where(present, weights, 0.0)
    total = jnp.sum(weights)
    return weights / jnp.where(total > 0, total, 1.0)


def prepared(stacked: PyTree, weights: jax.Array) -> tuple[PyTree, jax.Array, jax.Array]:
    """The input as a core sees it (see `run`), and `finite` of `present_clients`."""
    stacked = jax.tree.map(jnp.asarray, stacked)
    compute = jnp.promote_types(jnp.result_type(*jax.tree.leaves(stacked)), jnp.float32)
    weights = jnp.asarray(weights).astype(compute)
    present, finite = present_clients(stacked, weights)
    clean = jax.tree.map(lambda x: jnp.where(present[:, None, None], x, 0).astype(compute), stacked)
    return clean, normalized(weights, present), finite


@functools.partial(jax.jit, static_argnames=("core", "options"))
def _run(
    stacked: PyTree,
    weights: jax.Array,
    arrays: dict[str, Any],
    *,
    core: Core,
    options: tuple[tuple[str, Hashable], ...],
) -> tuple[Aggregated, jax.Array]:
    clean, shares, finite = prepared(stacked, weights)
    result = core(clean, shares, **arrays, **dict(options))
    storage = jnp.result_type(*jax.tree.leaves(stacked))
    return jax.tree.map(lambda x: x.astype(storage), result), finite


def _concrete(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def _blame(stacked: PyTree, clients: np.ndarray) -> str:
    client = int(clients[0])
    for name, node in zip(names(stacked), leaves(stacked), strict=True):
        for side, x in zip(Factors._fields, node, strict=True):
            if not np.all(np.isfinite(np.asarray(x[client], np.float32))):
                others = f" (and of {len(clients) - 1} more clients)" if len(clients) > 1 else ""
                return (
                    f"the upload of client {client}{others} is not finite: first in factor "
                    f"{side!r} of {name!r}. Give it weight 0 to leave it out."
                )
    return f"the uploads of clients {clients.tolist()} are not finite"
