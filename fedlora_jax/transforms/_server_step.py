"""The server's step in the space of products: along the change of the whole model."""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fedlora_jax import bounds, lora, lowrank
from fedlora_jax.aggregation import Aggregated
from fedlora_jax.lora import Adapters
from fedlora_jax.lowrank import Factors
from fedlora_jax.methods import Method, Server, check_combination
from fedlora_jax.methods._base import PyTree, each_of, stacked_layers, unstacked_layers
from fedlora_jax.transforms import _base


class _Velocity(NamedTuple):
    """Of layers of equal shapes, stacked.

    No `Factors`: whoever gets it gets all of it, whatever the rank of its adapters.
    """

    a: jax.Array
    b: jax.Array


# In the order of `layer_kinds`; () without momentum.
_Velocities: TypeAlias = tuple[_Velocity, ...]


class _Step(NamedTuple):
    """What the server remembers: its step, as numbers that a program does not depend on."""

    rate: jax.Array
    momentum: jax.Array
    velocity: _Velocities
    head: PyTree


def server_step(
    method: Method, *, rate: float, momentum: float = 0.0, rank: int | None = None
) -> Method:
    r"""Takes the change of the whole model over a round as a direction, whatever the method.

    With :math:`s D_t` what the method makes of the adapted kernels in round t, new adapters less
    the old ones plus what it merges,

    .. math::
      D_t = a_{t+1} b_{t+1} - a_t b_t + \text{residual}_t, \qquad
      V_t = \mu V_{t-1} + D_t, \qquad W_{t+1} = W_t + s \eta V_t

    is the model, by the frozen part of which it differs from the method's: the adapters are those
    of the method, and :math:`\eta V_t - D_t` is merged into the backbone. The head, which has no
    products, steps along its own mean change in the same way. A rate of 1 without momentum is the
    method itself. Nothing of the size of a kernel is kept or computed but the kernel itself.

    V is kept at a rank q. What the cut drops would go on to move the model by
    :math:`\eta \mu / (1 - \mu)` times itself over all rounds to come; it does so at once. So
    nothing is forgotten, and after any number of rounds, for any q,

    .. math::
      W_{t+1} = W_0 + \frac{s \eta}{1 - \mu} \left( \sum_{i \le t} D_i - \mu V_t \right)

    It follows what there is to send. Of the D a client learns what it gets of the method anyhow,
    the adapters and the residuals in full, and with the V that it has it finds the next as the
    server does. So no byte more goes to those who were there in the round before. With momentum
    whoever was absent, and does not know each D by itself, is sent V besides, of rank q. With
    unequal ranks each client gets the adapters whole, and trains of them what it can.

    There is no adaptive step here: the mean square of each entry of D is of the size of a kernel.
    The aggregation error of a round remains that of the method.

    Args:
      method: Any method whose server has a model for all.
      rate: :math:`\eta`, positive.
      momentum: :math:`\mu`, at least 0 and less than 1.
      rank: q; by default that of the adapters. No influence without momentum.

    Raises:
      ValueError: If the method has no model for all, or steps already, or a number is out of range.

    References:
      Reddi et al., *Adaptive Federated Optimization*, ICLR 2021, arXiv:2003.00295; Hsu et al.,
      arXiv:1909.06335 (FedAvgM), both of parameters. In the space of products it is ours.
    """
    check_combination(method, "server_step", "a server's step in the space of products")
    bounds.check("server_step", rate=rate, momentum=momentum, rank=rank)
    moves_on = momentum > 0

    def head_optimizer(step: _Step) -> optax.GradientTransformation:
        return optax.sgd(step.rate, step.momentum if moves_on else None)

    def init(key: jax.Array, server: Server) -> tuple[Server, PyTree]:
        server, client = method.init(key, server)
        step = _Step(jnp.float32(rate), jnp.float32(momentum), (), ())
        head = head_optimizer(step).init(server.trainable.head)
        velocity = _at_rest(server.trainable.adapters, rank) if moves_on else ()
        return _base.outer(server, step._replace(velocity=velocity, head=head)), client

    def aggregate(
        server: Server, uploads: PyTree, weights: jax.Array
    ) -> tuple[Server, Aggregated | None]:
        known, step = _base.inner(server), server.memory.own
        changed, aggregated = method.aggregate(known, uploads, weights)
        change = _change(known, changed, aggregated)
        if moves_on:
            extra, velocity = _with_momentum(step, change)
        else:
            extra, velocity = _each_scaled(change, step.rate - 1), ()
        against = jax.tree.map(jnp.subtract, known.trainable.head, changed.trainable.head)
        updates, state = head_optimizer(step).update(against, step.head)
        head = optax.apply_updates(known.trainable.head, updates)
        stepped = changed._replace(
            backbone=lora.merge(lora.widen(changed.backbone, extra), extra, scale=server.scale),
            trainable=changed.trainable._replace(head=head),
        )
        return _base.outer(stepped, step._replace(velocity=velocity, head=state)), aggregated

    def outdated(server: Server, aggregated: Aggregated | None, round_index: int) -> PyTree:
        inner = method.outdated(_base.inner(server), aggregated, round_index)
        # SCAFFOLD asks without an aggregate what comes of its control variates.
        return inner if aggregated is None else (inner, server.memory.own.velocity)

    return _base.around(
        method,
        init=init,
        aggregate=aggregate,
        outdated=outdated,
        whole_adapters=True,
        refuses={
            **method.refuses,
            "server_optimizer": "its server steps already, in the space of products",
            "server_step": "its server steps already",
        },
    )


def _at_rest(adapters: Adapters, rank: int | None) -> _Velocities:
    def zero(like: Factors) -> _Velocity:
        columns = min(rank or like.rank, like.a.shape[1], like.b.shape[2])
        count, d_in, d_out = len(like.a), like.a.shape[1], like.b.shape[2]
        return _Velocity(jnp.zeros((count, d_in, columns)), jnp.zeros((count, columns, d_out)))

    return tuple(zero(like) for (like,) in stacked_layers(adapters).values())


def _change(before: Server, after: Server, aggregated: Aggregated | None) -> Adapters:
    """The change of the whole model over a round, D, of the rank of all its terms."""
    if aggregated is None:
        raise ValueError("server_step: the method returns no aggregate, by which the server steps")
    residual = aggregated.residual or {}

    def of(path: str, old: Factors) -> Factors:
        terms = [after.trainable.adapters[path], lowrank.scaled(old, -1.0)]
        return lowrank.concatenate([*terms, *([residual[path]] if path in residual else [])])

    return {path: of(path, old) for path, old in before.trainable.adapters.items()}


def _each_scaled(adapters: Adapters, weight: jax.Array) -> Adapters:
    return {path: lowrank.scaled(factors, weight) for path, factors in adapters.items()}


def _with_momentum(step: _Step, change: Adapters) -> tuple[Adapters, _Velocities]:
    r"""What is merged, :math:`\eta V_t - D_t` with what a cut of V drops, and V_t."""
    to_come = step.rate / (1 - step.momentum)

    def moved(change: Factors, velocity: _Velocity) -> tuple[Factors, _Velocity]:
        last = Factors(*velocity)
        terms = [lowrank.scaled(last, step.momentum), change]
        new = lowrank.truncated_sum(terms, last.rank)
        difference = lowrank.scaled(lowrank.subtract(last, new), to_come * step.momentum)
        extra = lowrank.concatenate([lowrank.scaled(change, to_come - 1), difference])
        return extra, _Velocity(*new)

    kinds = stacked_layers(change)
    found = [
        each_of(moved, layers, velocity)
        for (layers,), velocity in zip(kinds.values(), step.velocity, strict=True)
    ]
    extras = dict(zip(kinds, (extra for extra, _ in found), strict=True))
    return unstacked_layers(extras), tuple(velocity for _, velocity in found)
