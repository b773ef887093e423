"""FedIT: the mean of each factor."""

import jax

from fedlora_jax import lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.lowrank import Factors


def fedit(stacked: PyTree, weights: Weights) -> Aggregated:
    r"""Averages the two factors separately (FedAvg on LoRA parameters).

    .. math::
      \bar a = \sum_k p_k a_k, \qquad \bar b = \sum_k p_k b_k

    The product :math:`\bar a \bar b` is not the mean of the products: it misses
    :math:`\sum_k p_k (a_k - \bar a)(b_k - \bar b)`, which the other methods are about.

    When: the baseline, and enough where clients agree: small local steps from a common start. The
    bias grows with the spread of the clients (`aggregation.diagnostics`: `drift_a`, `drift_b`).

    Cost: one pass over the factors. Up and down a kernel: :math:`r (d_{in} + d_{out})`.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.

    Returns:
      `Aggregated(adapters, None)`.

    Raises:
      ValueError: On weights or factors that cannot be used, see `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.ones((2, 3, 1)), jnp.arange(8.).reshape(2, 1, 4))}
      >>> aggregation.fedit(stacked, jnp.array([1., 3.])).adapters['dense'].b
      Array([[3., 4., 5., 6.]], dtype=float32)

    References:
      Zhang et al., *Towards Building the Federated GPT: Federated Instruction Tuning*,
      arXiv:2305.05644.
    """
    return _base.run(_fedit, stacked, weights)


def _fedit(clients: Factors, weights: jax.Array) -> Aggregated:
    return Aggregated(adapters=lowrank.mean(clients, weights), residual=None)
