"""Low-rank matrices in factored form, and the algebra that never multiplies the factors out.

A matrix `[d_in, d_out]` of rank at most r is held as `Factors(a [d_in, r], b [r, d_out])`, its
product being `a @ b`. Every function here costs O(r^2 (d_in + d_out)) at most and forms nothing of
size d_in x d_out. Functions of one `Factors` accept leading batch axes unless they say otherwise.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp

from fedlora_jax import _linalg
from fedlora_jax.names import lookup

Scalar: TypeAlias = jax.Array
Split: TypeAlias = Literal["right", "balanced", "left"]

# Most rows of a product that are formed at once where the rank exceeds a dimension.
_BLOCK = 128
# Largest core that `svd` decomposes, and what it does beyond: see there.
_EXACT = 1024
_OVERSAMPLING = 8
_SWEEPS = 4
# Relative eigenvalue of a Gram matrix (singular value squared) under which it is noisy.
_POOR = 1e-4
# Multiple of the rounding error that keeps a Cholesky decomposition alive; and the square of what
# must be new in a column for it to count.
_SHIFT = 16.0
_SMALL = 1e-4


class Factors(NamedTuple):
    """A matrix `a @ b` in factored form.

    In a LoRA adapter the change of a Flax kernel `[d_in, d_out]` is `scale * a @ b`; a paper's
    `B A` (torch layout) is the transpose of this, so its A is our `a^T` and its B is our `b^T`.

    Attributes:
      a: The input side, `[..., d_in, r]`.
      b: The output side, `[..., r, d_out]`.
    """

    a: jax.Array
    b: jax.Array

    @property
    def rank(self) -> int:
        """The number of columns of `a`: an upper bound on the rank of the product."""
        return self.a.shape[-1]


def is_factors(node: object) -> bool:
    """Whether `node` is a `Factors`: the `is_leaf` of every map over an adapter tree."""
    return isinstance(node, Factors)


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x @ y` in full float32: TF32 and bfloat16 passes break normal equations and QR."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    """`jnp.einsum` in full float32, as `matmul`."""
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """A square root with gradient zero, not infinite, at zero; zero below."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def transpose(factors: Factors) -> Factors:
    """The transposed matrix `(a b)^T = b^T a^T`, its sides exchanged."""
    return Factors(jnp.swapaxes(factors.b, -1, -2), jnp.swapaxes(factors.a, -1, -2))


def scaled(factors: Factors, weight: jax.Array | float) -> Factors:
    """`weight * a @ b`, with the weight on `b`. `weight` has the batch axes of `factors`."""
    return Factors(factors.a, jnp.asarray(weight)[..., None, None] * factors.b)


def pad(factors: Factors, rank: int) -> Factors:
    """The same product at a larger rank, by zero columns of `a` and zero rows of `b`.

    Raises:
      ValueError: If `rank` is smaller than the rank of `factors`.
    """
    missing = rank - factors.rank
    if missing < 0:
        raise ValueError(f"cannot pad rank {factors.rank} to the smaller rank {rank}")
    batch = [(0, 0)] * (factors.a.ndim - 2)
    return Factors(
        jnp.pad(factors.a, [*batch, (0, 0), (0, missing)]),
        jnp.pad(factors.b, [*batch, (0, missing), (0, 0)]),
    )


def concatenate(terms: Sequence[Factors]) -> Factors:
    """The exact sum of products, by stacking: `[a_1 | a_2 | ...] [b_1; b_2; ...]`.

    Its rank is the sum of the ranks of the terms.
    """
    return Factors(
        jnp.concatenate([term.a for term in terms], axis=-1),
        jnp.concatenate([term.b for term in terms], axis=-2),
    )


def subtract(x: Factors, y: Factors) -> Factors:
    """`x - y` by stacking; its rank is the sum of the two."""
    return concatenate([x, scaled(y, -1.0)])


def weighted_sum(stacked: Factors, weights: jax.Array) -> Factors:
    """The exact `sum_k w_k a_k b_k` of rank K r, by stacking with the weights on `b` alone.

    Args:
      stacked: `a [K, d_in, r]`, `b [K, r, d_out]`.
      weights: `[K]`, used as they are.

    Returns:
      `Factors(a [d_in, K r], b [K r, d_out])`.
    """
    chex.assert_rank([stacked.a, stacked.b, weights], [3, 3, 1])
    clients, d_in, rank = stacked.a.shape
    a = jnp.moveaxis(stacked.a, 0, 1).reshape(d_in, clients * rank)
    b = scaled(stacked, weights).b.reshape(clients * rank, -1)
    return Factors(a, b)


def mean(stacked: Factors, weights: jax.Array) -> Factors:
    """The factorwise mean `(sum_k w_k a_k, sum_k w_k b_k)`; its product is not the mean product."""
    return Factors(einsum("k,kir->ir", weights, stacked.a), einsum("k,kro->ro", weights, stacked.b))


def inner(x: Factors, y: Factors) -> Scalar:
    """The Frobenius inner product `<x, y> = sum((x.a^T y.a) * (x.b y.b^T))`, by r x r blocks."""
    left = matmul(jnp.swapaxes(x.a, -1, -2), y.a)
    right = matmul(x.b, jnp.swapaxes(y.b, -1, -2))
    return jnp.sum(left * right, axis=(-2, -1))


@jax.custom_jvp
def norm(factors: Factors) -> Scalar:
    """The Frobenius norm of one product, accurate also where terms of the product cancel.

    `sqrt(inner(x, x))` loses half the digits of a difference. With `a = Q R`, `|a b| = |R b|`
    keeps them: cancellation happens before anything is squared. If the rank reaches a dimension, R
    saves nothing, and blocks of columns of the product are formed in turn and added up instead.
    The gradient is zero, not NaN, where the product is.

    Args:
      factors: Without batch axes.
    """
    chex.assert_rank([factors.a, factors.b], 2)
    if factors.a.shape[0] < factors.b.shape[1]:
        factors = transpose(factors)
    d_in, rank = factors.a.shape
    if rank < d_in and rank <= factors.b.shape[1]:
        return vector_norm(matmul(_linalg.qr_r(factors.a), factors.b))
    return _norm_by_blocks(factors)


@norm.defjvp
def _norm_jvp(primals: tuple[Factors], tangents: tuple[Factors]) -> tuple[Scalar, Scalar]:
    (x,), (dx,) = primals, tangents
    size = norm(x)
    change = inner(x, Factors(dx.a, x.b)) + inner(x, Factors(x.a, dx.b))
    return size, jnp.where(size > 0, change / jnp.where(size > 0, size, 1), 0)


def vector_norm(x: jax.Array) -> Scalar:
    """The root of the sum of squares of all entries; no overflow, and gradient zero at zero."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=0.0))
    unit = jnp.where(largest > 0, largest, 1.0)
    square = jnp.sum(jnp.square(x / unit))
    return unit * jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _norm_by_blocks(factors: Factors) -> Scalar:
    norms = jax.lax.map(lambda rows: vector_norm(matmul(rows, factors.b)), _blocks(factors.a))
    return vector_norm(norms)


def _blocks(x: jax.Array) -> jax.Array:
    """Rows in blocks `[n, width, r]`, the last one filled up with zeros."""
    rows, rank = x.shape
    width = min(_BLOCK, -(-rows // 2))
    blocks = -(-rows // width)
    return jnp.pad(x, [(0, blocks * width - rows), (0, 0)]).reshape(blocks, width, rank)


class SVD(NamedTuple):
    """Leading singular triplets of a matrix, `u @ diag(s) @ v`.

    Attributes:
      u: Orthonormal columns, `[d_in, k]`.
      s: Singular values, descending, `[k]`.
      v: Orthonormal rows, `[k, d_out]`.
    """

    u: jax.Array
    s: jax.Array
    v: jax.Array


def svd(factors: Factors, rank: int | None = None) -> SVD:
    r"""The leading singular triplets of a product, from R x R cores only.

    R is the number of columns of `a`, k the wanted rank, l = k + 8 (or the largest rank there can
    be, if that is less).

    * R <= min(d_in, d_out, 1024): **exact** to the precision of the arithmetic. With the Gram
      blocks :math:`G_a = a^T a = L L^T` and :math:`G_b = b b^T`, the eigenvectors of
      :math:`L^T G_b L` are the coordinates of the singular vectors. A Gram matrix squares the
      condition number; so it only supplies the start, from which the triplets come by orthogonal
      projection of the product itself, and directions below :math:`10^{-2}` of the largest are
      improved by a power step. Cost: :math:`O(R^2 (d_{in} + d_{out}) + R^3)`.
    * Larger R: **sketched**, by subspace iteration from a fixed Gaussian matrix of
      :math:`l = 2 k + 8` columns, four sweeps. Exact again if l reaches min(d_in, d_out), and
      otherwise as good as the decay of the spectrum allows: the error of the truncation is a few
      per cent above the optimum at worst, for a flat spectrum. Cost:
      :math:`O(R\, l\, (d_{in} + d_{out}))`, so linear in R.

    Vectors of zero singular values are orthonormal too, completed arbitrarily. The derivative of
    the values is right, and finite always; for functions of the product differentiate `truncate`.

    Args:
      factors: Without batch axes (`jax.vmap` adds them).
      rank: How many triplets; all of `min(R, d_in, d_out)` by default, and never more.

    Returns:
      Triplets in float32 at the least.

    Raises:
      ValueError: If `rank` is less than one.

    Examples:
      >>> import jax.numpy as jnp
      >>> svd(Factors(jnp.array([[3.], [4.]]), jnp.array([[0., 2.]]))).s
      Array([10.], dtype=float32)

    References:
      Halko, Martinsson, Tropp, *Finding structure with randomness*, SIAM Review 2011.
    """
    chex.assert_rank([factors.a, factors.b], 2)
    return _svd(factors, _possible(factors, rank))


def _possible(factors: Factors, rank: int | None) -> int:
    limit = min(*factors.a.shape, factors.b.shape[1])
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return limit if rank is None else min(rank, limit)


def truncate(factors: Factors, rank: int, *, split: Split = "right") -> Factors:
    """The best approximation of a product at a rank, `svd` in factored form again.

    Args:
      factors: Without batch axes.
      rank: The rank of the result; beyond what the product can have it is padded by zeros.
      split: Where the singular values go: `'right'`, on `b`, so that `a` is orthonormal;
        `'balanced'`, their roots on both (a direction that is zero stays a unit one of `a`, so
        that training can go on from it); `'left'`, on `a`.

    Returns:
      `Factors(a [d_in, rank], b [rank, d_out])`, directions in descending order, so that the
      first q columns and rows are the best approximation at rank q. Its derivative is right for
      every function of the product, and finite always.

    Raises:
      ValueError: If `rank` is less than one, or the split unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> two = Factors(jnp.eye(3)[:, :2], jnp.array([[5., 0., 0., 0.], [0., 2., 0., 0.]]))
      >>> best = truncate(two, 1)
      >>> print(jnp.abs(jnp.round((best.a @ best.b)[0], 4)))
      [5. 0. 0. 0.]
    """
    chex.assert_rank([factors.a, factors.b], 2)
    lookup(dict.fromkeys(get_args(Split)), split, "split")
    return pad(_truncate(factors, _possible(factors, rank), split), rank)


def singular_values(factors: Factors) -> jax.Array:
    """All singular values of a product, descending, `[min(R, d_in, d_out)]`.

    By `svd` while R is at most min(d_in, d_out), 1024. Beyond, there may be as many vectors as the
    product has columns, and they are not made: the Gram matrix of the short side is summed over
    blocks of the long one. There values below 1e-3 of the largest are rounding, and the cost is
    O(R d_in d_out), in the memory of one block.
    """
    chex.assert_rank([factors.a, factors.b], 2)
    (d_in, rank), d_out = factors.a.shape, factors.b.shape[1]
    if rank <= min(d_in, d_out, _EXACT):
        return svd(factors).s
    tall = factors if d_in >= d_out else transpose(factors)
    rows = _blocks(tall.a)

    def add(total: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        part = matmul(block, tall.b)
        return total + matmul(part.T, part), None

    size = min(d_in, d_out)
    squares, _ = jax.lax.scan(add, jnp.zeros((size, size), rows.dtype), rows)
    return safe_sqrt(_eigh(squares, min(size, rank))[0])


def truncated_sum(terms: Sequence[Factors], rank: int, *, split: Split = "right") -> Factors:
    """The best approximation of a sum of products at a rank: `truncate` of `concatenate`.

    A difference is the sum with `scaled(y, -1.0)`; a weighted sum of stacked clients is
    `truncate(weighted_sum(stacked, weights), rank)`.
    """
    return truncate(concatenate(terms), rank, split=split)


def cut(factors: Factors, rank: jax.Array | int) -> Factors:
    """The first `rank` columns of `a` and rows of `b`, the others zero: the shape stays.

    Args:
      factors: Without batch axes, if `rank` has any.
      rank: May be traced; its axes become the leading ones of the result.
    """
    keep = jnp.arange(factors.rank) < jnp.asarray(rank)[..., None]
    return Factors(
        jnp.where(keep[..., None, :], factors.a, 0), jnp.where(keep[..., :, None], factors.b, 0)
    )


class _Frame(NamedTuple):
    """A product as `p @ core @ q`: orthonormal columns, an l x l core, orthonormal rows."""

    p: jax.Array
    core: jax.Array
    q: jax.Array


def _frame(factors: Factors, rank: int) -> _Frame:
    """A product within subspaces that hold its leading `rank` singular vectors, descending.

    Bases are columns on the side of `a` and rows on the side of `b`, as the factors lie in memory:
    transposing a thin matrix can take longer than all arithmetic on it. The first basis is the
    one of the short side, `rows` saying whether that is the side of `b`.
    """
    dtype = jnp.promote_types(jnp.result_type(*factors), jnp.float32)
    factors = jax.tree.map(lambda x: x.astype(dtype), factors)
    (d_in, columns), d_out = factors.a.shape, factors.b.shape[1]
    rows, short = d_in >= d_out, min(d_in, d_out)
    if columns <= min(short, _EXACT):
        width = min(columns, rank + _OVERSAMPLING)
        basis = _start(factors, width, rows)
    else:
        width = min(columns, short, 2 * rank + _OVERSAMPLING)
        noise = _noise((d_in if rows else d_out, width), dtype)
        basis = orthonormal(_image(factors, noise if rows else noise.T, not rows), rows=rows)
        if width < short:
            basis = jax.lax.fori_loop(0, _SWEEPS, lambda _, q: _sweep(factors, q, rows), basis)
    image = _image(factors, basis, rows)
    # In descending order and nearly orthogonal, so that QR is accurate for the small ones too.
    turn = _eigh(gram(image.T) if rows else gram(image), width)[1]
    if rows:
        p, core = _qr(matmul(image, turn), rows=False)
        return _Frame(p, core, matmul(turn.T, basis))
    q, core = _qr(matmul(turn.T, image), rows=True)
    return _Frame(matmul(basis, turn), core.T, q)


def _image(factors: Factors, basis: jax.Array, rows: bool) -> jax.Array:
    """A product times a basis of rows, or a basis of columns times the product."""
    if rows:
        return matmul(factors.a, matmul(factors.b, basis.T))
    return matmul(matmul(basis.T, factors.a), factors.b)


@functools.partial(jax.jit, static_argnums=1)
def _svd(factors: Factors, rank: int) -> SVD:
    p, core, q = _frame(factors, rank)
    left, s, right = _small_svd(core, rank)
    return SVD(matmul(p, left), s, matmul(right, q))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _truncate(factors: Factors, rank: int, split: Split) -> Factors:
    p, core, q = _frame(factors, rank)
    left, s, right = _small_svd(core, rank)
    # A projection on one side's singular vectors, which `_eigh` knows how to differentiate.
    if split == "left":
        return Factors(matmul(p, matmul(core, right.T)), matmul(right, q))
    result = Factors(matmul(p, left), matmul(matmul(left.T, core), q))
    if split == "right":
        return result
    root = jnp.where(s > 0, safe_sqrt(s), 1)
    return Factors(result.a * root, result.b / root[:, None])


def _sweep(factors: Factors, basis: jax.Array, rows: bool) -> jax.Array:
    """A step of subspace iteration on an orthonormal basis."""
    image = orthonormal(_image(factors, basis, rows), rows=not rows)
    return orthonormal(_image(factors, image, not rows), rows=rows)


def _start(factors: Factors, width: int, rows: bool) -> jax.Array:
    """The leading singular vectors of the short side of a product, by its Gram blocks."""
    blocks = gram(factors.a.T), gram(factors.b)
    long, short = blocks if rows else blocks[::-1]
    # Unit vectors on the long side: how a product is split into factors no longer matters.
    size = safe_sqrt(jnp.diagonal(long))
    unit = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
    root = _cholesky(long * unit[:, None] * unit, _SHIFT)
    core = matmul(root.T, matmul(short * size[:, None] * size, root))
    values, vectors = _eigh(core, width)
    coordinates = size[:, None] * matmul(root, vectors)
    vectors = matmul(coordinates.T, factors.b) if rows else matmul(factors.a, coordinates)
    basis = orthonormal(vectors, rows=rows)
    poor = values[-1] < _POOR * values[0]
    return jax.lax.cond(poor, lambda: _sweep(factors, basis, rows), lambda: basis)


def gram(x: jax.Array) -> jax.Array:
    """`x @ x.T`."""
    return matmul(x, x.T)


def orthonormal(x: jax.Array, *, rows: bool = False) -> jax.Array:
    """An orthonormal basis of the columns of `x [d, l]`, or of the rows of `x [l, d]`; l <= d.

    The Q of a QR decomposition. What depends on the vectors before it, to 1% of its length, is
    replaced by a new direction. Three rounds of Cholesky QR: tall matrices are only multiplied, and
    only an l x l core is decomposed.
    """
    return _qr(x, rows)[0]


def _qr(x: jax.Array, rows: bool) -> tuple[jax.Array, jax.Array]:
    """Q and the triangle R: `x = Q R`, or `x = R^T Q` for rows, but for vectors replaced."""
    count = x.shape[0 if rows else 1]
    identity = jnp.eye(count, dtype=x.dtype)

    def again(pair: tuple[jax.Array, jax.Array], shift: jax.Array) -> tuple[Any, None]:
        q, r = pair
        square = gram(q if rows else q.T)
        size = safe_sqrt(jnp.diagonal(square))
        unit = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
        root = _cholesky(square * unit[:, None] * unit + jnp.diag(size == 0), shift)
        new = (size > 0) & (jnp.square(jnp.diagonal(root)) > _SMALL * (shift > 0))
        inverse = _linalg.triangular_inverse(root)
        step = unit[:, None] * inverse.T * new
        q = matmul(step.T, q) if rows else matmul(q, step)

        def renewed() -> jax.Array:
            if rows:
                return jnp.where(new[:, None], q, _noise((x.shape[1], count), x.dtype).T)
            return jnp.where(new, q, _noise(x.shape, x.dtype))

        q = jax.lax.cond(jnp.all(new), lambda: q, renewed)
        return (q, new[:, None] * matmul(root.T, size[:, None] * r)), None

    # The last round has no shift, and neither finds nor needs new directions.
    rounds = jnp.asarray([_SHIFT, _SHIFT, 0.0], x.dtype)
    return jax.lax.scan(again, (x, identity), rounds)[0]


def _noise(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Always the same noise in unit columns; made so as to compile in no time."""
    rows, columns = shape
    index = jax.lax.iota(dtype, rows)[:, None] + rows * jax.lax.iota(dtype, columns)
    noise = (jnp.sin(index + 1) * 43758.5453) % 1 - 0.5
    return noise / jnp.sqrt(jnp.sum(noise**2, axis=0))


def _cholesky(x: jax.Array, shift: jax.Array | float) -> jax.Array:
    """Of `x` of about unit diagonal, shifted by as much as its rounding may have taken away."""
    size = len(x)
    return _linalg.cholesky(x + shift * size**0.5 * jnp.finfo(x.dtype).eps * jnp.eye(size))


def _small_svd(core: jax.Array, rank: int) -> SVD:
    """Leading triplets of a small square matrix, by the symmetric matrix `[[0, X], [X^T, 0]]`.

    Its eigenvalues are plus and minus the singular values, not squared; so this is as accurate as
    an SVD, where an accelerator has a fast `eigh` and a slow `svd`.
    """
    zero = jnp.zeros_like(core)
    values, vectors = _eigh(jnp.block([[zero, core], [core.T, zero]]), rank)
    left, right = jax.vmap(orthonormal)(jnp.stack(jnp.split(vectors, 2)))
    return SVD(left, jnp.maximum(values, 0), right.T)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _eigh(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest eigenvalues of a symmetric matrix, descending, and their vectors.

    The derivative leaves out rotations among the vectors returned. They are what divides by
    zero when eigenvalues coincide, and no function of the space that they span depends on them.
    """
    values, vectors = _linalg.eigh(x)
    return values[::-1][:count], vectors[:, ::-1][:, :count]


@_eigh.defjvp
def _eigh_jvp(
    count: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    (x,), (dx,) = primals, tangents
    values, vectors = (y[..., ::-1] for y in _linalg.eigh(x))
    kept, others = vectors[:, :count], vectors[:, count:]
    inside = matmul(dx, kept)
    gaps = values[:count] - values[count:, None]
    tiny = jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(values))
    inverse = jnp.where(gaps > tiny, 1 / jnp.where(gaps > tiny, gaps, 1), 0)
    tangent = matmul(others, inverse * matmul(others.T, inside))
    return (values[:count], kept), (jnp.sum(kept * inside, axis=0), tangent)
