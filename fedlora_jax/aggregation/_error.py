"""How far an aggregate is from the ideal: the weighted mean of the products."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedlora_jax import lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree
from fedlora_jax.lowrank import Factors


def error(
    stacked: PyTree, weights: jax.Array, aggregated: Aggregated, *, per_kernel: bool = False
) -> Any:
    r"""The relative Frobenius distance of an aggregate from the ideal update.

    .. math::
      \frac{\lVert M - (\text{residual} + \hat a \hat b) \rVert_F}{\lVert M \rVert_F},
      \qquad M = \sum_k p_k a_k b_k

    over all kernels together; the scale cancels. Computed in factored form and without squaring
    what cancels, so that an exact method shows about 1e-7 in float32.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.
      aggregated: What an aggregation function returned for them.
      per_kernel: Return a dict from kernel path to its own relative distance instead.

    Returns:
      A scalar, or a dict of scalars. Where the ideal is zero, the distance itself: zero if the
      aggregate is zero too.

    Raises:
      ValueError: On weights or factors that cannot be used, see `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.array([[[1.]], [[3.]]]), jnp.array([[[1.]], [[3.]]]))}
      >>> weights = jnp.ones(2)
      >>> mean = aggregation.fedit(stacked, weights)    # 2 * 2 = 4 instead of (1 + 9) / 2 = 5
      >>> round(float(aggregation.error(stacked, weights, mean)), 6)
      0.2
    """
    weights = jnp.asarray(weights)
    _base.check(stacked, weights)
    distances, sizes = _distances(stacked, weights, aggregated)
    if per_kernel:
        ratios = [_ratio(d, n) for d, n in zip(distances, sizes, strict=True)]
        return dict(zip(_base.names(stacked), ratios, strict=True))
    return _ratio(jnp.linalg.norm(distances), jnp.linalg.norm(sizes))


@functools.partial(jax.jit)
def _distances(
    stacked: PyTree, weights: jax.Array, aggregated: Aggregated
) -> tuple[jax.Array, jax.Array]:
    """For each kernel `|M - aggregate|` and `|M|`, two arrays in the order of the leaves."""
    clean, shares, _ = _base.prepared(stacked, weights)
    parts = [part for part in aggregated if part is not None]

    def measure(clients: Factors, *terms: Factors) -> tuple[jax.Array, jax.Array]:
        ideal = lowrank.weighted_sum(clients, shares)
        wide = [jax.tree.map(lambda x: x.astype(ideal.a.dtype), term) for term in terms]
        reached = [lowrank.scaled(term, -1.0) for term in wide]
        return lowrank.norm(lowrank.concatenate([ideal, *reached])), lowrank.norm(ideal)

    pairs = _base.map_kernels(measure, clean, *parts)
    distances, sizes = zip(*pairs, strict=True)
    return jnp.stack(distances), jnp.stack(sizes)


def _ratio(distance: jax.Array, size: jax.Array) -> jax.Array:
    return distance / jnp.where(size > 0, size, 1.0)
