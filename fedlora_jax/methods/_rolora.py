"""RoLoRA: one factor at a time."""

import jax
import jax.numpy as jnp

from fedlora_jax import aggregation
from fedlora_jax.aggregation import Aggregated
from fedlora_jax.lora import Adapters
from fedlora_jax.lowrank import Factors
from fedlora_jax.methods._base import Method, Server, averaging, sides


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

    def aggregate(stacked: Adapters, weights: jax.Array, server: Server) -> Aggregated:
        """The resting factor is not sent: it is the server's own."""
        now = b_trained(server.round)
        sent = {
            path: Factors(
                a=jnp.where(now, own.a, stacked[path].a), b=jnp.where(now, stacked[path].b, own.b)
            )
            for path, own in server.trainable.adapters.items()
        }
        return aggregation.rolora(sent, weights, trained=now)

    method = averaging(
        aggregate,
        trains=lambda round_index: Factors(a=~b_trained(round_index), b=b_trained(round_index)),
        sends=side,
        receives=side,
        refuses={"server_optimizer": "the resting factor would move with its momentum"},
    )
    # Whoever was absent has not got the other factor either.
    return method._replace(
        outdated=lambda server, aggregated, round_index: sides(
            server.trainable.adapters, side(round_index + 1)
        )
    )
