"""FedIT: FedAvg on both factors."""

from fedlora_jax import aggregation
from fedlora_jax.methods._base import Method, averaging


def fedit() -> Method:
    """Clients train both factors from their means (`aggregation.fedit`).

    References:
      Zhang et al., *Towards Building the Federated GPT*, arXiv:2305.05644.
    """
    return averaging(
        lambda stacked, weights, server: aggregation.fedit(stacked, weights), free_basis=True
    )
