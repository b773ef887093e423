"""How far an aggregate is from the ideal: the weighted mean of the products."""

from typing import Any

import jax
import jax.numpy as jnp

from fedlora_jax import lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.lowrank import Factors


def error(
    stacked: PyTree, weights: Weights, aggregated: Aggregated, *, per_kernel: bool = False
) -> Any:
    r"""The relative Frobenius distance of an aggregate from the ideal update.

    .. math::
      \frac{\lVert M - (\text{residual} + \hat a \hat b) \rVert_F}{\lVert M \rVert_F},
      \qquad M = \sum_k p_k a_k b_k

    over all kernels together; the scale cancels. Of factors that stay with their clients
    (`fedsa_lora`: a leading axis K) the weighted mean counts. Computed in factored form and without
    squaring what cancels, so that an exact method shows about 1e-7 in float32.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.
      aggregated: What an aggregation function returned for them.
      per_kernel: Return a dict from kernel path to its own relative distance instead.

    Returns:
      A scalar, or a dict of scalars. Where the ideal is zero, the distance itself: zero if the
      aggregate is zero too.

    Raises:
      ValueError: On weights or factors that cannot be used, see `fedlora_jax.aggregation`, or if
        `aggregated` is no `Aggregated`, or its kernels are not those of `stacked`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.array([[[1.]], [[3.]]]), jnp.array([[[1.]], [[3.]]]))}
      >>> weights = jnp.ones(2)
      >>> mean = aggregation.fedit(stacked, weights)    # 2 * 2 = 4 instead of (1 + 9) / 2 = 5
      >>> round(float(aggregation.error(stacked, weights, mean)), 6)
      0.2
    """
    if not isinstance(aggregated, Aggregated):
        raise ValueError(
            "aggregated must be Aggregated(adapters, residual), as an aggregation function returns "
            f"it, got {type(aggregated).__name__}; of adapters alone: Aggregated(adapters, None)"
        )
    parts = [part for part in aggregated if part is not None]
    pairs = _base.each_kernel(_distance, stacked, weights, trees=parts)
    if per_kernel:
        return dict(zip(_base.names(stacked), (_ratio(*pair) for pair in pairs), strict=True))
    distances, sizes = (jnp.stack(x) for x in zip(*pairs, strict=True))
    return _ratio(lowrank.vector_norm(distances), lowrank.vector_norm(sizes))


def _distance(clients: Factors, weights: jax.Array, *terms: Factors) -> tuple[jax.Array, jax.Array]:
    """`|M - aggregate|` and `|M|` of one kernel."""
    ideal = lowrank.weighted_sum(clients, weights)
    reached = [lowrank.scaled(shared(term, weights), -1.0) for term in terms]
    return lowrank.norm(lowrank.concatenate([ideal, *reached])), lowrank.norm(ideal)


def shared(term: Factors, weights: jax.Array) -> Factors:
    """A term without client axes: of factors that stay with their clients, the mean."""
    return Factors(
        *(
            jnp.einsum("k,kij->ij", weights, x, precision="highest") if x.ndim > 2 else x
            for x in term
        )
    )


def _ratio(distance: jax.Array, size: jax.Array) -> jax.Array:
    return distance / jnp.where(size > 0, size, 1.0)
