"""FedSA-LoRA: share `a`, keep `b`."""

import jax

from fedlora_jax import lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.lowrank import Factors


def fedsa_lora(stacked: PyTree, weights: Weights) -> Aggregated:
    r"""Averages `a`; each client keeps its own `b`.

    .. math::
      \text{client } k \text{ continues from } (\bar a,\; b_k)

    The paper finds that `a` learns what clients have in common and `b` what is their own. So this
    is personalisation: evaluate each client with its own `b` (and head). There is no one global
    model; a client that has never taken part has no `b`.

    Cost: one pass over `a`. Up and down a kernel: :math:`r\, d_{in}`.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.

    Returns:
      `Aggregated(adapters, None)` with `a [d_in, r]` for all and `b [K, r, d_out]`, each client's
      own as it came (also of weight 0; zero if it is not finite). `aggregation.error` takes the
      mean of :math:`\bar a b_k` over clients, which is FedIT's product.

    Raises:
      ValueError: On weights or factors that cannot be used, see `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.ones((2, 3, 1)), jnp.ones((2, 1, 4)))}
      >>> shared = aggregation.fedsa_lora(stacked, jnp.ones(2)).adapters['dense']
      >>> shared.a.shape, shared.b.shape
      ((3, 1), (2, 1, 4))

    References:
      Guo et al., *Selective Aggregation for Low-Rank Adaptation in Federated Learning*, ICLR 2025,
      arXiv:2410.01463.
    """
    return _base.run(_fedsa_lora, stacked, weights, absent_kept=True)


def _fedsa_lora(clients: Factors, weights: jax.Array) -> Aggregated:
    return Aggregated(Factors(lowrank.mean(clients, weights).a, clients.b), residual=None)
