"""FRLoRA: always the same principal start; what was learned goes into the backbone."""

import jax
import jax.numpy as jnp

from fedlora_jax import aggregation, lora
from fedlora_jax.lora import Adapters
from fedlora_jax.lowrank import Factors
from fedlora_jax.methods._base import Method, Server, averaging


def frlora() -> Method:
    """Clients start from the principal factors of the pretrained kernels (PiSSA) in every round.

    The backbone begins at `W - s a_0 b_0` and takes `s (mean a mean b - a_0 b_0)` after each round.

    References:
      Yan et al., *Federated Residual Low-Rank Adaptation of Large Language Models*, ICLR 2025.
      Meng et al., *PiSSA*, NeurIPS 2024, arXiv:2404.02948.
    """

    def init(key: jax.Array, server: Server) -> tuple[Server, tuple[()]]:
        principal = _principal(server)
        negative = {path: Factors(-f.a, f.b) for path, f in principal.items()}
        backbone = lora.widen(server.backbone, principal)
        backbone = lora.merge(backbone, negative, scale=server.scale)
        trainable = server.trainable._replace(adapters=principal)
        return server._replace(backbone=backbone, trainable=trainable, memory=principal), ()

    method = averaging(
        lambda stacked, weights, server: aggregation.frlora(
            stacked, weights, initial=server.memory
        ),
        refuses={
            "unequal_ranks": "its start is the principal part of the model, and a client of a "
            "smaller rank would begin without some of it",
            "scaffold": "its adapters are reset in every round",
            "server_optimizer": "its server merges the means and returns no average",
        },
    )
    # The means are sent; the residual follows from them.
    return method._replace(
        init=init,
        received=lambda server, aggregated, round_index: server.trainable,
        missed=lambda server, aggregated, round_index, absent: [server.trainable.adapters] * absent,
    )


def _principal(server: Server) -> Adapters:
    """`a_0 = U_r (S_r / s)^(1/2)`, `b_0 = (S_r / s)^(1/2) V_r^T` of each adapted kernel."""
    kernels = lora.kernels(server.backbone)

    def factors(path: str, rank: int) -> Factors:
        u, s, v = jnp.linalg.svd(kernels[path].astype(jnp.float32), full_matrices=False)
        root = jnp.sqrt(s[:rank] / server.scale)
        return Factors(u[:, :rank] * root, root[:, None] * v[:rank])

    adapters = server.trainable.adapters
    return {path: factors(path, like.rank) for path, like in adapters.items()}
