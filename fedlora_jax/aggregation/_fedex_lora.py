"""FedEx-LoRA: the means, and what they miss merged into the backbone."""

import jax
import jax.numpy as jnp

from fedlora_jax import lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.lowrank import Factors


def fedex_lora(stacked: PyTree, weights: Weights, *, rank: int | None = None) -> Aggregated:
    r"""Averages the factors and adds what the product of the means misses to the backbone.

    .. math::
      \text{adapters} = (\bar a, \bar b), \qquad
      \text{residual} = M - \bar a \bar b = \sum_k p_k (a_k - \bar a)(b_k - \bar b)

    Exact. Since :math:`\sum_k p_k (a_k - \bar a) = 0`, any matrix may stand for the second mean; we
    take the b of the client of the largest weight, the first of equals, whose term then vanishes:
    rank (K - 1) r. The others count by their weights, however large their factors.

    Cost: two passes over the factors, plus `lowrank.svd` of the residual if `rank` is given. Up a
    kernel: :math:`r (d_{in} + d_{out})`; down: K times that, or :math:`(r + r')(d_{in} + d_{out})`.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.
      rank: Send only the best approximation of the residual at this rank r'. By default all.

    Returns:
      `Aggregated(adapters, residual)`; no residual if K = 1.

    Raises:
      ValueError: On an impossible rank, or weights or factors that cannot be used, see
        `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.array([[[1.]], [[3.]]]), jnp.array([[[1.]], [[3.]]]))}
      >>> residual = aggregation.fedex_lora(stacked, jnp.ones(2)).residual['dense']
      >>> residual.a @ residual.b  # (1 + 9) / 2 - 2 * 2
      Array([[1.]], dtype=float32)

    References:
      Singhal et al., *FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
      Foundation Models*, ACL 2025, arXiv:2410.09432.
    """
    _base.check_rank("fedex_lora", rank, stacked)
    return _base.run(_fedex_lora, stacked, weights, rank=rank)


def _fedex_lora(clients: Factors, weights: jax.Array, *, rank: int | None) -> Aggregated:
    average, count = lowrank.mean(clients, weights), len(weights)
    if count == 1:
        return Aggregated(adapters=average, residual=None)
    # The last place as a value: a slice at a fixed one goes to one device and from there to all.
    largest, last = jnp.argmax(weights), jnp.max(jnp.arange(count))
    changes = Factors(clients.a - average.a, clients.b - clients.b[largest])
    # The last client takes the place of the term that vanishes, and its own is cut off: of a sum
    # over K a device can add up its own clients' share; K - 1 divide over no devices.
    here = jnp.arange(count) == largest
    changes = Factors(*(jnp.where(here[:, None, None], x[last], x) for x in changes))
    stack = lowrank.weighted_sum(changes, jnp.where(here, weights[-1], weights))
    residual = Factors(stack.a[:, : -clients.rank], stack.b[: -clients.rank])
    if rank is not None:
        residual = lowrank.truncate(residual, rank)
    return Aggregated(adapters=average, residual=residual)
