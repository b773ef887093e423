"""FedRot-LoRA: clients' factors rotated to the last global ones before they are averaged."""

from fedlora_jax import aggregation, bounds
from fedlora_jax.methods._base import READS_EACH_CLIENT, Method, averaging


def fedrot_lora(*, strength: float = 1.0, reflections: bool = False) -> Method:
    """The server aligns `a` in odd rounds and `b` in even ones, then averages.

    Args:
      strength: From 0 (FedIT) to 1, as in `aggregation.fedrot_lora`.
      reflections: As there: what the authors' code does at the lambda of 1.5 that it ships.

    References:
      *FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA*, 2026.
    """
    bounds.check("fedrot_lora", strength=strength)
    return averaging(
        lambda stacked, weights, server: aggregation.fedrot_lora(
            stacked,
            weights,
            reference=server.trainable.adapters,
            aligned=server.round % 2 == 0,
            strength=strength,
            reflections=reflections,
        ),
        refuses={"privacy": READS_EACH_CLIENT, "robust_entries": READS_EACH_CLIENT},
        free_basis=True,
    )
