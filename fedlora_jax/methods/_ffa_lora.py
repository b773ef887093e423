"""FFA-LoRA: one random `a` for ever, and the mean of `b`."""

from fedlora_jax import aggregation
from fedlora_jax.lowrank import Factors
from fedlora_jax.methods._base import Method, averaging

B_ONLY = Factors(a=False, b=True)  # type: ignore[arg-type]


def ffa_lora() -> Method:
    """Clients train `b` over the common first `a`; the mean of `b` is then exact.

    References:
      Sun et al., *Improving LoRA in Privacy-preserving Federated Learning*, ICLR 2024,
      arXiv:2403.12313.
    """
    return averaging(
        lambda stacked, weights, server: aggregation.ffa_lora(
            stacked, weights, initial=server.trainable.adapters
        ),
        trains=lambda round_index: B_ONLY,
        sends=lambda round_index: "b",
        receives=lambda round_index: "b",
    )
