"""FLoRA-NA: one coefficient a client for each factor, fitted to the mean of the products."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedlora_jax import _batching, _linalg, lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.lowrank import Factors, einsum, matmul
from fedlora_jax.names import check_choices

Solver = Literal["als", "gradient"]

_RIDGE = 1e-6
_TINY = 1e-30
_ADAM_STEPS_PER_SWEEP = 50
_ADAM_STEP_SIZE = 0.02


def flora_na(
    stacked: PyTree,
    weights: Weights,
    *,
    solver: Solver = "als",
    sweeps: int = 10,
    shared: bool = False,
) -> Aggregated:
    r"""Combines the clients' factors with fitted coefficients ("nearly accurate" aggregation).

    For each kernel, with :math:`M = \sum_k p_k a_k b_k`,

    .. math::
      \min_{P, Q \in R^K} \Big\lVert M - \Big(\sum_k Q_k a_k\Big)
      \Big(\sum_k P_k b_k\Big) \Big\rVert_F^2,
      \qquad \text{adapters} = \Big(\sum_k Q_k a_k,\; \sum_k P_k b_k\Big)

    Given Q, the best P solves K linear equations, and the other way round; `'als'` alternates from
    P = Q = p. No step makes the fit worse, so the error is never above that of FedIT; what the fit
    misses is summed from the clients' deviations from the means, so that this holds to rounding
    also where they nearly agree. The free exchange of scale between P and Q is fixed by
    :math:`\sum_k P_k = 1`.

    When: clients' updates differ in size; it gains nothing when they are exchangeable. It is meant
    for the factors themselves, not for their increments.

    Cost: the Gram blocks, :math:`O(K^2 r^2 (d_{in} + d_{out}))`, once; then
    :math:`O(K^2 r^2 + K^3)` a sweep. Up and down a kernel: :math:`r (d_{in} + d_{out})`, as FedIT.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside. The paper's mean is the one with equal
        weights.
      solver: `'als'`, alternating least squares, or `'gradient'`, Adam on P and Q together, from
        which the best point passed is kept.
      sweeps: Alternations of `'als'`; Adam takes 50 steps for each.
      shared: Fit one P and Q to all kernels together instead of one pair a kernel.

    Returns:
      `Aggregated(adapters, None)`.

    Raises:
      ValueError: On an unknown solver, or weights or factors that cannot be used, see
        `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.array([[[1.]], [[3.]]]), jnp.array([[[1.]], [[3.]]]))}
      >>> near = aggregation.flora_na(stacked, jnp.ones(2))
      >>> product = near.adapters['dense'].a @ near.adapters['dense'].b
      >>> round(float(product[0, 0]), 4)  # the mean product, (1 + 9) / 2
      5.0

    References:
      *FLoRA-NA: Nearly Accurate Aggregation for Federated Low-Rank Adaptation*, arXiv:2509.26399.
      The paper does not state a solver; alternating least squares is ours.
    """
    check_choices(flora_na, solver=solver)
    _base.check_static("flora_na", sweeps=sweeps)
    if not shared:
        return _base.run(_alone, stacked, weights, solver=solver, sweeps=sweeps)
    grams, sizes, shares = zip(*_base.each_kernel(_measured, stacked, weights), strict=True)
    with _linalg.numpy_promotion():
        p, q = _solve_shared(grams, sizes, shares[0], solver=solver, sweeps=sweeps)
    return _base.run(_combined, stacked, weights, arrays={"p": p, "q": q})


class _Grams(NamedTuple):
    """All that the fit needs of one kernel, or of several with a leading axis.

    Index 0 is the mean of the clients, index k what client k deviates from it, in units in which
    the clients' factors are of size one. Absent clients are zero.

    Attributes:
      a: `a_i^T a_k`, `[..., K + 1, K + 1, r, r]`.
      b: `b_j b_l^T`, `[..., K + 1, K + 1, r, r]`.
    """

    a: jax.Array
    b: jax.Array


class _Fit(NamedTuple):
    """The coefficients less the weights from which they begin: `P = p + dp`, `Q = p + dq`."""

    dp: jax.Array
    dq: jax.Array


def _alone(clients: Factors, weights: jax.Array, *, solver: Solver, sweeps: int) -> Aggregated:
    grams, _, _ = _measured(clients, weights)
    p, q = _SOLVERS[solver]([jax.tree.map(lambda x: x[None], grams)], weights, sweeps)
    return _combined(clients, weights, p=p, q=q)


def _combined(clients: Factors, weights: jax.Array, *, p: jax.Array, q: jax.Array) -> Aggregated:
    pair = Factors(lowrank.mean(clients, q).a, lowrank.mean(clients, p).b)
    return Aggregated(adapters=pair, residual=None)


def _measured(clients: Factors, weights: jax.Array) -> tuple[_Grams, jax.Array, jax.Array]:
    """The Gram blocks, the size of the products that is taken out of them, and the weights."""
    here = (weights > 0)[:, None, None]
    means, blocks, size = lowrank.mean(clients, weights), [], jnp.ones((), weights.dtype)
    for side, (x, mean) in enumerate(zip(clients, means, strict=True)):
        unit = lowrank.vector_norm(jnp.sqrt(weights)[:, None, None] * x)
        unit = jnp.where(unit > 0, unit, 1)
        rows = jnp.concatenate([mean[None], jnp.where(here, x - mean, 0)]) / unit
        rows = jnp.swapaxes(rows, 1, 2) if side == 0 else rows
        count, rank, _ = rows.shape
        square = lowrank.gram(rows.reshape(count * rank, -1)).reshape(count, rank, count, rank)
        blocks.append(jnp.moveaxis(square, 1, 2))
        size = size * unit
    return _Grams(*blocks), size, weights


@functools.partial(jax.jit, static_argnames=("solver", "sweeps"))
def _solve_shared(
    grams: Sequence[_Grams],
    sizes: Sequence[jax.Array],
    weights: jax.Array,
    *,
    solver: Solver,
    sweeps: int,
) -> tuple[jax.Array, jax.Array]:
    largest = jnp.max(jnp.stack(sizes))
    kinds: dict[int, list[_Grams]] = {}
    for node, size in zip(grams, sizes, strict=True):
        sized = node._replace(a=node.a * jnp.square(size / largest))
        kinds.setdefault(node.a.shape[-1], []).append(sized)
    batches = [jax.tree.map(lambda *x: jnp.stack(x), *nodes) for nodes in kinds.values()]
    return _SOLVERS[solver](batches, weights, sweeps)


def _with_mean(coefficients: jax.Array) -> jax.Array:
    """Coefficients of clients as those of their mean and their deviations, `[K + 1]`."""
    return jnp.concatenate([jnp.sum(coefficients)[None], coefficients])


def _misfit(weights: jax.Array, fit: _Fit) -> jax.Array:
    """C `[K + 1, K + 1]` with `M - a(Q) b(P) = sum_ij C_ij a_i b_j`: small where the fit is good.

    Between clients it is `diag(p) - Q P^T`; its sums over rows, over columns and over both belong
    to the mean, and are written so that nothing cancels.
    """
    p, q = weights + fit.dp, weights + fit.dq
    sum_p, sum_q = jnp.sum(fit.dp), jnp.sum(fit.dq)
    corner = -(sum_p + sum_q + sum_p * sum_q)
    top, left = -(fit.dp + sum_q * p), -(fit.dq + sum_p * q)
    inner = jnp.diag(weights) - jnp.outer(q, p)
    return jnp.block([[corner[None, None], top[None]], [left[:, None], inner]])


def _against(misfit: jax.Array, grams: _Grams, left: jax.Array) -> jax.Array:
    """`<sum_ij C_ij a_i b_j, a(left) b_l>` for each l, summed over kernels, `[K + 1]`."""
    half = einsum("nikrs,k->nirs", grams.a, left)
    return einsum("njrs,njlrs->l", einsum("ij,nirs->njrs", misfit, half), grams.b)


def _alternate(
    kinds: Sequence[_Grams], weights: jax.Array, sweeps: int
) -> tuple[jax.Array, jax.Array]:
    swapped = [_Grams(a=grams.b, b=grams.a) for grams in kinds]

    def sweep(fit: _Fit, _: None) -> tuple[_Fit, None]:
        fit = fit._replace(dp=fit.dp + _step(kinds, weights, fit))
        mirror = _Fit(dp=fit.dq, dq=fit.dp)
        return fit._replace(dq=fit.dq + _step(swapped, weights, mirror)), None

    zero = _batching.varying_as(jnp.zeros_like(weights), *jax.tree.leaves(kinds))
    fit = jax.lax.scan(sweep, _Fit(zero, zero), length=sweeps)[0]
    gain, rounding = _gain(kinds, weights, fit)
    better = gain > rounding
    return _scale_fixed(weights, jax.tree.map(lambda x: jnp.where(better, x, 0), fit))


def _step(kinds: Sequence[_Grams], weights: jax.Array, fit: _Fit) -> jax.Array:
    """A proximal step of P: as good as the least-squares solution, and never worse than P.

    The ridge pulls towards P, not towards zero, so it keeps a singular system (identical or absent
    clients) solvable without a bias.
    """
    left = _with_mean(weights + fit.dq)
    misfit = _misfit(weights, fit)
    matrix = vector = rounding = jnp.zeros((), weights.dtype)
    for grams in kinds:
        matrix += _square(grams, left)
        vector += _against(misfit, grams, left)
        rounding += _rounding(grams, left)
    here = weights > 0
    matrix = matrix[1:, 1:] + matrix[1:, :1] + matrix[:1, 1:] + matrix[0, 0]
    matrix = jnp.where(here[:, None] & here, matrix, 0)
    vector = jnp.where(here, vector[1:] + vector[0], 0)
    identity = jnp.eye(len(weights), dtype=weights.dtype)
    ridge = _RIDGE * jnp.trace(matrix) + _TINY
    tried = _linalg.cholesky(jax.lax.stop_gradient(matrix + ridge * identity))
    ridge += jnp.where(jnp.all(jnp.isfinite(tried)), 0, rounding)
    root = _linalg.triangular_inverse(_linalg.cholesky(matrix + ridge * identity))
    return lowrank.matmul(root.T, lowrank.matmul(root, vector))


def _gain(kinds: Sequence[_Grams], weights: jax.Array, fit: _Fit) -> tuple[jax.Array, jax.Array]:
    """`|M - a(p) b(p)|^2 - |M - a(Q) b(P)|^2`, and what rounding can make of it at most.

    As a product of the sum and the difference of the two, so that a small gain is seen beside
    large products. Where the clients cancel, M can be smaller than rounding of what it is a sum of.
    """
    zero, own = jnp.zeros_like(weights), _with_mean(weights)
    both = _misfit(weights, fit) + _misfit(weights, _Fit(zero, zero))
    dp, dq = _with_mean(fit.dp), _with_mean(fit.dq)
    gain = terms = jnp.zeros((), weights.dtype)
    for grams in kinds:
        gain += einsum("l,l->", _against(both, grams, dq), own + dp)
        gain += einsum("l,l->", _against(both, grams, own), dp)
        a, b = _sizes(grams)
        size = einsum("ni,ij,nj->n", a, jnp.abs(both), b)
        for left, right in ((dq, own + dp), (own, dp)):
            terms += jnp.sum(size * matmul(a, jnp.abs(left)) * matmul(b, jnp.abs(right)))
    return gain, 8 * jnp.finfo(weights.dtype).eps * jax.lax.stop_gradient(terms)


def _sizes(grams: _Grams) -> tuple[jax.Array, jax.Array]:
    """`|a_k|` and `|b_k|` of the kernels of a shape, `[n, K + 1]` each."""
    a, b = (lowrank.safe_sqrt(einsum("nkkrr->nk", x)) for x in grams)
    return a, b


def _rounding(grams: _Grams, left: jax.Array) -> jax.Array:
    """What rounding can take from `_square` at most; all of it where `a(left)` cancels."""
    a, b = _sizes(grams)
    terms = jnp.sum(jnp.abs(left) * a, axis=1) * lowrank.safe_sqrt(jnp.sum(b**2, axis=1))
    return 8 * jnp.finfo(left.dtype).eps * jnp.sum(terms**2)


def _scale_fixed(weights: jax.Array, fit: _Fit) -> tuple[jax.Array, jax.Array]:
    p, q = weights + fit.dp, weights + fit.dq
    total = jnp.sum(p)
    unit = jnp.where(jnp.abs(total) > _RIDGE, total, 1)
    return p / unit, q * unit


def _adam(kinds: Sequence[_Grams], weights: jax.Array, sweeps: int) -> tuple[jax.Array, jax.Array]:
    """Adam on the change of each coefficient relative to its client's weight."""
    own = _with_mean(weights)
    unit = sum(einsum("j,jl,l->", own, _square(grams, own), own) for grams in kinds)
    unit = jnp.where(unit > _TINY, unit, 1)

    def loss(changes: jax.Array) -> jax.Array:
        return -_gain(kinds, weights, _Fit(weights * changes[0], weights * changes[1]))[0] / unit

    def step(carry: Any, index: jax.Array) -> Any:
        changes, first, second, best, least = carry
        value, slope = jax.value_and_grad(loss)(changes)
        best = jnp.where(value < least, changes, best)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        length = lowrank.safe_sqrt(second / (1 - 0.999**index)) + 1e-8
        changes -= _ADAM_STEP_SIZE * first / (1 - 0.9**index) / length
        return (changes, first, second, best, jnp.minimum(value, least)), None

    zeros = _batching.varying_as(jnp.zeros((2, len(weights)), weights.dtype), unit)
    carry = (zeros, zeros, zeros, zeros, jnp.full_like(unit, jnp.inf))
    count = 1 + jnp.arange(_ADAM_STEPS_PER_SWEEP * sweeps, dtype=weights.dtype)
    best = jax.lax.scan(step, carry, count)[0][3]
    return _scale_fixed(weights, _Fit(weights * best[0], weights * best[1]))


def _square(grams: _Grams, left: jax.Array) -> jax.Array:
    """`<a(left) b_j, a(left) b_l>`, summed over kernels, `[K + 1, K + 1]`."""
    inner = einsum("i,nikrs,k->nrs", left, grams.a, left)
    return einsum("nrs,njlrs->jl", inner, grams.b)


_SOLVERS = {"als": _alternate, "gradient": _adam}
