"""FLoRA: stack the factors instead of averaging them."""

import jax

from fedlora_jax import lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.lowrank import Factors


def flora(stacked: PyTree, weights: Weights) -> Aggregated:
    r"""Stacks the clients' factors: the exact mean of the products, at rank K r.

    .. math::
      M = [a_1 | \dots | a_K] \, [p_1 b_1; \dots; p_K b_K]

    with the weights on one factor only (on both, as some codes have it, is wrong). It goes into
    the backbone, and clients start afresh: `a` at random, `b` at zero. Exact for any ranks; but
    what goes down grows with K, and the fresh start costs progress when local training is short.

    Cost: one copy of the factors. Up a kernel: :math:`r_k (d_{in} + d_{out})`; down:
    :math:`(\sum_k r_k)(d_{in} + d_{out})`.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.

    Returns:
      `Aggregated(None, residual)` of rank K r.

    Raises:
      ValueError: On weights or factors that cannot be used, see `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.array([[[1.]], [[3.]]]), jnp.array([[[1.]], [[3.]]]))}
      >>> residual = aggregation.flora(stacked, jnp.ones(2)).residual['dense']
      >>> residual.a @ residual.b  # (1 + 9) / 2
      Array([[5.]], dtype=float32)

    References:
      Wang et al., *FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
      Adaptations*, NeurIPS 2024, arXiv:2409.05976.
    """
    return _base.run(_flora, stacked, weights)


def _flora(clients: Factors, weights: jax.Array) -> Aggregated:
    return Aggregated(adapters=None, residual=lowrank.weighted_sum(clients, weights))
