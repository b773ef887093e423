"""RoLoRA: one factor at a time."""

import jax

from fedlora_jax import aggregation
from fedlora_jax.lowrank import Factors
from fedlora_jax.methods._base import Method, averaging


def rolora() -> Method:
    """Clients train `b` in rounds 0, 2, .. and `a` in rounds 1, 3, ..; each mean is exact.

    References:
      Chen et al., *Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA*,
      arXiv:2502.01755.
    """

    def b_trained(round_index: jax.Array) -> jax.Array:
        return round_index % 2 == 0

    def side(round_index: int) -> str:
        return "ba"[round_index % 2]

    return averaging(
        lambda stacked, weights, server: aggregation.rolora(
            stacked, weights, trained=b_trained(server.round)
        ),
        trains=lambda round_index: Factors(a=~b_trained(round_index), b=b_trained(round_index)),
        sends=side,
        receives=side,
    )
