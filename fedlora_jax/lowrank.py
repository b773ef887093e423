"""Low-rank matrices in factored form, and the algebra that never multiplies the factors out.

A matrix `[d_in, d_out]` of rank at most r is held as `Factors(a [d_in, r], b [r, d_out])`, its product
being `a @ b`. Every function here costs O(r^2 (d_in + d_out)) at most and forms nothing of size
d_in x d_out. Functions of one `Factors` accept leading batch axes unless they say otherwise.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

Scalar: TypeAlias = jax.Array

# Fewest columns of a product that `norm` forms at once when the rank exceeds a dimension.
_BLOCK = 128


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


def norm(factors: Factors) -> Scalar:
    """The Frobenius norm of one product, accurate also where terms of the product cancel.

    `sqrt(inner(x, x))` loses half the digits of a difference. With `a = Q R`, `|a b| = |R b|`
    keeps them: cancellation happens before anything is squared. If the rank reaches a dimension, R
    saves nothing, and blocks of columns of the product are formed in turn and added up instead.

    Args:
      factors: Without batch axes.
    """
    chex.assert_rank([factors.a, factors.b], 2)
    if factors.a.shape[0] < factors.b.shape[1]:
        factors = transpose(factors)
    d_in, rank = factors.a.shape
    if rank < d_in and rank <= factors.b.shape[1]:
        return _norm(matmul(jnp.linalg.qr(factors.a, mode="r"), factors.b))
    return _norm_by_blocks(factors)


def _norm(x: jax.Array) -> Scalar:
    """The Frobenius norm, safe against overflow, with gradient zero (not NaN) at zero."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=0.0))
    unit = jnp.where(largest > 0, largest, 1.0)
    square = jnp.sum(jnp.square(x / unit))
    return unit * jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _norm_by_blocks(factors: Factors) -> Scalar:
    rank, d_out = factors.b.shape
    width = min(_BLOCK, -(-d_out // 2))
    blocks = -(-d_out // width)
    columns = jnp.pad(factors.b, [(0, 0), (0, blocks * width - d_out)])
    columns = jnp.moveaxis(columns.reshape(rank, blocks, width), 1, 0)
    return _norm(jax.lax.map(lambda block: _norm(matmul(factors.a, block)), columns))
