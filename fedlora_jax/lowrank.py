"""Low-rank matrices in factored form, and the algebra that never multiplies the factors out.

A matrix `[d_in, d_out]` of rank at most r is held as `Factors(a [d_in, r], b [r, d_out])`, its
product being `a @ b`. Every function here costs O(r^2 (d_in + d_out)) at most and forms nothing of
size d_in x d_out. Functions of one `Factors` accept leading batch axes unless they say otherwise.
Norms, inner products and decompositions are float32 at the least, whatever factors are stored in.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from fedlora_jax import _batching, _linalg
from fedlora_jax.names import check_choices

Scalar: TypeAlias = jax.Array
Split: TypeAlias = Literal["right", "balanced", "left"]

# Most rows of a product that are formed at once where the rank exceeds a dimension.
_BLOCK = 128
# Largest core that `svd` decomposes, and what it does beyond: see there.
_EXACT = 1024
_OVERSAMPLING = 8
_SWEEPS = 4
# Singular values closer than this, relatively, count as one in derivatives.
_APART = 1e-3


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


@_linalg.numpy_promotion()
def wide(arrays: Any) -> Any:
    """A tree of arrays in float32, or wider if one of them is."""
    dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(arrays)), jnp.float32)
    return jax.tree.map(lambda x: x.astype(dtype), arrays)


def transpose(factors: Factors) -> Factors:
    """The transposed matrix `(a b)^T = b^T a^T`, its sides exchanged."""
    return Factors(jnp.swapaxes(factors.b, -1, -2), jnp.swapaxes(factors.a, -1, -2))


def scaled(factors: Factors, weight: jax.Array | float) -> Factors:
    """`weight * a @ b`, with the weight on `b`: one, or with the batch axes of `factors`."""
    if jnp.ndim(weight):
        weight = jnp.asarray(weight)[..., None, None]
    return Factors(factors.a, weight * factors.b)


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
    x, y = wide((x, y))
    left = matmul(jnp.swapaxes(x.a, -1, -2), y.a)
    right = matmul(x.b, jnp.swapaxes(y.b, -1, -2))
    return jnp.sum(left * right, axis=(-2, -1))


@jax.custom_jvp
def norm(factors: Factors) -> Scalar:
    """The Frobenius norm of one product, accurate also where terms of the product cancel.

    `sqrt(inner(x, x))` loses half the digits of a difference. With `a = Q R`, `|a b| = |R b|`
    keeps them: cancellation happens before anything is squared. If the rank reaches a dimension, R
    saves nothing, and blocks of rows of the product are formed in turn and added up instead; so
    they are on accelerators always, where products cost next to nothing.
    The gradient is zero, not NaN, where the product is.

    Args:
      factors: Without batch axes.
    """
    chex.assert_rank([factors.a, factors.b], 2)
    factors = wide(factors)
    if factors.a.shape[0] < factors.b.shape[1]:
        factors = transpose(factors)
    d_in, rank = factors.a.shape
    if rank < d_in and rank <= factors.b.shape[1] and not _linalg.products_are_cheap():
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
    x = wide(x)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=0.0))
    unit = jnp.where(largest > 0, largest, 1.0)
    square = jnp.sum(jnp.square(x / unit))
    return unit * jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def power_of_two(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """The power of two next to the largest size of an entry; one where all entries are zero.

    What is divided by it can be squared, and no digit changes. The axes that it is taken over
    stay, of length one. A constant in derivatives.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0))
    numbers = jnp.finfo(largest.dtype)
    power = jax.lax.reduce_precision(largest, numbers.nexp, 0)
    # Of the extremes the inverse, by which a compiler multiplies, is no number.
    return jnp.where(largest > 0, jnp.clip(power, 4 * numbers.tiny, 0.25 / numbers.tiny), 1)


def of_size_one(
    factors: Factors, axis: int | tuple[int, ...] | None = None
) -> tuple[Factors, Factors]:
    """Both factors divided by a power of two each, and these, as `power_of_two` has them."""
    units = Factors(*(power_of_two(x, axis) for x in factors))
    return Factors(*(x / unit for x, unit in zip(factors, units, strict=True))), units


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

    R is the number of columns of `a`, k the wanted rank.

    * R <= min(d_in, d_out, 1024): **exact**. The QR decompositions :math:`a = Q_a R_a` and
      :math:`b^T = Q_b R_b`, and the SVD of the core :math:`R_a R_b^T`. Nothing is squared, so that
      the error is one of rounding relative to the terms :math:`|a_i| |b_i|` of the product, and
      the difference of two products that nearly cancel keeps the digits that it has. Cost:
      :math:`O(R^2 (d_{in} + d_{out}) + R^3)`.
    * Larger R: **sketched**, by subspace iteration from a fixed matrix of noise of
      :math:`l = 2 k + 8` columns, four sweeps, and then as above. Exact again if l reaches
      min(d_in, d_out), and otherwise as good as the decay of the spectrum allows: the error of the
      truncation is a few per cent above the optimum at worst, for a flat spectrum. Cost:
      :math:`O(R\, l\, (d_{in} + d_{out}))`, so linear in R.

    Vectors of zero singular values are orthonormal too, completed arbitrarily. The derivative is
    finite always, and right but for rotations among vectors whose singular values nearly coincide.

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
    return _svd(wide(factors), _possible(factors, rank))


def _possible(factors: Factors, rank: int | None) -> int:
    limit = min(*factors.a.shape, factors.b.shape[1])
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return limit if rank is None else min(rank, limit)


@_linalg.numpy_promotion()
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
    check_choices(truncate, split=split)
    if split == "left":
        return transpose(truncate(transpose(factors), rank))
    best = _truncate(wide(factors), _possible(factors, rank))
    if split == "balanced":
        size = jax.vmap(vector_norm)(best.b)
        root = jnp.where(size > 0, safe_sqrt(size), 1)
        best = Factors(best.a * root, best.b / root[:, None])
    return pad(best, rank)


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
    factors, units = of_size_one(wide(factors))
    tall = factors if d_in >= d_out else transpose(factors)
    rows = _blocks(tall.a)

    def add(total: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        part = matmul(block, tall.b)
        return total + matmul(part.T, part), None

    size = min(d_in, d_out)
    zeros = _batching.varying_as(jnp.zeros((size, size), rows.dtype), *tall)
    squares, _ = jax.lax.scan(add, zeros, rows)
    values = jnp.linalg.eigvalsh(squares)[::-1]
    return (units.a * units.b)[0] * safe_sqrt(values[: min(size, rank)])


def truncated_sum(terms: Sequence[Factors], rank: int, *, split: Split = "right") -> Factors:
    """The best approximation of a sum of products at a rank: `truncate` of `concatenate`.

    A difference is the sum with `scaled(y, -1.0)`; a weighted sum of stacked clients is
    `truncate(weighted_sum(stacked, weights), rank)`.
    """
    return truncate(concatenate(terms), rank, split=split)


@_linalg.numpy_promotion()
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


def _narrowed(factors: Factors, rank: int) -> Factors:
    """The product itself, or what of it a sketch sees if it has too many columns."""
    columns, short = factors.rank, min(factors.a.shape[0], factors.b.shape[1])
    if columns <= min(short, _EXACT):
        return factors
    if factors.a.shape[0] < factors.b.shape[1]:
        return transpose(_narrowed(transpose(factors), rank))
    width = min(columns, short, 2 * rank + _OVERSAMPLING)
    basis = orthonormal(_noise((short, width), factors.a.dtype))
    basis = _batching.varying_as(basis, *factors)

    def image(basis: jax.Array) -> jax.Array:
        return matmul(factors.a, matmul(factors.b, basis))

    def sweep(_: int, basis: jax.Array) -> jax.Array:
        left = orthonormal(image(basis))
        return orthonormal(matmul(factors.b.T, matmul(factors.a.T, left)))

    if width < short:
        basis = jax.lax.fori_loop(0, _SWEEPS, sweep, basis)
    return Factors(image(basis), basis.T)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def _svd(factors: Factors, rank: int) -> SVD:
    narrow = _narrowed(factors, rank)
    (p, left), (q, right) = _linalg.qr(narrow.a), _linalg.qr(narrow.b.T)
    u, s, v = _linalg.svd(matmul(left, right.T))
    return SVD(matmul(p, u[:, :rank]), s[:rank], matmul(v[:rank], q.T))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def _truncate(factors: Factors, rank: int) -> Factors:
    """`(U, U^T a b)`: a projection on the left singular vectors."""
    narrow = _narrowed(factors, rank)
    p, left = _linalg.qr(narrow.a)
    core = matmul(left, _linalg.qr_r(narrow.b.T).T)
    u = matmul(p, _linalg.svd(core)[0][:, :rank])
    return Factors(u, matmul(matmul(u.T, factors.a), factors.b))


class _Motion(NamedTuple):
    """How singular vectors move with a product: the derivative of its SVD, in parts.

    Rotations among vectors that are kept, of singular values that nearly coincide, are left out:
    they divide by the gap, and no function of the space that the vectors span depends on them.

    Attributes:
      all: Every triplet there is, of which the first k are kept.
      du: Of the vectors kept, `[d_in, k]`.
      dv: `[k, d_out]`.
      ds: `[k]`.
      db: Of `U^T a b`, `[k, d_out]`.
    """

    all: SVD
    du: jax.Array
    dv: jax.Array
    ds: jax.Array
    db: jax.Array


@_linalg.numpy_promotion()
def _motion(factors: Factors, tangent: Factors, rank: int) -> _Motion:
    columns = min(factors.rank, factors.a.shape[0], factors.b.shape[1])
    whole = _svd(factors, columns if columns <= _EXACT else 2 * rank + _OVERSAMPLING)
    (u_all, s_all, v_all), (a, b), (da, db) = whole, factors, tangent
    u, s, v = u_all[:, :rank], s_all[:rank], v_all[:rank]
    forward = matmul(da, matmul(b, v.T)) + matmul(a, matmul(db, v.T))
    backward = matmul(matmul(u.T, da), b) + matmul(matmul(u.T, a), db)

    # Row i and column j: how much vector j turns towards vector i.
    tiny = jnp.finfo(s.dtype).eps * s[0]
    distance, others = s - s_all[:, None], jnp.arange(len(s_all))[:, None] >= rank
    good = jnp.where(others, distance > tiny, jnp.abs(distance) > tiny + _APART * s)
    gaps = distance * (s + s_all[:, None])
    inverse = jnp.where(good, 1 / jnp.where(good, gaps, 1), 0)
    left, right = matmul(u_all.T, forward), matmul(v_all, backward.T)
    turn_u = inverse * (left * s + s_all[:, None] * right)
    turn_v = inverse * (right * s + s_all[:, None] * left)
    unit = jnp.where(s > tiny, 1 / jnp.where(s > tiny, s, 1), 0)

    def outside(x: jax.Array, basis: jax.Array) -> jax.Array:
        return x - matmul(basis, matmul(basis.T, x))

    return _Motion(
        whole,
        du=matmul(u_all, turn_u) + outside(forward, u_all) * unit,
        dv=(matmul(v_all.T, turn_v) + outside(backward.T, v_all.T) * unit).T,
        ds=jnp.sum(u * forward, axis=0),
        db=backward + matmul(turn_u.T, s_all[:, None] * v_all),
    )


@_svd.defjvp
def _svd_jvp(rank: int, primals: tuple[Factors], tangents: tuple[Factors]) -> tuple[SVD, SVD]:
    moved = _motion(*primals, *tangents, rank)
    u, s, v = moved.all
    return SVD(u[:, :rank], s[:rank], v[:rank]), SVD(moved.du, moved.ds, moved.dv)


@_truncate.defjvp
def _truncate_jvp(
    rank: int, primals: tuple[Factors], tangents: tuple[Factors]
) -> tuple[Factors, Factors]:
    moved = _motion(*primals, *tangents, rank)
    u = moved.all.u[:, :rank]
    b = matmul(matmul(u.T, primals[0].a), primals[0].b)
    return Factors(u, b), Factors(moved.du, moved.db)


def gram(x: jax.Array) -> jax.Array:
    """`x @ x.T`."""
    x = wide(x)
    return matmul(x, x.T)


def orthonormal(x: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns of `x [d, l]`, l <= d, whatever their rank."""
    return _linalg.qr(wide(x))[0]


@_linalg.numpy_promotion()
def _noise(shape: tuple[int, int], dtype: Any) -> jax.Array:
    """Always the same noise; made so as to compile in no time."""
    rows, columns = shape
    index = jax.lax.iota(dtype, rows)[:, None] + rows * jax.lax.iota(dtype, columns)
    return (jnp.sin(index + 1) * 43758.5453) % 1 - 0.5
