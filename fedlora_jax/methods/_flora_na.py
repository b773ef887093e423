"""FLoRA-NA: coefficients over clients, fitted at the server."""

from typing import Any

from fedlora_jax import aggregation, bounds
from fedlora_jax.methods._base import READS_EACH_CLIENT, Method, averaging
from fedlora_jax.names import check_choices


def flora_na(**hyperparameters: Any) -> Method:
    """Clients start from the fitted combinations of their factors, at FedIT's communication.

    Args:
      **hyperparameters: Of `aggregation.flora_na`.

    References:
      *FLoRA-NA*, arXiv:2509.26399.
    """
    check_choices(aggregation.flora_na, **hyperparameters)
    bounds.check("flora_na", **hyperparameters)
    return averaging(
        lambda stacked, weights, server: aggregation.flora_na(stacked, weights, **hyperparameters),
        refuses={"privacy": READS_EACH_CLIENT, "robust_entries": READS_EACH_CLIENT},
        free_basis=True,
    )
