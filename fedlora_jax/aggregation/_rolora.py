"""RoLoRA: the factors take turns, one trained and averaged while the other rests."""

import jax
import jax.numpy as jnp

from fedlora_jax import lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.lowrank import Factors
from fedlora_jax.names import lookup


def rolora(
    stacked: PyTree, weights: Weights, *, trained: str | jax.Array | bool = "b"
) -> Aggregated:
    r"""Averages the factor that was trained in this round; the other is the same with everybody.

    .. math::
      M = a_0 \Big(\sum_k p_k b_k\Big) \;\text{ or }\; \Big(\sum_k p_k a_k\Big) b_0

    so the mean is exact in every round, and both factors are learned in the long run. Authors
    train `b` in rounds 0, 2, .. and `a` in rounds 1, 3, ..

    Cost: one pass over one factor. Up and down a kernel: :math:`r\, d_{out}` or :math:`r\, d_{in}`.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.
      trained: `'b'` or `'a'`; or, where the round is a traced value, a boolean: whether `b` is.

    Returns:
      `Aggregated(adapters, None)`; the resting factor is, to the bit, that of the first client
      that is present.

    Raises:
      ValueError: On an unknown factor, or weights or factors that cannot be used, see
        `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.array([[[1.]], [[3.]]]), jnp.ones((2, 1, 2)))}
      >>> aggregation.rolora(stacked, jnp.ones(2), trained='a').adapters['dense'].a
      Array([[2.]], dtype=float32)

    References:
      Chen et al., *Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA*,
      arXiv:2502.01755.
    """
    b_trained = is_b(trained, "trained factor")
    found = _base.run(_rolora, stacked, weights, arrays={"b_trained": b_trained})
    if not isinstance(b_trained, jax.core.Tracer):
        _base.warn_of_unequal("rolora", "a" if b_trained else "b", stacked, weights)
    return found


def is_b(side: str | jax.Array | bool, kind: str) -> jax.Array:
    """Whether a factor, named or as a boolean, is `b`.

    Raises:
      ValueError: If the name is not a factor's.
    """
    if isinstance(side, str):
        return jnp.asarray(lookup({"a": False, "b": True}, side, kind))
    return jnp.asarray(side, bool)


def _rolora(clients: Factors, weights: jax.Array, *, b_trained: jax.Array) -> Aggregated:
    average = lowrank.mean(clients, weights)
    resting = _base.first_present(clients, weights)
    pair = Factors(
        jnp.where(b_trained, resting.a, average.a), jnp.where(b_trained, average.b, resting.b)
    )
    return Aggregated(adapters=pair, residual=None)
