"""Spectral aggregation: as many directions of the mean product as its spectrum is worth."""

import jax
import numpy as np

from fedlora_jax import aggregation, bounds
from fedlora_jax.aggregation import Aggregated
from fedlora_jax.aggregation._spectral import Selection
from fedlora_jax.lowrank import Factors
from fedlora_jax.methods._base import (
    OTHER_BASIS,
    READS_EACH_CLIENT,
    Method,
    PyTree,
    Server,
    averaging,
)
from fedlora_jax.names import check_choices


def spectral(*, selection: Selection = "energy", threshold: float = 0.99) -> Method:
    """Clients start from a truncated SVD whose rank an energy or a noise threshold decides.

    Args:
      selection: As in `aggregation.spectral`.
      threshold: As in `aggregation.spectral`.

    References:
      *FLoRIST*, arXiv:2506.09199.
    """
    check_choices(aggregation.spectral, selection=selection)
    bounds.check("spectral", threshold=threshold)
    method = averaging(
        lambda stacked, weights, server: aggregation.spectral(
            stacked, weights, selection=selection, threshold=threshold
        ),
        refuses={
            "scaffold": OTHER_BASIS,
            "server_optimizer": OTHER_BASIS,
            "privacy": READS_EACH_CLIENT,
            "robust_entries": READS_EACH_CLIENT,
        },
    )

    def received(server: Server, aggregated: Aggregated | None, round_index: int) -> PyTree:
        """The columns that were kept; the Gaussian ones beyond come from a common key."""
        adapters = {path: _kept(factors) for path, factors in server.trainable.adapters.items()}
        return adapters, server.trainable.head

    return method._replace(received=received)


def _kept(factors: Factors) -> Factors:
    if not isinstance(factors.b, jax.Array) or isinstance(factors.b, jax.core.Tracer):
        return factors
    kept = int(np.count_nonzero(np.any(np.asarray(factors.b) != 0, axis=1)))
    return Factors(factors.a[:, :kept], factors.b[:kept])
