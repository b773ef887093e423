"""FedSVD: average `b` under a common `a`, then refactor the product."""

import jax

from fedlora_jax import lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.aggregation._ffa_lora import common
from fedlora_jax.lowrank import Factors


def fedsvd(stacked: PyTree, weights: Weights, *, initial: PyTree | None = None) -> Aggregated:
    r"""Averages `b`, then refactors the product so that `a` follows what was learned.

    .. math::
      a_0 \bar b = U S V^T, \qquad \text{adapters} = (U_r,\; S_r V_r^T)

    Within a round `a` is frozen and the same with everybody, so the mean is exact, as FFA-LoRA's;
    but after it `a` is the orthonormal basis of the aggregate instead of a random one for ever.
    Noise of differential privacy on `b` is not multiplied. While the product is zero `a` is an
    arbitrary orthonormal basis.

    Cost: one pass over `b` and an SVD of rank r, :math:`O(r^2 (d_{in} + d_{out}))`. Up a kernel:
    :math:`r\, d_{out}`; down: :math:`r (d_{in} + d_{out})`.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.
      initial: Adapter tree with the common `a [d_in, r]` of this round (its `b` is not used). By
        default `a` comes from the first client that is present.

    Returns:
      `Aggregated(adapters, None)`.

    Raises:
      ValueError: On weights or factors that cannot be used, see `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.full((2, 4, 1), 3.), jnp.ones((2, 1, 4)))}
      >>> new = aggregation.fedsvd(stacked, jnp.ones(2)).adapters['dense']
      >>> print(jnp.round(jnp.linalg.norm(new.a), 4), jnp.round((new.a @ new.b)[0], 4))
      1.0 [3. 3. 3. 3.]

    References:
      Lee et al., *FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA*,
      arXiv:2505.12805.
    """
    found = _base.run(_fedsvd, stacked, weights, trees=[] if initial is None else [initial])
    _base.warn_of_unequal("fedsvd", "a", stacked, weights, initial)
    return found


def _fedsvd(clients: Factors, weights: jax.Array, *initial: Factors) -> Aggregated:
    a = common(clients, weights, *initial)
    exact = Factors(a, lowrank.mean(clients, weights).b)
    return Aggregated(adapters=lowrank.truncate(exact, clients.rank), residual=None)
