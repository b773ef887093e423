"""Decompositions of small matrices, safe to batch, and fast on accelerators.

jaxlib 0.10 spreads a batched LAPACK call over the threads of the CPU client and waits for them on
one of these same threads. As many independent calls at once as there are threads, two on a small
machine, wait for each other for ever. Later versions work through a batch in one thread. With 0.10
on a CPU, so do these functions: a batch is a loop over single matrices.

Accelerators reflect one column after the other, and one matrix after the other: Householder's QR
of 28 matrices of 2048 x 320 takes an H200 0.7 s, in which it could multiply them a thousand times.
There a QR decomposition is made of matrix products, see `qr_by_products`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

_HIGHEST = jax.lax.Precision.HIGHEST
_POOLED = jax.__version_info__[:2] == (0, 10)


@contextlib.contextmanager
def numpy_promotion() -> Iterator[None]:
    """Within it shapes and types meet by NumPy's rules, whatever a user's project forbids itself.

    Rules of derivatives need it for themselves: they are traced where a gradient is taken.
    """
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def _safe(function: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """A function of one matrix `[m, n]`, to be batched by `vmap` alone.

    Derivatives are those of `function`, and batched as JAX does it.
    """
    if not _POOLED:
        return function

    @custom_vmap
    def primal(x: jax.Array) -> Any:
        if x.ndim == 2:
            return function(x)
        flat = x.reshape(-1, *x.shape[-2:])
        results = jax.lax.platform_dependent(
            flat, cpu=functools.partial(jax.lax.map, function), default=jax.vmap(function)
        )
        return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), results)

    @primal.def_vmap
    def batched(size: int, is_batched: list[bool], x: jax.Array) -> tuple[Any, Any]:
        result = primal(x)
        return result, jax.tree.map(lambda _: True, result)

    safe = jax.custom_jvp(primal)

    @safe.defjvp
    def derivative(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Any, Any]:
        return jax.jvp(function, primals, tangents)

    return functools.wraps(function)(safe)


def finite_rows(arrays: Iterable[jax.Array]) -> jax.Array:
    """Which of K rows are finite in all arrays `[K, ...]`, bool `[K]`; true without any.

    A sum is finite if its terms are, scaled so that it cannot overflow. It is a product, for which
    nothing is compiled: of an array's `isfinite` and `all` the compiler makes five functions, and
    puts the chain over the arrays into whatever depends on the result.
    """

    def small_sums(x: jax.Array) -> jax.Array:
        wide = x.reshape(len(x), -1).astype(jnp.promote_types(x.dtype, jnp.float32))
        scale = jnp.full(wide.shape[1], 2.0**-32, wide.dtype)
        return jnp.matmul(wide, scale, precision=_HIGHEST)

    sums = [small_sums(x) for x in arrays]
    if not sums:
        return jnp.asarray(True)
    found = jnp.isfinite(jnp.stack(sums)).astype(jnp.float32)
    return jnp.matmul(jnp.ones(len(sums)), found, precision=_HIGHEST) == len(sums)


@_safe
def eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues of a symmetric matrix, ascending, and eigenvectors as columns."""
    values, vectors = jnp.linalg.eigh(x)
    return values, vectors


@_safe
def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The thin singular value decomposition `(u, s, v)`, `x = u @ diag(s) @ v`."""
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    return u, s, v


def products_are_cheap() -> bool:
    """Whether a decomposition had better be made of matrix products, as on accelerators."""
    return jax.default_backend() != "cpu"


@_safe
def qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A QR decomposition `(q, r)`: orthonormal columns also where `x` is deficient.

    The error of each column is one of rounding relative to its own norm.
    """
    if products_are_cheap():
        return qr_by_products(x)
    q, r = jnp.linalg.qr(x)
    return q, r


@_safe
def qr_r(x: jax.Array) -> jax.Array:
    """The triangle of a QR decomposition."""
    if products_are_cheap():
        return qr_by_products(x)[1]
    return jnp.linalg.qr(x, mode="r")


# What is added to the diagonal of each Gram matrix, in units of its trace times rounding.
_SHIFTS = (4.0, 4.0, 4.0, 4.0, 0.0, 0.0)


@numpy_promotion()
def qr_by_products(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""`(q, r)` of one matrix by Cholesky decompositions, as good as Householder's.

    With :math:`L L^T = X^T X`, :math:`X L^{-T}` has orthonormal columns, but for the square of the
    condition of X. A shift of the diagonal makes that harmless: each time the columns come closer,
    by up to the root of rounding, so that four times bring any X near to orthonormal columns, and
    twice without a shift are exact.

    Columns are scaled to one, so that the error of each is relative to its own norm. What depends
    on other columns is told from them by noise as small as rounding, as Householder's reflections
    leave it there too.

    References:
      Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, *Shifted Cholesky QR for computing the QR
      factorization of ill-conditioned matrices*, SIAM Journal on Scientific Computing 2020.
    """
    rows, columns = x.shape
    if rows < columns:
        q = qr_by_products(x[:, :rows])[0]
        return q, jnp.triu(jnp.matmul(q.T, x, precision=_HIGHEST))
    rounding = jnp.finfo(x.dtype).eps
    largest = jnp.max(jnp.abs(x), axis=0, initial=0)
    there = largest > 0
    norms = jnp.where(there, largest, 1)
    norms = norms * jnp.sqrt(jnp.sum(jnp.square(x / norms), axis=0))
    noise = jax.random.normal(jax.random.key(0), x.shape, x.dtype) * (rounding * rows**-0.5)
    identity = jnp.eye(columns, dtype=x.dtype)

    def orthogonalise(
        found: tuple[jax.Array, jax.Array], shift: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        q, r = found
        gram = jnp.matmul(q.T, q, precision=_HIGHEST)
        root = jnp.linalg.cholesky(gram + shift * rounding * jnp.trace(gram) * identity)
        q = jax.scipy.linalg.solve_triangular(root, q.T, lower=True).T
        return (q, jnp.matmul(root.T, r, precision=_HIGHEST)), None

    start = x / jnp.where(there, norms, 1) + noise, identity
    (q, r), _ = jax.lax.scan(orthogonalise, start, jnp.asarray(_SHIFTS, x.dtype))
    return q, jnp.triu(r) * jnp.where(there, norms, 0)


@_safe
def det(x: jax.Array) -> jax.Array:
    """The determinant."""
    return jnp.linalg.det(x)


@_safe
def cholesky(x: jax.Array) -> jax.Array:
    """The lower Cholesky factor of a positive definite matrix."""
    return jnp.linalg.cholesky(x)


@_safe
def triangular_inverse(x: jax.Array) -> jax.Array:
    """The inverse of a lower triangular matrix."""
    identity = jnp.eye(x.shape[-1], dtype=x.dtype)
    return jax.scipy.linalg.solve_triangular(x, identity, lower=True)
