"""Random-basis LoRA, ours: a new common random `a` in every round, and the mean `b` is merged."""

import jax
import jax.numpy as jnp

from fedlora_jax import aggregation, lora, lowrank
from fedlora_jax.aggregation import Aggregated
from fedlora_jax.lora import Adapters
from fedlora_jax.lowrank import Factors
from fedlora_jax.methods._base import (
    Context,
    Method,
    PyTree,
    Server,
    Start,
    averaging,
    each_of,
    sides,
    stacked_layers,
    unstacked_layers,
)
from fedlora_jax.methods._ffa_lora import B_ONLY


def random_basis_lora() -> Method:
    r"""All clients of a round train `b` against one random orthonormal `a`, which nobody sends.

    In round t, for a kernel `[d_in, d_out]` and adapters of rank r,

    .. math::
      a_t \sim \text{orthonormal } [d_{in}, R], \qquad
      R = \min(\lfloor r (d_{in} + d_{out}) / d_{out} \rfloor, d_{in}, d_{out})

    and b begins at zero. The mean of the products is :math:`a_t \bar b_t`, **exactly**, and it is
    merged into the backbone, so that the model is of no rank, and nothing is ever dropped. `a_t`
    follows from the seed and the round, so that `b` alone crosses, up and down, and its R makes it
    as many numbers as both factors of rank r are: FedIT's bytes buy twice the directions. With
    unequal ranks a client trains and sends its share of the rows of b, and gets all of the mean.
    What lies outside of a round's directions has its turn in later ones; in expectation over `a_t`
    the first step follows the whole gradient, by a share :math:`R / d_{in}` of it.

    A method that trains `b` alone is linear in what clients send. A mean that is computed securely
    is all that the server needs, and noise of differential privacy is not multiplied.

    References:
      None for the whole. A frozen random `a`: Sun et al. (FFA-LoRA), arXiv:2403.12313. New random
      projections while training, on one machine: Hao et al. (Flora), arXiv:2402.03293.
    """
    method = averaging(
        _aggregate,
        sends=lambda round_index: "b",
        refuses={
            "scaffold": "its adapters are reset in every round, in another basis",
            "server_optimizer": "its server merges the mean and returns no average",
        },
    )
    return method._replace(init=_init, start=_start, received=_received, missed=_missed)


def _init(key: jax.Array, server: Server) -> tuple[Server, tuple[()]]:
    """The memory is the key, as bare numbers, which every checkpoint can hold, and the rank r."""
    given = server.trainable.adapters
    rank = max(factors.rank for factors in given.values())
    wide = {path: _widened(factors) for path, factors in given.items()}
    adapters = _in_new_basis(key, jnp.int32(0), wide)
    trainable = server.trainable._replace(adapters=adapters)
    return server._replace(
        trainable=trainable, memory=(jax.random.key_data(key), jnp.int32(rank))
    ), ()


def _widened(factors: Factors) -> Factors:
    (d_in, rank), d_out = factors.a.shape, factors.b.shape[1]
    wide = min(rank * (d_in + d_out) // d_out, d_in, d_out)
    return Factors(
        jnp.zeros((d_in, wide), factors.a.dtype), jnp.zeros((wide, d_out), factors.b.dtype)
    )


def _start(server: Server, client: PyTree, context: Context) -> Start:
    """A client of a smaller rank has so much less of the basis."""
    adapters, (_, rank) = server.trainable.adapters, server.memory
    widest = max(factors.rank for factors in adapters.values())

    def share(columns: int) -> jax.Array:
        return columns * context.rank // rank

    own = {path: lowrank.cut(factors, share(factors.rank)) for path, factors in adapters.items()}
    return Start(server.trainable._replace(adapters=own), B_ONLY, rank=share(widest))


def _aggregate(stacked: Adapters, weights: jax.Array, server: Server) -> Aggregated:
    exact = aggregation.ffa_lora(stacked, weights, initial=server.trainable.adapters)
    key = jax.random.wrap_key_data(server.memory[0])
    following = _in_new_basis(key, server.round + 1, server.trainable.adapters)
    return Aggregated(adapters=following, residual=exact.adapters)


def _in_new_basis(key: jax.Array, round_index: jax.Array, like: Adapters) -> Adapters:
    """`(a, 0)` with the basis of a round, which the server and all clients draw alike."""
    noise = lora.fresh(jax.random.fold_in(key, round_index), like)

    def drawn(factors: Factors) -> Factors:
        return Factors(lowrank.orthonormal(factors.a), factors.b)

    return unstacked_layers(
        {paths: each_of(drawn, layers) for paths, (layers,) in stacked_layers(noise).items()}
    )


def _received(server: Server, aggregated: Aggregated | None, round_index: int) -> PyTree:
    return _merged(aggregated), server.trainable.head


def _missed(server: Server, aggregated: Aggregated | None, round_index: int, absent: int) -> PyTree:
    return [_merged(aggregated)] * absent


def _merged(aggregated: Aggregated | None) -> PyTree:
    """The mean b of a round, all that its change of the backbone is known by."""
    if aggregated is None or aggregated.residual is None:
        return None
    return sides(aggregated.residual, "b")
