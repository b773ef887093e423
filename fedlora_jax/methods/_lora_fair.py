"""LoRA-FAIR: the mean of one factor and a corrected other."""

from typing import Any

from fedlora_jax import aggregation
from fedlora_jax.aggregation._lora_fair import check_options
from fedlora_jax.methods._base import READS_EACH_CLIENT, Method, averaging


def lora_fair(**hyperparameters: Any) -> Method:
    """Clients start from `(mean a, corrected b)`, near the average and near the ideal product.

    The paper calls this start "Avg-Initial". The backbone is untouched.

    Args:
      **hyperparameters: Of `aggregation.lora_fair`.

    References:
      Bian et al., *LoRA-FAIR*, ICCV 2025, arXiv:2411.14961.
    """
    check_options(**hyperparameters)
    return averaging(
        lambda stacked, weights, server: aggregation.lora_fair(stacked, weights, **hyperparameters),
        refuses={"privacy": READS_EACH_CLIENT, "robust_entries": READS_EACH_CLIENT},
        free_basis=True,
    )
