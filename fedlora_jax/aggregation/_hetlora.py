"""HetLoRA: zero-padded means of clients of unequal rank, weighted by the size of their updates."""

import math
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp

from fedlora_jax import _linalg, lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.aggregation._fedit import _fedit
from fedlora_jax.lowrank import Factors
from fedlora_jax.names import check_choices

Per = Literal["client", "kernel"]


def hetlora(stacked: PyTree, weights: Weights, *, per: Per = "client") -> Aggregated:
    r"""Averages the factors with weights in proportion to the norms of the clients' products.

    .. math::
      w_k = \frac{\lVert a_k b_k \rVert_F}{\sum_j \lVert a_j b_j \rVert_F}, \qquad
      \bar a = \sum_k w_k a_k, \qquad \bar b = \sum_k w_k b_k

    over the clients of positive weight: `weights` say who is there, not how much of it, as in the
    paper. Smaller ranks are zero-padded, so their clients pull the last columns towards zero. The
    product of the means is biased as FedIT's is. A client of rank :math:`r_k` continues from the
    first :math:`r_k` columns (`aggregation.cut`).

    When: as a baseline for unequal ranks; `flexlora` and `flora` mix ranks without the bias.

    Cost: the norms, :math:`O(K r^2 (d_{in} + d_{out}))`, and one pass over the factors. Up and down
    a kernel: :math:`r_k (d_{in} + d_{out})`.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative. If all products are zero (b = 0 at the start), they are used.
      per: One norm a `'client'`, over all kernels, or one a client and `'kernel'`.

    Returns:
      `Aggregated(adapters, None)`.

    Raises:
      ValueError: On an unknown option, or weights or factors that cannot be used, see
        `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.ones((2, 1, 1)), jnp.array([[[1.]], [[3.]]]))}
      >>> mean = aggregation.hetlora(stacked, jnp.ones(2)).adapters['dense']
      >>> round(float(mean.b[0, 0]), 4)  # (1 * 1 + 3 * 3) / 4
      2.5

    References:
      Cho et al., *Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models*,
      EMNLP 2024, arXiv:2401.06432.
    """
    check_choices(hetlora, per=per)
    if per == "kernel":
        return _base.run(_alone, stacked, weights)
    sizes, shares = zip(*_base.each_kernel(_sizes, stacked, weights), strict=True)
    return _base.run(
        _given, stacked, weights, arrays={"shares": _shares(jnp.stack(sizes), shares[0])}
    )


@_linalg.numpy_promotion()
def tail_penalty(adapters: PyTree, rank: jax.Array | int, *, decay: float = 0.99) -> jax.Array:
    r"""HetLoRA's penalty on a client's last directions, for it to prune those that stay small.

    .. math::
      \sum \lVert a_{[:, t:]} \rVert_F \, \lVert b_{[t:, :]} \rVert_F, \qquad
      t = \lfloor \gamma r_k \rfloor

    summed over kernels. A client adds it to its loss, times a factor, and lowers its rank to t
    when the tail has become small.

    Args:
      adapters: Adapter tree of one client, `Factors(a [d_in, r], b [r, d_out])`.
      rank: The client's rank r_k, at most r.
      decay: gamma.

    Returns:
      A scalar.
    """
    nodes = _base.leaves(adapters)
    start = pruned_rank(rank, max(factors.rank for factors in nodes), decay)

    def tail(factors: Factors) -> jax.Array:
        keep = jnp.arange(factors.rank) >= start
        a = lowrank.vector_norm(jnp.where(keep, factors.a, 0))
        return a * lowrank.vector_norm(jnp.where(keep[:, None], factors.b, 0))

    return jnp.sum(jnp.stack([tail(factors) for factors in nodes]))


def pruned_rank(rank: jax.Array | int, largest: int, decay: float) -> jax.Array:
    """`floor(decay * rank)` of a rank up to `largest`, int32.

    Looked up, for 0.52 times 225 is below 117 in float32.
    """
    exact = Fraction(str(decay))
    return jnp.array([math.floor(exact * each) for each in range(largest + 1)], jnp.int32)[rank]


def _sizes(clients: Factors, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The norms of the products, `[K]`, those beyond its type as its largest number."""
    small, units = lowrank.of_size_one(clients, axis=(1, 2))
    sizes = lowrank.safe_sqrt(lowrank.inner(small, small))
    for unit in units:
        sizes = jnp.minimum(sizes * unit[:, 0, 0], jnp.finfo(sizes.dtype).max)
    return sizes, weights


@_linalg.numpy_promotion()
def _shares(sizes: jax.Array, weights: jax.Array) -> jax.Array:
    """Shares `[K]` in proportion to norms `[kernels, K]`."""
    sizes = jnp.where(weights > 0, sizes, 0)
    sizes = sizes / lowrank.power_of_two(sizes)
    sizes = lowrank.safe_sqrt(jnp.sum(sizes**2, axis=0))
    total = jnp.sum(sizes)
    return jnp.where(total > 0, sizes / jnp.where(total > 0, total, 1), weights)


def _alone(clients: Factors, weights: jax.Array) -> Aggregated:
    sizes, _ = _sizes(clients, weights)
    return _fedit(clients, _shares(sizes[None], weights))


def _given(clients: Factors, weights: jax.Array, *, shares: jax.Array) -> Aggregated:
    return _fedit(clients, shares)
