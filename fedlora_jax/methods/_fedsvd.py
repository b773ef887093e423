"""FedSVD: as FFA-LoRA within a round, with `a` refactored from the aggregate after it."""

from fedlora_jax import aggregation
from fedlora_jax.methods._base import OTHER_BASIS, Method, averaging
from fedlora_jax.methods._ffa_lora import B_ONLY


def fedsvd() -> Method:
    """Clients train `b`; the server refactors `a` times the mean `b` into `(U, S V^T)`.

    References:
      Lee et al., *FedSVD*, arXiv:2505.12805.
    """
    return averaging(
        lambda stacked, weights, server: aggregation.fedsvd(
            stacked, weights, initial=server.trainable.adapters
        ),
        trains=lambda round_index: B_ONLY,
        sends=lambda round_index: "b",
        refuses={"scaffold": OTHER_BASIS, "server_optimizer": OTHER_BASIS},
    )
