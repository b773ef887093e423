"""FFA-LoRA: one factor frozen, the mean of the other."""

import jax

from fedlora_jax import lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.lowrank import Factors


def ffa_lora(stacked: PyTree, weights: Weights, *, initial: PyTree | None = None) -> Aggregated:
    r"""Averages `b` where all clients hold the same frozen `a`.

    .. math::
      M = \sum_k p_k a_0 b_k = a_0 \bar b

    so the mean is exact. The price is a subspace chosen at random and never learned: half the
    parameters, and in most studies some accuracy. It is built for differential privacy, where
    noise on both factors would be multiplied.

    Cost: one pass over `b`. Up and down a kernel: :math:`r\, d_{out}`.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.
      initial: Adapter tree with the common `a [d_in, r]` (its `b` is not used). By default `a`
        comes, to the bit, from the first client that is present.

    Returns:
      `Aggregated(adapters, None)`. Where clients differ in `a` all the same, theirs is ignored: a
      warning says so, and `aggregation.error` shows it.

    Raises:
      ValueError: On weights or factors that cannot be used, see `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.ones((2, 3, 1)), jnp.array([[[1., 2.]], [[3., 4.]]]))}
      >>> aggregation.ffa_lora(stacked, jnp.ones(2)).adapters['dense'].b
      Array([[2., 3.]], dtype=float32)

    References:
      Sun et al., *Improving LoRA in Privacy-preserving Federated Learning*, ICLR 2024,
      arXiv:2403.12313.
    """
    found = _base.run(_ffa_lora, stacked, weights, trees=[] if initial is None else [initial])
    _base.warn_of_unequal("ffa_lora", "a", stacked, weights, initial)
    return found


def _ffa_lora(clients: Factors, weights: jax.Array, *initial: Factors) -> Aggregated:
    a = common(clients, weights, *initial)
    return Aggregated(Factors(a, lowrank.mean(clients, weights).b), residual=None)


def common(clients: Factors, weights: jax.Array, *initial: Factors) -> jax.Array:
    """The frozen `a` that all clients share: the given one, or the first client's."""
    if initial:
        return lowrank.pad(initial[0], clients.rank).a
    return _base.first_present(clients, weights).a
