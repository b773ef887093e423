"""LoRA-FAIR: a correction of one factor, so that the product comes close to the mean product."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedlora_jax import _batching, _linalg, bounds, lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.lowrank import Factors, einsum, matmul
from fedlora_jax.names import check_choices

Similarity = Literal["cosine", "feature_cosine", "frobenius"]
Solver = Literal["sgd", "closed_form"]
Side = Literal["b", "a"]
CorrectionInit = Literal["zero", "xavier"]
Units = Literal["relative", "raw"]
# From a correction to the slope there and the size of the step.
Gradient = Callable[[jax.Array], tuple[jax.Array, jax.Array]]

_TINY = 1e-30
# Largest step against the curvature of a cosine, which is at most that of 1 / length squared.
_STABLE = 0.25


def lora_fair(
    stacked: PyTree,
    weights: Weights,
    *,
    similarity: Similarity = "cosine",
    solver: Solver = "sgd",
    regularization: jax.Array | float = 0.01,
    steps: int = 1000,
    learning_rate: jax.Array | float = 0.01,
    correction_init: CorrectionInit = "zero",
    correct: Side = "b",
    units: Units = "relative",
) -> Aggregated:
    r"""Averages the factors, then corrects one so that the product fits the mean of the products.

    For each kernel, with :math:`M = \sum_k p_k a_k b_k` and the means :math:`\bar a, \bar b`,

    .. math::
      c^* = \arg\min_c \; D(M,\; \bar a (\bar b + c)) + \lambda \lVert c \rVert_F^2,
      \qquad \text{adapters} = (\bar a,\; \bar b + c^*)

    * `similarity='cosine'`: :math:`D = 1 - \cos(M, X)` over the whole kernel (the paper).
    * `similarity='feature_cosine'`: one cosine an input feature (a row of the kernel
      `[d_in, d_out]`), then their mean, as the authors' published code has it.
    * `similarity='frobenius'`: :math:`D = \lVert M - X \rVert_F^2`, which unlike a cosine fixes the
      length of the product too. Only this one has a closed form,
      :math:`\bar b + c^* = (\bar a^T \bar a + \lambda I)^{-1} (\bar a^T M + \lambda \bar b)`.

    **Units.** Descent on a cosine moves by one over the length of the product, so that fixed step
    sizes and a fixed lambda mean something else for every length. `units='relative'` takes both
    relative to the means: the problem is solved for :math:`a_k / \lVert \bar a \rVert` and
    :math:`b_k / \lVert \bar b \rVert`, for which they are the paper's numbers, and the result is
    scaled back. All `b`, or all `a`, times a number then give the product times that number. A
    cosine's steps are kept below a quarter of its inverse curvature, and the length that it leaves
    free is the one that descent ends with, or the nearest at which the product is no farther from
    M than that of the means; a correction by feature cosines is shortened to the same end.
    `units='raw'` is descent on the factors as they are, as the authors' code does it, with nothing
    to hold it: means shorter than about :math:`10^{-2}` come back *longer*, without bound (a
    product of 1/1000 a thousand times too long), means of large norm are hardly corrected.

    When: a drop-in for FedIT at its communication, nearer to the ideal. Known not to work: a start
    from noise; correcting both factors, or `a` alone, came out worse in the paper (77.07 for `b`,
    76.42 and 75.55).

    Gradient descent runs on coordinates of the correction in the rows of :math:`\bar b` and of
    :math:`\bar a^T (M - \bar a \bar b)`, so that no step depends on `d_out`; it takes the very
    steps that descent on the dense matrices would take. All is said in :math:`M - \bar a \bar b`,
    which vanishes where clients agree: then so does the correction, to the last digit.

    Cost: with K clients, :math:`O(K r^2 (d_{in} + d_{out}))` for the closed form, once; a step of
    the cosine then costs :math:`O(r^3)` and one of the feature cosine :math:`O(K r^2 d_{in})`.
    Up and down a kernel: :math:`r (d_{in} + d_{out})`, as FedIT.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.
      similarity: `'cosine' | 'feature_cosine' | 'frobenius'`, the D above.
      solver: `'sgd'`, plain gradient descent, or `'closed_form'`, for `'frobenius'` alone.
      regularization: The factor lambda on the squared norm of the correction.
      steps: Gradient steps.
      learning_rate: Their size. Under `'frobenius'` it is reduced to the largest stable step.
      correction_init: `'zero'`, or `'xavier'` to reproduce codes that start from noise: the
        default regularization cannot remove that noise in 1000 steps, and the product suffers.
      correct: Which factor takes the correction. The paper's B is our `b`.
      units: `'relative'` to the size of the means, or `'raw'`, see above.

    Returns:
      `Aggregated(adapters, None)`.

    Raises:
      ValueError: On an unknown option, a closed form asked of a cosine, or weights or factors that
        cannot be used, see `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.array([[[1.]], [[3.]]]), jnp.array([[[1.]], [[3.]]]))}
      >>> fair = aggregation.lora_fair(stacked, jnp.ones(2), similarity='frobenius',
      ...                              solver='closed_form', regularization=0.)
      >>> fair.adapters['dense'].a @ fair.adapters['dense'].b  # the mean product, (1 + 9) / 2
      Array([[5.]], dtype=float32)

    References:
      Bian et al., *LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
      Refinement*, ICCV 2025, arXiv:2411.14961, equations 8 and 9. The closed form is ours.
    """
    check_options(
        similarity=similarity,
        solver=solver,
        regularization=regularization,
        learning_rate=learning_rate,
        correction_init=correction_init,
        correct=correct,
        units=units,
    )
    _base.check_static("lora_fair", steps=steps)
    return _base.run(
        _lora_fair,
        stacked,
        weights,
        arrays={
            "regularization": jnp.asarray(regularization),
            "learning_rate": jnp.asarray(learning_rate),
        },
        similarity=similarity,
        closed_form=solver == "closed_form",
        steps=steps,
        xavier=correction_init == "xavier",
        correct=correct,
        relative=units == "relative",
    )


def check_options(
    *, similarity: Similarity = "cosine", solver: Solver = "sgd", **others: Any
) -> None:
    """Raises ValueError on options of `lora_fair` that are wrong by themselves or together."""
    check_choices(lora_fair, similarity=similarity, solver=solver, **others)
    bounds.check("lora_fair", **others)
    if solver == "closed_form" and similarity != "frobenius":
        raise ValueError(
            f"solver='closed_form' solves similarity='frobenius', not {similarity!r}: "
            "a cosine leaves the length of the product free and has no closed form"
        )


def _lora_fair(
    clients: Factors,
    weights: jax.Array,
    *,
    regularization: jax.Array,
    learning_rate: jax.Array,
    similarity: Similarity,
    closed_form: bool,
    steps: int,
    xavier: bool,
    correct: Side,
    relative: bool,
) -> Aggregated:
    if correct == "a":
        clients = lowrank.transpose(clients)
    unit_a, unit_b = _units(clients, weights) if relative else (1.0, 1.0)
    clients = Factors(clients.a / unit_a, clients.b / unit_b)
    average = lowrank.mean(clients, weights)
    if closed_form:
        correction = _closed_form(clients, weights, average, regularization)
    else:
        start = _xavier(clients) if xavier else None
        solvers: dict[str, Callable[..., jax.Array]] = {
            "cosine": functools.partial(_cosine, held=relative),
            "frobenius": _frobenius,
            "feature_cosine": _input_cosine if correct == "b" else _output_cosine,
        }
        solve = solvers[similarity]
        correction = solve(clients, weights, average, start, regularization, learning_rate, steps)
        if relative and similarity == "feature_cosine" and not xavier:
            correction = _shortened(clients, weights, average, correction)
    result = Factors(unit_a * average.a, unit_b * (average.b + correction))
    return Aggregated(lowrank.transpose(result) if correct == "a" else result, None)


def _units(clients: Factors, weights: jax.Array) -> tuple[jax.Array, ...]:
    """The sizes of the means; of the clients' factors where a mean is zero, and else one."""
    sizes = []
    for factors, mean in zip(clients, lowrank.mean(clients, weights), strict=True):
        size = lowrank.vector_norm(mean)
        others = lowrank.vector_norm(jnp.sqrt(weights)[:, None, None] * factors)
        size = jnp.where(size > 0, size, others)
        sizes.append(jnp.where(size > 0, size, 1))
    return tuple(sizes)


def _missed(clients: Factors, weights: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`a^T a` [r, r], and `a^T (M - a b)` [r, d_out] for the means a and b.

    The latter as `sum_k p_k a^T (a_k - a) b_k`: small where clients agree, not a difference of
    large numbers.
    """
    blocks = einsum("ir,kis->krs", a, clients.a)
    deviations = blocks - einsum("k,krs->rs", weights, blocks)
    return matmul(a.T, a), einsum("krs,kso->ro", weights[:, None, None] * deviations, clients.b)


def _closed_form(
    clients: Factors, weights: jax.Array, average: Factors, regularization: jax.Array
) -> jax.Array:
    gram, missed = _missed(clients, weights, average.a)
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    # Enough for a Cholesky factorisation of a singular Gram matrix to exist; the second step takes
    # back what it biases. The small inverse, because products with wide matrices are fast.
    jitter = 1e-6 * jnp.trace(gram) + _TINY
    root = _linalg.triangular_inverse(_linalg.cholesky(gram + (regularization + jitter) * identity))
    inverse = matmul(root.T, root)
    # x + inverse (missed - G x) with x = inverse missed, its small factors first.
    remaining = identity - matmul(gram + regularization * identity, inverse)
    return matmul(inverse + matmul(inverse, remaining), missed)


class _Descent(NamedTuple):
    """The correction `c = C Y` in the rows `Y = [mean b; a^T (M - a b); start]`.

    Attributes:
      rows: Y, `[2 r or 3 r, d_out]`.
      metric: `Y Y^T`.
      gram: `a^T a`.
      mean: Coordinates of the mean b.
      missed: Coordinates of `a^T (M - a b)`.
      first: Coordinates of the first correction.
    """

    rows: jax.Array
    metric: jax.Array
    gram: jax.Array
    mean: jax.Array
    missed: jax.Array
    first: jax.Array


def _descent(
    clients: Factors, weights: jax.Array, average: Factors, start: jax.Array | None
) -> _Descent:
    gram, missed = _missed(clients, weights, average.a)
    rows = jnp.concatenate([average.b, missed] if start is None else [average.b, missed, start])
    rank = len(gram)

    def block(index: int) -> jax.Array:
        return jnp.eye(rank, len(rows), k=index * rank, dtype=rows.dtype)

    first = jnp.zeros_like(block(0)) if start is None else block(2)
    first = _batching.varying_as(first, rows)
    return _Descent(rows, matmul(rows, rows.T), gram, block(0), block(1), first)


def _cosine(
    clients: Factors,
    weights: jax.Array,
    average: Factors,
    start: jax.Array | None,
    regularization: jax.Array,
    learning_rate: jax.Array,
    steps: int,
    *,
    held: bool,
) -> jax.Array:
    """Descends on `1 - cos(M, X) + regularization |c|^2`, X = a (b + c) and M of norm one.

    Args:
      held: Whether steps are kept stable, and the length of X from leading away from M.
    """
    rows, metric, gram, mean, missed, first = _descent(clients, weights, average, start)
    size = lowrank.norm(lowrank.weighted_sum(clients, weights))
    steepest = jax.lax.stop_gradient(_linalg.eigh(gram)[0][-1])

    def parts(c: jax.Array) -> tuple[jax.Array, ...]:
        """`a^T a c`, `<a c, X>`, `<M - a b, X>` and `|X|^2`."""
        image, reached = matmul(gram, c), matmul(mean + c, metric)
        square = jnp.sum(matmul(gram, mean + c) * reached)
        return image, jnp.sum(image * reached), jnp.sum(missed * reached), square

    def gradient(c: jax.Array) -> tuple[jax.Array, jax.Array]:
        image, along, wanted, square = parts(c)
        product = lowrank.safe_sqrt(square) * size
        good = product > _TINY
        u = jnp.where(good, 1 / jnp.where(good, product, 1), 0)
        excess = u * (wanted - along) / jnp.where(good, square, 1)
        slope = (u + excess) * image + excess * matmul(gram, mean) - u * missed
        stable = _STABLE * jax.lax.stop_gradient(square) / jnp.maximum(steepest, _TINY)
        return slope, jnp.minimum(learning_rate, stable) if held else learning_rate

    c = _descend(gradient, first, regularization, steps)
    if held:
        image, along, wanted, square = parts(c)
        change = jnp.sum(matmul(image, metric) * c) - 2 * jnp.sum(matmul(missed, metric) * c)
        c += _stretch(square, along - wanted, change) * (mean + c)
    return matmul(c, rows)


def _stretch(square: jax.Array, slope: jax.Array, constant: jax.Array) -> jax.Array:
    """The t nearest to zero with `square t^2 + 2 slope t + constant <= 0`, or where it is least.

    The left side is `|M - (1 + t) X|^2 - |M - a b|^2`.
    """
    inside = slope**2 - square * constant
    far = slope + jnp.where(slope < 0, -1.0, 1.0) * lowrank.safe_sqrt(inside)
    good = (inside > 0) & (far != 0)
    least = -slope / jnp.where(square > 0, square, 1)
    nearest = jnp.where(good, -constant / jnp.where(good, far, 1), least)
    return jnp.where((constant > 0) & (square > 0), nearest, 0)


def _shortened(
    clients: Factors, weights: jax.Array, average: Factors, correction: jax.Array
) -> jax.Array:
    """As much of a correction as leaves the product no farther from M than that of the means."""
    gram, missed = _missed(clients, weights, average.a)
    square = jnp.sum(matmul(gram, correction) * correction)
    farthest = 2 * jnp.sum(missed * correction) / jnp.where(square > 0, square, 1)
    return jnp.clip(farthest, 0, 1) * correction


def _frobenius(
    clients: Factors,
    weights: jax.Array,
    average: Factors,
    start: jax.Array | None,
    regularization: jax.Array,
    learning_rate: jax.Array,
    steps: int,
) -> jax.Array:
    rows, _, gram, _, missed, first = _descent(clients, weights, average, start)
    stable = jnp.minimum(learning_rate, 0.5 / (jnp.trace(gram) + regularization + _TINY))

    def gradient(c: jax.Array) -> tuple[jax.Array, jax.Array]:
        return 2 * (matmul(gram, c) - missed), stable

    return matmul(_descend(gradient, first, regularization, steps), rows)


def _input_cosine(
    clients: Factors,
    weights: jax.Array,
    average: Factors,
    start: jax.Array | None,
    regularization: jax.Array,
    learning_rate: jax.Array,
    steps: int,
) -> jax.Array:
    """The mean of one cosine a row of the kernel; `c = C Y`, Y the stacked `p_k b_k` and start."""
    ideal, a = lowrank.weighted_sum(clients, weights), average.a
    rank, count = a.shape[1], len(weights)
    extra = 0 if start is None else rank
    identity = jnp.eye(rank, dtype=a.dtype)
    mean = jnp.pad(jnp.tile(identity, count), [(0, 0), (0, extra)])
    first = _batching.varying_as(jnp.zeros_like(mean), a)
    if start is not None:
        first = first.at[:, -rank:].set(identity)
    rows = ideal.b if start is None else jnp.concatenate([ideal.b, start])
    wide = jnp.pad(ideal.a, [(0, 0), (0, extra)])
    metric = matmul(rows, rows.T)
    sizes = lowrank.safe_sqrt(jnp.sum(matmul(wide, metric) * wide, axis=1))

    def gradient(c: jax.Array) -> tuple[jax.Array, jax.Array]:
        half = matmul(metric, (mean + c).T)
        squares = jnp.sum(matmul(a, matmul(mean + c, half)) * a, axis=1)
        u, v = _cosine_slopes(jnp.sum(matmul(wide, half) * a, axis=1), squares, sizes)
        pull = matmul((u[:, None] * a).T, wide)
        push = matmul(matmul((v[:, None] * a).T, a), mean + c)
        return (push - pull) / len(a), learning_rate

    return matmul(_descend(gradient, first, regularization, steps), rows)


def _output_cosine(
    clients: Factors,
    weights: jax.Array,
    average: Factors,
    start: jax.Array | None,
    regularization: jax.Array,
    learning_rate: jax.Array,
    steps: int,
) -> jax.Array:
    """The mean of one cosine a column of the kernel: columns do not mix, c is its own state."""
    gram, missed = _missed(clients, weights, average.a)
    target = matmul(gram, average.b) + missed
    ideal = lowrank.weighted_sum(clients, weights)
    sizes = lowrank.safe_sqrt(
        jnp.sum(matmul(matmul(ideal.a.T, ideal.a), ideal.b) * ideal.b, axis=0)
    )

    def gradient(c: jax.Array) -> tuple[jax.Array, jax.Array]:
        b = average.b + c
        image = matmul(gram, b)
        u, v = _cosine_slopes(jnp.sum(target * b, axis=0), jnp.sum(image * b, axis=0), sizes)
        return (v * image - u * target) / b.shape[1], learning_rate

    first = jnp.zeros_like(average.b) if start is None else _batching.varying_as(start, average.b)
    return _descend(gradient, first, regularization, steps)


def _descend(
    gradient: Gradient, first: jax.Array, regularization: jax.Array, steps: int
) -> jax.Array:
    """Gradient descent on `D(c) + regularization |c|^2` from `first`."""

    def step(c: jax.Array, _: None) -> tuple[jax.Array, None]:
        slope, rate = gradient(c)
        return c - rate * (slope + 2 * regularization * c), None

    return jax.lax.scan(step, first, length=steps)[0]


def _cosine_slopes(
    alignment: jax.Array, square: jax.Array, size: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """With `f = <m, x> / (|m| |x|)`: u and v of `df/dx = u m - v x`; zero where m or x is."""
    length = lowrank.safe_sqrt(square)
    product = length * size
    good = product > _TINY
    u = jnp.where(good, 1 / jnp.where(good, product, 1), 0)
    return u, u * alignment / jnp.where(good, square, 1)


def _xavier(clients: Factors) -> jax.Array:
    """The same noise for every kernel of a shape: it is there to reproduce, not to be good."""
    shape = clients.b.shape[1:]
    return jax.nn.initializers.xavier_uniform()(jax.random.key(0), shape, clients.b.dtype)
