"""Decompositions of small matrices, safe to batch.

jaxlib 0.10 spreads a batched LAPACK call over the threads of the CPU client and waits for them on
one of these same threads. As many independent calls at once as there are threads, two on a small
machine, wait for each other for ever. Later versions work through a batch in one thread. With 0.10
on a CPU, so do these functions: a batch is a loop over single matrices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

_POOLED = jax.__version_info__[:2] == (0, 10)


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


@_safe
def qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Householder's QR decomposition `(q, r)`: orthonormal columns also where `x` is deficient."""
    q, r = jnp.linalg.qr(x)
    return q, r


@_safe
def qr_r(x: jax.Array) -> jax.Array:
    """The triangle of a QR decomposition."""
    return jnp.linalg.qr(x, mode="r")


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
