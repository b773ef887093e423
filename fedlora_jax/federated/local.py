"""Local training: what one client does in one round, a pure function to be vmapped over clients."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fedlora_jax.federated.task import Batch, Task, outputs
from fedlora_jax.lora import Adapters, Params
from fedlora_jax.lowrank import Factors
from fedlora_jax.methods import Start, Trainable

BatchOf: TypeAlias = Callable[[jax.Array], tuple[Batch, jax.Array]]


class LocalTraining(NamedTuple):
    """How clients train.

    Attributes:
      optimizer: Any optax optimiser; each client starts it afresh in each round.
      steps: Optimisation steps a round.
      batch_size: Examples a step. A client's last batch in an epoch may hold fewer.
      schedule: From the round to a factor on the learning rate of that round.
    """

    optimizer: optax.GradientTransformation
    steps: int
    batch_size: int
    schedule: Callable[[jax.Array], jax.Array]


def train(
    task: Task,
    training: LocalTraining,
    backbone: Params,
    scale: jax.Array,
    start: Start,
    batch_of: BatchOf,
    round_index: jax.Array,
) -> tuple[Trainable, jax.Array]:
    """Trains from a start.

    Args:
      task: What is learned.
      training: How.
      backbone: Frozen parameters.
      scale: The factor s.
      start: Initial values, which sides of the factors move, and the frozen offset.
      batch_of: From the step to a batch and its mask `[B]`. An example with mask 0 has no
        influence, a batch with none but such moves nothing.
      round_index: For the schedule.

    Returns:
      The trained values, and the mean loss of each step `[steps]` before its update.
    """
    trained_mask = _mask(start)
    factor = training.schedule(round_index)
    loss = functools.partial(_loss, task, backbone, scale, start.offset)

    def step(
        carry: tuple[Trainable, optax.OptState], index: jax.Array
    ) -> tuple[tuple[Trainable, optax.OptState], jax.Array]:
        trainable, state = carry
        batch, mask = batch_of(index)
        value, gradient = jax.value_and_grad(loss)(trainable, batch, mask)
        # Masked before the optimiser for the sake of clipping by norm, and after it for the sake of
        # weight decay.
        gradient = _masked(gradient, trained_mask)
        updates, new_state = training.optimizer.update(gradient, state, trainable)
        updates = jax.tree.map(lambda u: factor * u, _masked(updates, trained_mask))
        moved = (optax.apply_updates(trainable, updates), new_state)
        active = jnp.any(mask > 0)
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), moved, carry), value

    first = (start.trainable, training.optimizer.init(start.trainable))
    (trained, _), losses = jax.lax.scan(step, first, jnp.arange(training.steps))
    return trained, losses


def gradient(
    task: Task,
    backbone: Params,
    scale: jax.Array,
    trainable: Trainable,
    offset: Adapters | None,
    batch_of: BatchOf,
    batches: int,
) -> Trainable:
    """The mean over batches of the gradient of the loss, without training anything."""
    loss = functools.partial(_loss, task, backbone, scale, offset)

    def add(total: Trainable, index: jax.Array) -> tuple[Trainable, None]:
        slope = jax.grad(loss)(trainable, *batch_of(index))
        return jax.tree.map(lambda x, y: x + y / batches, total, slope), None

    zero = jax.tree.map(jnp.zeros_like, trainable)
    return jax.lax.scan(add, zero, jnp.arange(batches))[0]


def _loss(
    task: Task,
    backbone: Params,
    scale: jax.Array,
    offset: Adapters | None,
    trainable: Trainable,
    batch: Batch,
    mask: jax.Array,
) -> jax.Array:
    """The mean loss over the examples of a batch that the mask keeps."""
    values = outputs(task, backbone, trainable, batch, scale=scale, offset=offset)
    losses = jnp.where(mask > 0, task.loss(values, batch), 0.0)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(mask), 1.0)


def _mask(start: Start) -> Trainable:
    sides = jax.tree.map(
        lambda factors: start.trains,
        start.trainable.adapters,
        is_leaf=lambda node: isinstance(node, Factors),
    )
    return Trainable(sides, jax.tree.map(lambda _: True, start.trainable.head))


def _masked(tree: Trainable, mask: Trainable) -> Trainable:
    return jax.tree.map(lambda x, keep: jnp.where(keep, x, jnp.zeros_like(x)), tree, mask)
