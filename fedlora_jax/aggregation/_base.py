"""What every aggregation function shares: its result, the checks on entry, and the jitted core."""

import functools
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedlora_jax import _batching, _linalg, bounds, lowrank
from fedlora_jax.lowrank import Factors

PyTree: TypeAlias = Any
# Of K clients: `[K]`, or a sequence of K numbers.
Weights: TypeAlias = ArrayLike | Sequence[ArrayLike]
Core: TypeAlias = Callable[..., "Aggregated"]
Options: TypeAlias = tuple[tuple[str, Hashable], ...]
# What all kernels share: weights, whose uploads are kept, and arrays of the core.
_Common: TypeAlias = tuple[jax.Array, jax.Array | None, dict[str, Any]]

# Bytes of the stacked factors of one kernel up to which kernels of a kind are copied together.
_LARGEST_BATCHED = 1 << 20
# Factors that differ by less, relative to their largest entry, are the same.
_ROUNDING = 1e-2


class UnequalFactors(UserWarning):
    """A method that takes one factor for all clients was given clients that differ in it."""


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
      ValueError: If the trees differ in structure or in a dimension other than the rank; it names
        the client and the kernel.
    """
    if isinstance(clients, Mapping):
        raise ValueError(
            f"clients must be a sequence of adapter trees, got {type(clients).__name__}; of a "
            "mapping from clients to adapter trees stack list(clients.values())"
        )

    def stacked(*factors: Factors) -> Factors:
        largest = max(f.rank for f in factors) if rank is None else rank
        padded = [lowrank.pad(f, largest) for f in factors]
        return jax.tree.map(lambda *x: jnp.stack(x), *padded)

    if not clients:
        raise ValueError("no clients to stack")
    for index, client in enumerate(clients):
        _check_alike(index, client, clients[0])
    return map_factors(stacked, *clients)


def _check_alike(index: int, client: PyTree, first: PyTree) -> None:
    """Raises ValueError unless a client's kernels are those of the first one."""
    mine, theirs = names(client), names(first)
    if mine != theirs:
        raise ValueError(f"client {index} sent kernels {mine}, client 0 {theirs}")
    if structure(client) != structure(first):
        kinds = [type(tree).__name__ for tree in (client, first)]
        raise ValueError(
            f"client {index} sent a {kinds[0]}, client 0 a {kinds[1]}: trees of one structure are "
            "expected, in what lies within them too"
        )
    for name, node, other in zip(mine, leaves(client), leaves(first), strict=True):
        a, b = jnp.shape(node.a), jnp.shape(node.b)
        if len(a) > 2 and len(b) > 2:
            raise ValueError(
                f"client {index}, adapter {name!r}: expected a [d_in, r] and b [r, d_out], got "
                f"a {list(a)} and b {list(b)}. Map over stacked layers, with jax.vmap"
            )
        sizes = [jnp.shape(other.a)[0], jnp.shape(other.b)[-1]]
        if len(a) != 2 or len(b) != 2 or a[1] != b[0] or [a[0], b[1]] != sizes:
            raise ValueError(
                f"client {index}, adapter {name!r}: expected a [{sizes[0]}, r] and "
                f"b [r, {sizes[1]}], got a {list(a)} and b {list(b)}"
            )


def names(tree: PyTree) -> list[str]:
    """The path of each `Factors` node as one string, keys joined by a slash."""
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lowrank.is_factors)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def map_factors(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` over the `Factors` nodes of adapter trees of one structure."""
    return jax.tree.map(function, tree, *rest, is_leaf=lowrank.is_factors)


def unflatten(tree: PyTree, nodes: Sequence[Any]) -> PyTree:
    """A tree of the structure of `tree` with `nodes` in place of its `Factors`."""
    return jax.tree.unflatten(structure(tree), nodes)


def structure(tree: PyTree) -> Any:
    """What a tree is made of, down to its `Factors` nodes."""
    return jax.tree.structure(tree, is_leaf=lowrank.is_factors)


def run(
    core: Core,
    stacked: PyTree,
    weights: Weights,
    *,
    trees: Sequence[PyTree] = (),
    arrays: dict[str, Any] | None = None,
    absent_kept: bool = False,
    **options: Hashable,
) -> Aggregated:
    """`each_kernel` of a core that returns `Aggregated` for one kernel; the tree put together.

    What the core returns goes back to the storage type of the input.
    """
    nodes = each_kernel(
        core, stacked, weights, trees=trees, arrays=arrays, absent_kept=absent_kept, **options
    )

    def together(parts: Sequence[Factors | None]) -> PyTree | None:
        return None if parts[0] is None else unflatten(stacked, parts)

    return Aggregated(
        adapters=together([node.adapters for node in nodes]),
        residual=together([node.residual for node in nodes]),
    )


@_linalg.numpy_promotion()
def each_kernel(
    core: Callable[..., Any],
    stacked: PyTree,
    weights: Weights,
    *,
    trees: Sequence[PyTree] = (),
    arrays: dict[str, Any] | None = None,
    absent_kept: bool = False,
    **options: Hashable,
) -> list[Any]:
    """Checks the input, then runs `core(clients, weights, *nodes, **arrays, **options)`.

    The core sees one kernel: its factors in float32 (float64 if they are), weights that sum to
    one, and the nodes of `trees` that belong to it. The factors of a client of weight zero are
    zeros, which a core must not use but through that weight.

    A model has few kinds of kernels and many of each. Small ones of a kind run as a batch, large
    ones in turn through one compiled program: what a batch would save, copying them into it costs
    again. Inside somebody else's jit every kind is a batch.

    Args:
      core: A function at module level, so that a second call finds its compiled program.
      stacked: Adapter tree with a leading client axis K.
      weights: `[K]`.
      trees: Further adapter trees of the same structure, to be passed by position.
      arrays: Keyword arguments of the core that are arrays, the same for all kernels.
      absent_kept: Whether the core sees what clients of weight zero hold, where that is finite.
      **options: Keyword arguments of the core that are fixed at compile time.

    Returns:
      What the core returned for each kernel, in the order of `leaves`.

    Raises:
      ValueError: As described in the docstring of `fedlora_jax.aggregation`.
    """
    stacked = jax.tree.map(jnp.asarray, stacked)
    known, arrays = wide(weights), arrays or {}
    check(stacked, known)
    for tree in trees:
        check_fit(stacked, tree)
    traced = not all(map(_concrete, jax.tree.leaves((stacked, list(trees), known, arrays))))
    if not traced and not absent_kept and np.any(known == 0):
        # Outside of the core's program, so that nothing is copied where all are present.
        stacked = _masked_at_once(stacked, jnp.asarray(known > 0))
    rows = list(zip(*(leaves(tree) for tree in (stacked, *trees)), strict=True))
    run_rows = functools.partial(_run_rows, core, tuple(options.items()), rows, arrays)
    if traced:
        finite = finite_everywhere(stacked)
        shares = normalized(known, finite & (known > 0) & (known < jnp.inf))
        return run_rows(shares, finite if absent_kept else shares > 0, largest=None)[0]
    shares = normalized(known, known > 0)
    results, found = run_rows(shares, None, largest=_LARGEST_BATCHED)
    if np.all(jax.device_get(found)):
        return results
    healthy = np.asarray(finite_everywhere(stacked))
    if np.all(healthy):
        return results
    sick = np.flatnonzero(~healthy & (np.asarray(known) > 0))
    if len(sick):
        raise ValueError(_blame(stacked, sick))
    return run_rows(shares, jnp.asarray(healthy), largest=_LARGEST_BATCHED)[0]


def _masked(clients: PyTree, kept: jax.Array) -> PyTree:
    """Zeros for the clients that are not kept."""
    return jax.tree.map(lambda x: jnp.where(kept[:, None, None], x, 0), clients)


_masked_at_once = jax.jit(_masked)


def _run_rows(
    core: Callable[..., Any],
    options: Options,
    rows: list[tuple[Factors, ...]],
    arrays: dict[str, Any],
    shares: jax.Array,
    kept: jax.Array | None,
    *,
    largest: int | None,
) -> tuple[list[Any], list[jax.Array]]:
    """Results of the core by kernel and, if `kept` is not given, whether there is any doubt."""
    kinds: dict[Hashable, list[int]] = {}
    for index, row in enumerate(rows):
        kind = tuple((x.shape, x.dtype) for x in jax.tree.leaves(row))
        large = largest is not None and sum(x.nbytes for x in row[0]) > largest
        kinds.setdefault((index, kind) if large else kind, []).append(index)
    results: list[Any] = [None] * len(rows)
    found: list[jax.Array] = [jnp.asarray(True)] * len(rows)
    common = shares, kept, arrays
    for indices in kinds.values():
        batch = [rows[index] for index in indices]
        outputs = _run_kind(batch, common, core=core, options=options)
        for index, (result, healthy) in zip(indices, outputs, strict=True):
            results[index], found[index] = result, healthy
    return results, found


def _run_kind(
    batch: list[tuple[Factors, ...]], common: _Common, **fixed: Any
) -> list[tuple[Any, jax.Array]]:
    dealer = _batching.dealer()
    if dealer is None:
        return _run_batch(batch, common, **fixed)
    # What is as large as the uploads, as sums that are written by stacking, is not sent to all.
    sizes = jax.eval_shape(functools.partial(_run_batch, **fixed), batch[:1], common)[0]
    if 2 * _num_bytes(sizes) > _num_bytes(batch[0]):
        return _run_undealt(batch, common, **fixed)
    outputs = _run_dealt(dealer.deal(batch), common, devices=dealer.devices, **fixed)
    return dealer.collect(outputs, len(batch))


def _num_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnames=("core", "options"))
def _run_batch(
    batch: list[tuple[Factors, ...]], common: _Common, *, core: Callable[..., Any], options: Options
) -> list[tuple[Any, jax.Array]]:
    return _batching.over_rows(_one_kernel(core, options), common, batch)


@functools.partial(jax.jit, static_argnames=("core", "options"))
def _run_undealt(
    batch: list[tuple[Factors, ...]], common: _Common, *, core: Callable[..., Any], options: Options
) -> list[tuple[Any, jax.Array]]:
    return _batching.over_batch(_one_kernel(core, options), common, batch)


@functools.partial(jax.jit, static_argnames=("core", "options", "devices"))
def _run_dealt(
    batch: tuple[Factors, ...],
    common: _Common,
    *,
    core: Callable[..., Any],
    options: Options,
    devices: _batching.Devices,
) -> tuple[Any, jax.Array]:
    return _batching.over_dealt(_one_kernel(core, options), common, batch, devices)


def _one_kernel(core: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """The core on `(common, clients, *nodes)`, and whether all that the clients sent is finite."""

    def one(common: _Common, clients: Factors, *nodes: Factors) -> tuple[Any, jax.Array]:
        shares, kept, arrays = common
        storage = jnp.result_type(*clients)
        compute = jnp.promote_types(storage, jnp.float32)
        back = storage if jnp.issubdtype(storage, jnp.floating) else compute
        # The fastest way to read everything: a sum is finite only if its terms are. That of finite
        # terms may overflow; doubts are looked into outside.
        healthy = jnp.all(jnp.isfinite(jnp.stack([jnp.sum(x) for x in clients])))
        if kept is not None:
            clients = _masked(clients, kept)
        wide, others = jax.tree.map(lambda x: x.astype(compute), (clients, nodes))
        result = core(wide, shares.astype(compute), *others, **arrays, **dict(options))
        if isinstance(result, Aggregated):
            result = jax.tree.map(lambda x: x.astype(back), result)
        return result, healthy

    return one


def check(stacked: PyTree, weights: np.ndarray | jax.Array) -> None:
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
        if 0 in (*a[1:], *b[1:]):
            raise ValueError(
                f"adapter {name!r}: expected d_in, r and d_out of at least 1, got a {list(a)} and "
                f"b {list(b)}"
            )
    if not isinstance(weights, np.ndarray):
        return
    if not np.all(np.isfinite(weights)) or np.any(weights < 0) or not np.any(weights > 0):
        raise ValueError(
            "weights must be finite, non-negative and not all zero, got "
            f"{np.array2string(weights, threshold=20)}"
        )


def check_fit(stacked: PyTree, tree: PyTree) -> None:
    """Raises ValueError unless `tree` has the structure of `stacked` and its kernels' sizes."""
    if names(stacked) != names(tree):
        raise ValueError(
            f"adapter trees of one structure expected, got kernels {names(stacked)} "
            f"and {names(tree)}"
        )
    for name, node, other in zip(names(stacked), leaves(stacked), leaves(tree), strict=True):
        a, b = jnp.shape(other.a), jnp.shape(other.b)
        sizes = node.a.shape[-2], node.b.shape[-1]
        if len(a) < 2 or len(b) < 2 or (a[-2], b[-1]) != sizes or a[-1] != b[-2]:
            raise ValueError(
                f"adapter {name!r} is of a kernel {list(sizes)}, but a factored matrix "
                f"a {list(a)}, b {list(b)} was given for it"
            )


def finite_everywhere(stacked: PyTree) -> jax.Array:
    """Which clients hold finite factors alone, `[K]`."""
    # Not by the largest value: on a CPU a maximum over thousands of numbers passes NaN over.
    return jax.lax.stop_gradient(_linalg.finite_rows(jax.tree.leaves(stacked)))


def present_clients(stacked: PyTree, weights: Weights) -> tuple[jax.Array, jax.Array]:
    """Which clients count, and which of positive weight must not: two `[K]` boolean arrays.

    Returns:
      `present`: finite adapters and a finite weight above zero; and `finite`: False for a client
      of non-zero weight that is not present because something in it is not finite.
    """
    known = wide(weights)
    finite = finite_everywhere(stacked) & (known < jnp.inf) & (known > -jnp.inf)
    return finite & (known > 0), finite | (known == 0)


def warn_of_unequal(
    function: str, side: str, stacked: PyTree, weights: Any, initial: PyTree | None = None
) -> None:
    """Warns of clients whose factor that should be common is another; traced values pass."""
    if found := unequal(side, stacked, weights, initial):
        client, name = found
        warnings.warn(
            f"{function} takes one {side!r} for all clients, but that of client {client} is "
            f"another in {name!r}: it is not used, and the result is not the mean of the products",
            UnequalFactors,
            stacklevel=3,
        )


@_linalg.numpy_promotion()
def unequal(
    side: str, stacked: PyTree, weights: Any, initial: PyTree | None = None
) -> tuple[int, str] | None:
    """A client that does not hold the factor of the others, and a kernel in which it does not.

    Columns of `a` that meet nothing but zeros in the client's `b` do not count, nor such rows of
    `b`. Values that differ by rounding are the same.

    Args:
      side: `'a'` or `'b'`, which of them should be common.
      stacked: Adapter tree with a leading client axis K.
      weights: `[K]`; a client of weight 0 may hold anything.
      initial: Adapter tree with the common factor; by default that of the first client present.

    Returns:
      None if all hold the same, or values are traced.
    """
    if not all(map(_concrete, jax.tree.leaves((stacked, weights, initial)))):
        return None
    present = np.flatnonzero(np.asarray(weights, np.float64) > 0)
    if not len(present):
        return None
    given = leaves(stacked) if initial is None else leaves(initial)
    common = [jnp.asarray(getattr(node, side)) for node in given]
    if initial is None:
        common = [factor[present[0]] for factor in common]
    theirs = [getattr(node, side) for node in leaves(stacked)]
    # As they should be, which is read in a quarter of the time of what follows.
    if all(jax.device_get([_same(*pair) for pair in zip(theirs, common, strict=True)])):
        return None
    apart = [_differs(*pair, side=side) for pair in zip(leaves(stacked), common, strict=True)]
    # All at once, so that no kernel is waited for before the next one is begun.
    for name, differs in zip(names(stacked), jax.device_get(apart), strict=True):
        if differs[present].any():
            return int(present[differs[present].argmax()]), name
    return None


@jax.jit
def _same(clients: jax.Array, common: jax.Array) -> jax.Array:
    """Whether all clients hold the common factor, to the bit; False if one holds a NaN."""
    if clients.shape[1:] != common.shape:
        return jnp.asarray(False)
    # A sum is the fastest way to read.
    return jnp.sum(jnp.abs(clients - common)) == 0


@functools.partial(jax.jit, static_argnames="side")
def _differs(clients: Factors, common: jax.Array, *, side: str) -> jax.Array:
    """Whether the factor of a client is another than the common one, where it counts, `[K]`."""
    if side == "b":
        clients, common = Factors(*(jnp.swapaxes(x, 1, 2) for x in clients[::-1])), common.T
    missing = clients.a.shape[2] - common.shape[1]
    common = jnp.pad(common, ((0, 0), (0, max(missing, 0))))[:, : clients.a.shape[2]]
    used = jnp.any(clients.b != 0, axis=2)
    size = jnp.max(jnp.abs(clients.a), axis=(1, 2), initial=0)
    distance = jnp.max(jnp.where(used[:, None], jnp.abs(clients.a - common), 0), axis=(1, 2))
    return distance > _ROUNDING * size


def first_present(clients: Factors, weights: jax.Array) -> Factors:
    """The factors of the first client of positive weight, to the bit; zero if there is none."""
    first = jnp.argmax(weights > 0)
    return jax.tree.map(lambda x: jnp.where(jnp.any(weights > 0), x[first], 0), clients)


def check_static(function: str, **options: Any) -> None:
    """Checks options that shape the program: Python numbers, within their bounds.

    Raises:
      ValueError: If one is not.
    """
    for name, value in options.items():
        if isinstance(value, jax.Array):
            raise ValueError(
                f"{function}: {name} must be a Python number, for the program depends on it (under "
                f"jit, a static argument), got {value}"
            )
    bounds.check(function, **options)


def check_rank(function: str, rank: int | None, stacked: PyTree) -> None:
    """Raises ValueError unless `rank` is None, or what each kernel can have."""
    check_static(function, rank=rank)
    if rank is None:
        return
    for name, node in zip(names(stacked), leaves(stacked), strict=True):
        sizes = *jnp.shape(node.a)[-2:-1], *jnp.shape(node.b)[-1:]
        if rank > min(sizes):
            raise ValueError(
                f"{function}: rank {rank} is impossible for kernel {name!r} {list(sizes)}: "
                f"expected 1 to {min(sizes)}"
            )


def cut(adapters: PyTree, ranks: ArrayLike | Sequence[int]) -> PyTree:
    """What clients of unequal ranks continue from: the first `ranks[k]` columns of the adapters.

    Args:
      adapters: Adapter tree of `Factors(a [d_in, r], b [r, d_out])`. The first columns are the
        best approximation only if directions are in descending order: `flexlora`, `fedsvd` and
        `spectral` leave them so, after any other function `ordered` puts them in order.
      ranks: `[K]`.

    Returns:
      Stacked adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`, zero beyond `ranks[k]`.

    Raises:
      ValueError: If the tree holds no `Factors`, or something beside them.
    """
    leaves(adapters)
    ranks = jnp.asarray(ranks)
    return map_factors(lambda factors: lowrank.cut(factors, ranks), adapters)


def wide(weights: Weights) -> np.ndarray | jax.Array:
    """Weights of any type, in which none of them wraps around, overflows or vanishes.

    Returns:
      float64 on the host if the values are known; traced ones in float32 at the least.
    """
    if all(map(_concrete, jax.tree.leaves(weights))):
        return np.asarray(weights, np.float64)
    return lowrank.wide(jnp.asarray(weights))


def normalized(weights: np.ndarray | jax.Array, present: np.ndarray | jax.Array) -> jax.Array:
    """Weights of the present clients over their sum; all zero if nobody is present.

    They are brought near one first, so that no sum of them overflows or vanishes, and a client that
    is present keeps a positive share. Traced weights below the smallest normal number (1.2e-38) are
    zero where the device takes them for zero, as XLA does on a CPU.

    Args:
      weights: `[K]`, from `wide`.
      present: Which clients count, boolean `[K]`.

    Returns:
      `[K]`, of one type whatever that of the weights.
    """
    if isinstance(weights, np.ndarray):
        weights = weights / (np.max(weights, initial=0, where=weights > 0) or 1)
    xp = np if isinstance(weights, np.ndarray) and isinstance(present, np.ndarray) else jnp
    weights = xp.where(present, weights, 0.0)
    largest = xp.max(weights)
    # By a power of two: a compiler may divide by multiplying with an inverse that is no number.
    weights = weights * xp.where(largest > 2.0**64, 2.0**-64, 1.0)
    weights = weights * xp.where(largest < 2.0**-64, 2.0**64, 1.0)
    total = xp.sum(weights)
    smallest = np.finfo(np.float32).tiny
    shares = xp.where(present, xp.maximum(weights / xp.where(total > 0, total, 1), smallest), 0)
    return jnp.asarray(shares)


def shares(weights: Weights) -> jax.Array:
    """Weights over their sum, as every function here takes them.

    Args:
      weights: `[K]`, numbers of any type and size. Those that are negative or not finite count as
        zero.

    Returns:
      `[K]`, of sum one, or all zero if no weight is positive.

    Examples:
      >>> from fedlora_jax import aggregation
      >>> print(aggregation.shares([6_000_000_000, 2_000_000_000]))
      [0.75 0.25]
    """
    known = wide(weights)
    return normalized(known, (known > 0) & (known < jnp.inf))


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
