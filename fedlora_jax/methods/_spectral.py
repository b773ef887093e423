"""Spectral aggregation: as many directions of the mean product as its spectrum is worth."""

from fedlora_jax import aggregation
from fedlora_jax.aggregation._spectral import Selection
from fedlora_jax.methods._base import Method, averaging


def spectral(*, selection: Selection = "energy", threshold: float = 0.99) -> Method:
    """Clients start from a truncated SVD whose rank an energy or a noise threshold decides.

    Args:
      selection: As in `aggregation.spectral`.
      threshold: As in `aggregation.spectral`.

    References:
      *FLoRIST*, arXiv:2506.09199.
    """
    return averaging(
        lambda stacked, weights, server: aggregation.spectral(
            stacked, weights, selection=selection, threshold=threshold
        )
    )
