"""FRLoRA: every round restarts from the principal factors, the change goes into the backbone."""

import jax

from fedlora_jax import lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.lowrank import Factors


def frlora(stacked: PyTree, weights: Weights, *, initial: PyTree) -> Aggregated:
    r"""Averages the factors, merges their change into the backbone, and starts from the same again.

    .. math::
      \text{adapters} = (a_0, b_0), \qquad \text{residual} = \bar a \bar b - a_0 b_0

    The start :math:`a_0 = U_r (S_r / s)^{1/2}`, :math:`b_0 = (S_r / s)^{1/2} V_r^T` are the
    principal factors of the pretrained kernel (PiSSA; `lowrank.truncate(..., split='balanced')`
    makes them of a product), and the backbone begins at :math:`W - s a_0 b_0`. The sum of the
    residuals may reach any rank. The product of the means is biased as FedIT's is.

    Cost: one pass over the factors. Up and down a kernel: :math:`r (d_{in} + d_{out})`.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.
      initial: Adapter tree of `Factors(a_0 [d_in, r], b_0 [r, d_out])`, from which clients started.

    Returns:
      `Aggregated(adapters, residual)`, the residual of rank 2 r.

    Raises:
      ValueError: On an initial tree of other kernels, or weights or factors that cannot be used,
        see `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.array([[[1.]], [[3.]]]), jnp.array([[[1.]], [[3.]]]))}
      >>> initial = {'dense': Factors(jnp.ones((1, 1)), jnp.ones((1, 1)))}
      >>> residual = aggregation.frlora(stacked, jnp.ones(2), initial=initial).residual['dense']
      >>> residual.a @ residual.b  # 2 * 2 - 1 * 1
      Array([[3.]], dtype=float32)

    References:
      Yan et al., *Federated Residual Low-Rank Adaptation of Large Language Models*, ICLR 2025.
      Meng et al., *PiSSA*, NeurIPS 2024, arXiv:2404.02948.
    """
    return _base.run(_frlora, stacked, weights, trees=[initial])


def _frlora(clients: Factors, weights: jax.Array, initial: Factors) -> Aggregated:
    residual = lowrank.subtract(lowrank.mean(clients, weights), initial)
    return Aggregated(adapters=initial, residual=residual)
