"""FlexLoRA: the best approximation of the mean product at the rank of an adapter."""

import jax

from fedlora_jax import lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.lowrank import Factors, Split
from fedlora_jax.names import check_choices


def flexlora(
    stacked: PyTree, weights: Weights, *, rank: int | None = None, split: Split = "right"
) -> Aggregated:
    r"""The truncated SVD of the mean of the products.

    .. math::
      M = U S V^T, \qquad \text{adapters} = (U_r,\; S_r V_r^T)

    When: clients of unequal rank, or whenever the server's time does not matter: of all adapters of
    rank r this one is nearest to the ideal. Directions come in descending
    order, so a client of rank :math:`r_k` takes the first :math:`r_k` (`aggregation.cut`), the
    best for it. What a client gets is a new basis each round: optimiser moments carried over
    from the round before do not fit it, and `a` is of another size than LoRA's usual start.

    Cost: see `lowrank.svd`: :math:`O(K^2 r^2 (d_{in} + d_{out}) + K^3 r^3)`, exact, as long as
    K r is at most :math:`\min(d_{in}, d_{out}, 1024)`; sketched beyond, in time linear in K. Up and
    down a kernel: :math:`r_k (d_{in} + d_{out})`.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.
      rank: Rank of the result; by default that of `stacked`.
      split: Where the singular values go: `'right'` on `b` (the authors'), `'balanced'` their
        roots on both, `'left'` on `a`.

    Returns:
      `Aggregated(adapters, None)`.

    Raises:
      ValueError: On an impossible rank or an unknown split, or weights or factors that cannot be
        used, see `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.array([[[1.]], [[3.]]]), jnp.array([[[1.]], [[3.]]]))}
      >>> best = aggregation.flexlora(stacked, jnp.ones(2)).adapters['dense']
      >>> round(float((best.a @ best.b)[0, 0]), 4)  # the mean product, (1 + 9) / 2
      5.0

    References:
      Bai et al., *Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
      Client Resources*, NeurIPS 2024, arXiv:2402.11505.
    """
    check_choices(flexlora, split=split)
    _base.check_rank("flexlora", rank, stacked)
    return _base.run(_flexlora, stacked, weights, rank=rank, split=split)


def _flexlora(
    clients: Factors, weights: jax.Array, *, rank: int | None, split: Split
) -> Aggregated:
    ideal = lowrank.weighted_sum(clients, weights)
    best = lowrank.truncate(ideal, clients.rank if rank is None else rank, split=split)
    return Aggregated(adapters=best, residual=None)
