"""Aggregation in spite of hostile clients: by their distances from each other, or entry by entry.

The inner products of the clients' changes are a `[K, K]` matrix, whatever the size of the model.
From it follow norms, distances, and what each client should count, which any aggregation function
takes as weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedlora_jax import _linalg, bounds, lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import PyTree, Weights
from fedlora_jax.lowrank import Factors

# Steps of Weiszfeld's iteration; of 40% hostile clients a million times as far away as the others,
# nothing is left after 70.
_STEPS = 100
# Distances are smoothed below this share of the typical one between clients.
_SMOOTHING = 1e-4
# A product that should be a whole number may lie above it by rounding.
_ROUNDING = 1e-4


@_linalg.numpy_promotion()
def gram(
    stacked: PyTree,
    weights: Weights,
    *,
    reference: PyTree | None = None,
    scale: ArrayLike = 1.0,
) -> jax.Array:
    r"""Inner products of the clients' changes, all kernels and the head together.

    .. math::
      G_{kl} = s^2 \sum_{kernels} \langle \Delta_k, \Delta_l \rangle_F
      + \sum_{arrays} \langle x_k - x_0, x_l - x_0 \rangle, \qquad
      \Delta_k = a_k b_k - a_0 b_0

    The products are taken in factored form, by blocks of the size of the rank:

    .. math::
      \Delta_k = [a_k - a_0 \mid a_0] \begin{bmatrix} b_k \\ b_k - b_0 \end{bmatrix}, \qquad
      \langle a_k b_k, a_l b_l \rangle_F = \mathrm{tr}\left( (a_k^T a_l) (b_l b_k^T) \right)

    so that what clients have in common cancels before anything is squared. A client's factors in
    another basis are the same client. Distances below 1e-3 of the changes are rounding.

    Cost: :math:`O(K^2 r^2 (d_{in} + d_{out}))`, in the memory of one row of blocks.

    Args:
      stacked: A pytree of `Factors(a [K, ..., d_in, r], b [K, ..., r, d_out])`, and of arrays
        `[K, ...]`, such as a head that is trained besides.
      weights: `[K]`, non-negative; a client of weight zero is absent.
      reference: Where the clients started from, a pytree of the same structure without the axis K;
        by default zero.
      scale: s, of the products alone.

    Returns:
      `[K, K]`, float32 at the least. Zero for absent clients; a client whose change is not finite,
      or too large to be squared, has an infinite entry on the diagonal and zeros beside it.

    Raises:
      ValueError: On weights or factors that cannot be used, see `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.array([[[1.]], [[3.]]]), jnp.array([[[1.]], [[3.]]]))}
      >>> print(aggregation.gram(stacked, jnp.ones(2)))  # products 1 and 9
      [[ 1.  9.]
       [ 9. 81.]]
    """
    named, arrays, starts = _parts(stacked, reference)
    present = _base.normalized(known := _base.wide(weights), (known > 0) & (known < jnp.inf)) > 0
    total = jnp.zeros((len(present), len(present)))
    if named:
        trees = [] if reference is None else [starts]
        blocks = _base.each_kernel(_products, named, weights, trees=trees)
        total += jnp.asarray(scale, jnp.float32) ** 2 * sum(blocks[1:], blocks[0])
        present &= _base.finite_everywhere(named)
    for change in arrays:
        flat = change.reshape(len(present), -1)
        present &= _linalg.finite_rows([flat])
        flat = jnp.where(present[:, None], flat, 0)
        total += lowrank.matmul(flat, flat.T)
    usable = present & jnp.isfinite(jnp.diagonal(total))
    total = jnp.where(usable[:, None] & usable, total, 0)
    sick = ~usable & jnp.asarray(known > 0)
    return jnp.where(jnp.eye(len(total), dtype=bool) & sick, jnp.inf, total)


@_linalg.numpy_promotion()
def clip_scales(gram: jax.Array, weights: Weights, *, norm: ArrayLike | None = None) -> jax.Array:
    r"""What each client's change is to be multiplied by, so that no norm exceeds a bound.

    .. math:: c_k = \min\left(1, \frac{C}{\lVert \Delta_k \rVert}\right)

    One client can then move the mean by no more than :math:`p_k C`. With C the median norm, a
    minority of clients cannot raise it beyond the norms of the others; without outliers half of the
    clients are clipped a little.

    Args:
      gram: Of the clients' changes, `[K, K]`, from `gram`.
      weights: `[K]`, non-negative; a client of weight zero is absent.
      norm: C; by default the median norm of the clients that are present.

    Returns:
      `[K]`, from 0 to 1; 0 for a client that is absent or of infinite norm.

    Raises:
      ValueError: If the norm is not positive.

    References:
      Sun et al., *Can You Really Backdoor Federated Learning?*, 2019, arXiv:1911.07963.
    """
    bounds.check("robust", norm=norm)
    gram, shares = _usable(gram, weights)
    present, norms = shares > 0, lowrank.safe_sqrt(jnp.diagonal(gram))
    if norm is None:
        norm = _median(norms[:, None], present)[0]
    scales = jnp.where(norms > norm, norm / jnp.where(norms > 0, norms, 1), 1)
    return jnp.where(present, scales, 0)


@_linalg.numpy_promotion()
def krum_weights(
    gram: jax.Array, weights: Weights, *, byzantine: float, multi: bool = False
) -> jax.Array:
    r"""Weights of the client, or the clients, with the nearest neighbours.

    Of n clients that are present f are taken for hostile, the share `byzantine` of them, rounded
    up. A client's score is the sum of the squared distances to its n - f - 2 nearest others. Krum
    takes the client of the smallest score; Multi-Krum the mean of the n - f - 2 of the smallest.

    Tolerates f hostile clients of n >= 2 f + 3. With fewer clients the nearest one alone is looked
    at, and nothing is promised.

    Args:
      gram: Of the clients' changes, `[K, K]`, from `gram`.
      weights: `[K]`, non-negative; a client of weight zero is absent.
      byzantine: Share of the clients that may be hostile, at least 0 and below 1/2.
      multi: Whether to take the mean of many.

    Returns:
      `[K]`, of sum one: the clients' shares of those selected.

    Raises:
      ValueError: If the share is out of its bounds, or the weights are known and there are fewer
        than 2 f + 3 clients.

    References:
      Blanchard, El Mhamdi, Guerraoui, Stainer, *Machine Learning with Adversaries: Byzantine
      Tolerant Gradient Descent*, NeurIPS 2017, arXiv:1703.02757.
    """
    bounds.check("robust", byzantine=byzantine)
    known = _base.wide(weights)
    if isinstance(known, np.ndarray):
        check_krum(int(np.sum(known > 0)), byzantine)
    gram, shares = _usable(gram, weights)
    present = shares > 0
    count = jnp.sum(present)
    near = jnp.maximum(count - _hostile(count, byzantine) - 2, 1)
    others = ~jnp.eye(len(gram), dtype=bool) & present
    distances = jnp.sort(jnp.where(others, _squared_distances(gram), jnp.inf), axis=1)
    scores = jnp.sum(jnp.where(jnp.arange(len(gram)) < near, distances, 0), axis=1)
    # A client alone has no neighbours.
    scores = jnp.where(present, jnp.minimum(scores, jnp.finfo(scores.dtype).max), jnp.inf)
    places = jnp.argsort(jnp.argsort(scores))
    return _base.normalized(shares, present & (places < (near if multi else 1)))


def check_krum(count: int, byzantine: float) -> None:
    """Raises ValueError if Krum promises nothing for so many clients."""
    hostile = int(_hostile(np.asarray(count), byzantine))
    if count < 2 * hostile + 3:
        raise ValueError(
            f"krum needs at least 2 f + 3 = {2 * hostile + 3} clients a round against "
            f"f = {hostile} hostile ones (a share of {byzantine:g}), and there are {count}"
        )


@_linalg.numpy_promotion()
def geometric_median_weights(gram: jax.Array, weights: Weights) -> jax.Array:
    r"""Weights whose mean of the changes is their geometric median.

    .. math::
      v = \arg\min_v \sum_k p_k \lVert v - \Delta_k \rVert = \sum_k \beta_k \Delta_k, \qquad
      \beta_k \propto \frac{p_k}{\max(\nu, \lVert v - \Delta_k \rVert)}

    by 100 steps of Weiszfeld's iteration on :math:`\beta`, in which
    :math:`\lVert v - \Delta_k \rVert^2 = \beta^T G \beta - 2 (G \beta)_k + G_{kk}`, and
    :math:`\nu` is 1e-4 of the typical distance between clients. It does not depend on a reference,
    and needs no number of hostile clients.

    Tolerates hostile clients of less than half of the weight.

    Args:
      gram: Of the clients' changes, `[K, K]`, from `gram`.
      weights: `[K]`, non-negative; a client of weight zero is absent.

    Returns:
      `[K]`, of sum one.

    References:
      Pillutla, Kakade, Harchaoui, *Robust Aggregation for Federated Learning*, IEEE Transactions on
      Signal Processing 2022, arXiv:1912.13445.
    """
    gram, shares = _usable(gram, weights)
    # A squared distance is a sum of four of its entries, and could overflow.
    gram = gram / 8
    present, squares = shares > 0, jnp.diagonal(gram)
    others = ~jnp.eye(len(gram), dtype=bool) & present
    apart = lowrank.safe_sqrt(_squared_distances(gram))
    typical = jax.vmap(lambda row, others: _median(row[:, None], others)[0])(apart, others)
    # A client alone is far from nobody.
    typical = jnp.where(jnp.any(others, axis=1), typical, 0)
    smallest = jnp.maximum(_SMOOTHING * _median(typical[:, None], present)[0], 1e-30)

    def nearer(distances: jax.Array) -> jax.Array:
        return _base.normalized(shares * (smallest / jnp.maximum(smallest, distances)), present)

    def step(_: int, beta: jax.Array) -> jax.Array:
        along = lowrank.matmul(gram, beta)
        return nearer(lowrank.safe_sqrt(squares - 2 * along + lowrank.matmul(beta, along)))

    # From the mean it would take many steps only to leave those who are far away behind.
    return jax.lax.fori_loop(0, _STEPS, step, nearer(typical))


@_linalg.numpy_promotion()
def coordinate_median(stacked: PyTree, weights: Weights) -> PyTree:
    """The median of each entry over the clients that are present, each of which counts equally.

    Of factors it is the median of each factor's entries, not of products: it makes sense where all
    clients train in one basis, from one start, and then moves no entry beyond those of a majority.
    Tolerates less than half of the clients.

    Args:
      stacked: A pytree of arrays `[K, ...]`, adapters and others.
      weights: `[K]`, non-negative; a client of weight zero is absent, the others count equally.
        Outside of that, one with anything that is not finite counts as absent.

    Returns:
      The pytree without the axis K; zero if nobody is present.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import aggregation
      >>> print(aggregation.coordinate_median(jnp.array([[1.], [2.], [1e9], [3.]]), jnp.ones(4)))
      [2.5]

    References:
      Yin, Chen, Ramchandran, Bartlett, *Byzantine-Robust Distributed Learning: Towards Optimal
      Statistical Rates*, ICML 2018, arXiv:1803.01498.
    """
    return _entrywise(stacked, weights, _median)


@_linalg.numpy_promotion()
def coordinate_trimmed_mean(stacked: PyTree, weights: Weights, *, byzantine: float) -> PyTree:
    """The mean of each entry over clients without its f largest and its f smallest values.

    f is the share `byzantine` of the clients that are present, rounded up, and so many hostile ones
    it tolerates. Of factors it is the mean of entries, as `coordinate_median`.

    Args:
      stacked: A pytree of arrays `[K, ...]`, adapters and others.
      weights: As in `coordinate_median`.
      byzantine: Share of the clients that may be hostile, at least 0 and below 1/2.

    Returns:
      The pytree without the axis K; zero if nobody is present.

    Raises:
      ValueError: If the share is out of its bounds.

    References:
      As `coordinate_median`.
    """
    bounds.check("robust", byzantine=byzantine)

    def trimmed(x: jax.Array, present: jax.Array) -> jax.Array:
        count = jnp.sum(present)
        cut = jnp.minimum(_hostile(count, byzantine), (count - 1) // 2)
        place = jnp.arange(len(x))
        kept = (place >= cut) & (place < count - cut)
        values = jnp.where(_along(kept, x), _sorted(x, present), 0)
        return jnp.sum(values / jnp.maximum(jnp.sum(kept), 1), axis=0)

    return _entrywise(stacked, weights, trimmed)


def _parts(
    stacked: PyTree, reference: PyTree | None
) -> tuple[dict[str, Factors], list[jax.Array], dict[str, Factors]]:
    """Products by name, changes of arrays, and by name where the products began."""
    leaves = jax.tree_util.tree_leaves_with_path(stacked, is_leaf=lowrank.is_factors)
    starts: list[Any] = [None] * len(leaves)
    if reference is not None:
        mine, theirs = (str(_base.structure(tree)) for tree in (stacked, reference))
        if mine != theirs:
            raise ValueError(
                f"what clients send and the reference differ in structure: {mine} and {theirs}"
            )
        starts = jax.tree.leaves(reference, is_leaf=lowrank.is_factors)
    named: dict[str, Factors] = {}
    first: dict[str, Factors] = {}
    arrays: list[jax.Array] = []
    for (path, node), start in zip(leaves, starts, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if lowrank.is_factors(node):
            named |= _layers(name, node, axis=1)
            first |= {} if start is None else _layers(name, start, axis=0)
            continue
        wide = lowrank.wide(jnp.asarray(node))
        arrays.append(wide if start is None else wide - start)
    return named, arrays, first


def _layers(name: str, node: Factors, axis: int) -> dict[str, Factors]:
    """Kernels that are stacked along an axis of their own, one by one."""
    if jnp.ndim(node.a) == axis + 2:
        return {name: node}
    return {
        f"{name}/{i}": Factors(*(jnp.take(x, i, axis=axis) for x in node))
        for i in range(jnp.shape(node.a)[axis])
    }


def _products(clients: Factors, weights: jax.Array, *starts: Factors) -> jax.Array:
    """Inner products of the changes of one kernel, `[K, K]`."""
    if starts:
        clients = _changes(clients, starts[0])

    def row(one: Factors) -> jax.Array:
        left = lowrank.einsum("ir,kis->krs", one.a, clients.a)
        return jnp.sum(left * lowrank.einsum("ro,kso->krs", one.b, clients.b), axis=(1, 2))

    return jax.lax.map(row, clients)


def _changes(clients: Factors, start: Factors) -> Factors:
    """`a_k b_k - a_0 b_0 = (a_k - a_0) b_k + a_0 (b_k - b_0)`."""
    rank = max(clients.rank, start.rank)
    (a, b), first = lowrank.pad(clients, rank), lowrank.pad(start, rank)
    return Factors(
        jnp.concatenate([a - first.a, jnp.broadcast_to(first.a, a.shape)], axis=2),
        jnp.concatenate([b, b - first.b], axis=1),
    )


def _usable(gram: jax.Array, weights: Weights) -> tuple[jax.Array, jax.Array]:
    """The matrix without infinite entries, and the shares of those who have none."""
    known = _base.wide(weights)
    finite = jnp.isfinite(jnp.diagonal(gram))
    shares = _base.normalized(known, finite & (known > 0) & (known < jnp.inf))
    present = shares > 0
    return jnp.where(present[:, None] & present, gram, 0), shares


def _squared_distances(gram: jax.Array) -> jax.Array:
    squares = jnp.diagonal(gram)
    return jnp.maximum(squares[:, None] + squares - 2 * gram, 0)


def _hostile(count: Any, byzantine: float) -> Any:
    """The share of so many clients, rounded up."""
    xp = np if isinstance(count, np.ndarray) else jnp
    return xp.ceil(byzantine * count - _ROUNDING).astype(int)


def _entrywise(stacked: PyTree, weights: Weights, function: Any) -> PyTree:
    known = _base.wide(weights)
    present = jnp.asarray((known > 0) & (known < jnp.inf))
    for x in jax.tree.leaves(stacked):
        if jnp.shape(x)[:1] != present.shape:
            raise ValueError(
                f"expected arrays [K={len(present)}, ...] for {len(present)} weights, got one of "
                f"shape {list(jnp.shape(x))}"
            )
    present &= _linalg.finite_rows(jax.tree.leaves(stacked))

    def of(x: jax.Array) -> jax.Array:
        found = function(lowrank.wide(x), present)
        return jnp.where(jnp.any(present), found, 0).astype(x.dtype)

    return jax.tree.map(of, jax.tree.map(jnp.asarray, stacked))


def _median(x: jax.Array, present: jax.Array) -> jax.Array:
    """Of the present rows of `x [K, ...]`, entry by entry; infinite if there are none."""
    rows, count = _sorted(x, present), jnp.sum(present)
    return rows[jnp.maximum(count - 1, 0) // 2] / 2 + rows[count // 2] / 2


def _sorted(x: jax.Array, present: jax.Array) -> jax.Array:
    """The present rows in ascending order, entry by entry; then infinite ones."""
    return jnp.sort(jnp.where(_along(present, x), x, jnp.inf), axis=0)


def _along(rows: jax.Array, x: jax.Array) -> jax.Array:
    return rows.reshape(-1, *[1] * (x.ndim - 1))
