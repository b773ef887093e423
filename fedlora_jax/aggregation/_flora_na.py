"""FLoRA-NA: one coefficient a client for each factor, fitted to the mean of the products."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from fedlora_jax import _linalg, lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree
from fedlora_jax.lowrank import Factors, einsum
from fedlora_jax.names import lookup

Solver = Literal["als", "gradient"]

_RIDGE = 1e-6
_TINY = 1e-30
_ADAM_STEPS_PER_SWEEP = 50
_ADAM_STEP_SIZE = 0.02


def flora_na(
    stacked: PyTree,
    weights: jax.Array,
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
    P = Q = p. No step makes the fit worse, so the error is never above that of FedIT. The free
    exchange of scale between P and Q is fixed by :math:`\sum_k P_k = 1`.

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
    lookup(dict.fromkeys(get_args(Solver)), solver, "solver")
    if sweeps < 0:
        raise ValueError(f"sweeps must not be negative, got {sweeps}")
    if not shared:
        return _base.run(_alone, stacked, weights, solver=solver, sweeps=sweeps)
    pairs = _base.each_kernel(_grams_and_weights, stacked, weights)
    p, q = _solve_shared([g for g, _ in pairs], pairs[0][1], solver=solver, sweeps=sweeps)
    return _base.run(_combined, stacked, weights, arrays={"p": p, "q": q})


class _Grams(NamedTuple):
    """All that the fit needs of one kernel, or of several with a leading axis.

    Attributes:
      a: `a_i^T a_k`, `[..., K, K, r, r]`.
      b: `b_j b_l^T`, `[..., K, K, r, r]`.
    """

    a: jax.Array
    b: jax.Array


def _alone(clients: Factors, weights: jax.Array, *, solver: Solver, sweeps: int) -> Aggregated:
    grams = [jax.tree.map(lambda x: x[None], _grams(clients, weights))]
    p, q = _SOLVERS[solver](grams, weights, sweeps)
    return _combined(clients, weights, p=p, q=q)


def _combined(clients: Factors, weights: jax.Array, *, p: jax.Array, q: jax.Array) -> Aggregated:
    pair = Factors(lowrank.mean(clients, q).a, lowrank.mean(clients, p).b)
    return Aggregated(adapters=pair, residual=None)


def _grams(clients: Factors, weights: jax.Array) -> _Grams:
    """Blocks of clients that are absent are zero: their factors must not serve the others."""
    count, _, rank = clients.a.shape
    rows = Factors(jnp.swapaxes(clients.a, 1, 2), clients.b)
    here = (weights > 0).astype(clients.a.dtype)
    pairs = (here[:, None] * here)[..., None, None]
    blocks = []
    for x in rows:
        square = lowrank.gram(x.reshape(count * rank, -1)).reshape(count, rank, count, rank)
        blocks.append(jnp.moveaxis(square, 1, 2) * pairs)
    return _Grams(*blocks)


def _grams_and_weights(clients: Factors, weights: jax.Array) -> tuple[_Grams, jax.Array]:
    return _grams(clients, weights), weights


@functools.partial(jax.jit, static_argnames=("solver", "sweeps"))
def _solve_shared(
    grams: Sequence[_Grams], weights: jax.Array, *, solver: Solver, sweeps: int
) -> tuple[jax.Array, jax.Array]:
    kinds: dict[int, list[_Grams]] = {}
    for node in grams:
        kinds.setdefault(node.a.shape[-1], []).append(node)
    batches = [jax.tree.map(lambda *x: jnp.stack(x), *nodes) for nodes in kinds.values()]
    return _SOLVERS[solver](batches, weights, sweeps)


def _alternate(
    kinds: Sequence[_Grams], weights: jax.Array, sweeps: int
) -> tuple[jax.Array, jax.Array]:
    swapped = [_Grams(a=grams.b, b=grams.a) for grams in kinds]

    def sweep(pair: tuple[jax.Array, jax.Array], _: None) -> Any:
        p, q = pair
        p = _improve(p, *_normal_equations(kinds, weights, q))
        q = _improve(q, *_normal_equations(swapped, weights, p))
        return (p, q), None

    return _scale_fixed(*jax.lax.scan(sweep, (weights, weights), length=sweeps)[0])


def _normal_equations(
    kinds: Sequence[_Grams], weights: jax.Array, q: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """H [K, K] and h [K] of `|M - a(q) b(p)|^2 = p^T H p - 2 h^T p + |M|^2`, over all kernels."""
    matrix = vector = jnp.zeros((), weights.dtype)
    for a, b in kinds:
        half = einsum("k,nikrs->nirs", q, a)
        matrix += einsum("nrs,njlrs->jl", einsum("i,nirs->nrs", q, half), b)
        vector += einsum("k,nkrs,nkjrs->j", weights, half, b)
    return matrix, vector


def _improve(p: jax.Array, matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """A proximal step: as good as the least-squares solution, and never worse than `p`.

    The ridge pulls towards `p`, not towards zero, so it keeps a singular system (identical or
    absent clients) solvable without a bias.
    """
    ridge = (_RIDGE * jnp.trace(matrix) + _TINY) * jnp.eye(len(p), dtype=p.dtype)
    residual = vector - lowrank.matmul(matrix, p)
    root = _linalg.triangular_inverse(_linalg.cholesky(matrix + ridge))
    return p + lowrank.matmul(root.T, lowrank.matmul(root, residual))


def _scale_fixed(p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = jnp.sum(p)
    unit = jnp.where(jnp.abs(total) > _RIDGE, total, 1)
    return p / unit, q * unit


def _adam(kinds: Sequence[_Grams], weights: jax.Array, sweeps: int) -> tuple[jax.Array, jax.Array]:
    """Adam on the change of each coefficient relative to its client's weight."""
    matrix, _ = _normal_equations(kinds, weights, weights)
    unit = lowrank.matmul(weights, lowrank.matmul(matrix, weights))
    unit = jnp.where(unit > _TINY, unit, 1)

    def coefficients(changes: jax.Array) -> tuple[jax.Array, jax.Array]:
        return weights * (1 + changes[0]), weights * (1 + changes[1])

    def loss(changes: jax.Array) -> jax.Array:
        p, q = coefficients(changes)
        matrix, vector = _normal_equations(kinds, weights, q)
        return (lowrank.matmul(p, lowrank.matmul(matrix, p)) - 2 * jnp.dot(vector, p)) / unit

    def step(carry: Any, index: jax.Array) -> Any:
        changes, first, second, best, least = carry
        value, slope = jax.value_and_grad(loss)(changes)
        best = jnp.where(value < least, changes, best)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        length = lowrank.safe_sqrt(second / (1 - 0.999**index)) + 1e-8
        changes -= _ADAM_STEP_SIZE * first / (1 - 0.9**index) / length
        return (changes, first, second, best, jnp.minimum(value, least)), None

    zero = jnp.zeros((2, len(weights)), weights.dtype)
    carry = (zero, zero, zero, zero, jnp.asarray(jnp.inf, weights.dtype))
    count = 1 + jnp.arange(_ADAM_STEPS_PER_SWEEP * sweeps, dtype=weights.dtype)
    best = jax.lax.scan(step, carry, count)[0][3]
    return _scale_fixed(*coefficients(best))


_SOLVERS = {"als": _alternate, "gradient": _adam}
