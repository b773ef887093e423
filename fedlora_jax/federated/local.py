"""Local training: what one client does in one round, a pure function to be vmapped over clients."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fedlora_jax import blocks
from fedlora_jax.federated.faults import Faults
from fedlora_jax.federated.metrics import by_example
from fedlora_jax.federated.task import Batch, Task, outputs
from fedlora_jax.lora import Adapters, Params
from fedlora_jax.methods import Start, Trainable, Trained, trained_mask

# So that a batch without anything to learn from has no loss; whole examples and tokens count 1.
_LEAST = 1e-30

BatchOf: TypeAlias = Callable[[jax.Array], tuple[Batch, jax.Array]]


class LocalTraining(NamedTuple):
    """How clients train.

    Attributes:
      optimizer: Any optax optimiser that needs gradients and parameters alone (no loss, no
        `LookaheadParams`), made with a learning rate of 1: its updates are multiplied by the
        round's. Each client starts it afresh in each round. Where blocks are in a loop
        (`Task.loop`) it sees those of all blocks as one array, which SGD, Adam and clipping by the
        norm of all do not mind, and what treats each array by itself does.
      batch_size: Examples a step. A client's last batch in an epoch may hold fewer.
      steps: Optimisation steps a round, or
      epochs: passes over the client's own data instead, if this is not 0.
      faults: What some of them do instead; None for nothing.
    """

    optimizer: optax.GradientTransformation
    batch_size: int
    steps: int = 0
    epochs: int = 0
    faults: Faults | None = None

    def steps_of(self, count: jax.Array) -> jax.Array:
        """The steps a round of clients with so many examples, int32 of the same shape."""
        if not self.epochs:
            return jnp.full_like(count, self.steps)
        return self.epochs * self.steps_of_epoch(count)

    def steps_of_epoch(self, count: jax.Array) -> jax.Array:
        """The batches of one pass over so many examples, int32 of the same shape."""
        return (count + self.batch_size - 1) // self.batch_size


def train(
    task: Task,
    training: LocalTraining,
    backbone: Params,
    scale: jax.Array,
    start: Start,
    batch_of: BatchOf,
    *,
    learning_rate: jax.Array,
    steps: jax.Array,
    longest: jax.Array | int,
    penalty: Callable[[Trainable], jax.Array] | None = None,
) -> tuple[Trained, jax.Array]:
    """Trains from a start.

    Args:
      task: What is learned.
      training: How.
      backbone: Frozen parameters, from `Task.frozen`.
      scale: The factor s.
      start: Initial values, which of them move, and the frozen offset.
      batch_of: From the step to a batch and its mask, bool `[B]`. An example where it is False has
        no influence, a batch with none but such moves nothing.
      learning_rate: Factor on the optimiser's updates, `[]`.
      steps: How many steps the client takes, int32 `[]`.
      longest: Most steps of any client under the same `vmap`, so that the loop has one length.
      penalty: Added to the loss that is trained on, not to the one that is reported.

    Returns:
      What was trained, and the loss before a step, mean over the steps, `[]`.
    """
    if blocks.is_stacked(backbone):
        start = _stacked(start)
    moves = trained_mask(start)
    loss = functools.partial(_loss, task, backbone, scale, start.offset)

    def objective(
        trainable: Trainable, batch: Batch, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        value = loss(trainable, batch, mask)
        return value if penalty is None else value + penalty(_unstacked(trainable)), value

    def step(index: jax.Array, carry: _Carry) -> _Carry:
        batch, mask = batch_of(index)
        (_, value), gradient = jax.value_and_grad(objective, has_aux=True)(
            carry.trainable, batch, mask
        )
        # Masked before the optimiser for the sake of clipping by norm, and after it for the sake of
        # weight decay.
        gradient = _masked(gradient, moves)
        updates, state = training.optimizer.update(gradient, carry.state, carry.trainable)
        updates = jax.tree.map(lambda u: learning_rate * u, _masked(updates, moves))
        moved = _Carry(
            optax.apply_updates(carry.trainable, updates),
            state,
            jax.tree.map(jnp.add, carry.gradient, gradient),
            carry.loss + value,
            carry.steps + 1,
        )
        active = jnp.any(mask) & (index < steps)
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), moved, carry)

    first = _Carry(
        start.trainable,
        training.optimizer.init(start.trainable),
        jax.tree.map(jnp.zeros_like, start.trainable),
        jnp.float32(0),
        jnp.int32(0),
    )
    last = jax.lax.fori_loop(0, longest, step, first)
    taken = jnp.maximum(last.steps, 1)
    mean_gradient, mean_loss = _divided((last.gradient, last.loss), taken)
    return Trained(_unstacked(last.trainable), _unstacked(mean_gradient)), mean_loss


def _stacked(start: Start) -> Start:
    trainable = start.trainable
    return start._replace(
        trainable=trainable._replace(adapters=blocks.stack_adapters(trainable.adapters)),
        offset=None if start.offset is None else blocks.stack_adapters(start.offset),
    )


def _unstacked(trainable: Trainable) -> Trainable:
    """By kernel, as it is where nothing was stacked."""
    return trainable._replace(adapters=blocks.unstack_adapters(trainable.adapters))


class _Carry(NamedTuple):
    """What goes from step to step; gradient and loss are sums over the steps taken."""

    trainable: Trainable
    state: optax.OptState
    gradient: Trainable
    loss: jax.Array
    steps: jax.Array


def gradient(
    task: Task,
    backbone: Params,
    scale: jax.Array,
    trainable: Trainable,
    offset: Adapters | None,
    batch_of: BatchOf,
    batches: jax.Array,
) -> Adapters:
    """The mean over so many batches of the gradient for the adapters, without training anything."""

    def objective(adapters: Adapters, batch: Batch, mask: jax.Array) -> jax.Array:
        at = trainable._replace(adapters=adapters)
        return _loss(task, backbone, scale, offset, at, batch, mask)

    def add(index: jax.Array, total: Adapters) -> Adapters:
        slope = jax.grad(objective)(trainable.adapters, *batch_of(index))
        return jax.tree.map(jnp.add, total, slope)

    zero = jax.tree.map(jnp.zeros_like, trainable.adapters)
    total = jax.lax.fori_loop(0, batches, add, zero)
    return _divided(total, batches)


def _divided(sums: Any, count: jax.Array) -> Any:
    return jax.tree.map(lambda x: x / count.astype(x.dtype), sums)


def _loss(
    task: Task,
    backbone: Params,
    scale: jax.Array,
    offset: Adapters | None,
    trainable: Trainable,
    batch: Batch,
    mask: jax.Array,
) -> jax.Array:
    """The weighted mean of the loss over the examples of a batch that the mask keeps."""
    values = outputs(task, backbone, trainable, batch, scale=scale, offset=offset)
    losses, weights = by_example("the task's loss", task.loss(values, batch), len(mask))
    weights = jnp.where(mask, weights.astype(jnp.float32), 0.0)
    losses = jnp.where(weights > 0, losses.astype(jnp.float32), 0.0)
    return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), _LEAST)


def _masked(tree: Trainable, mask: Trainable) -> Trainable:
    return jax.tree.map(lambda x, keep: jnp.where(keep, x, jnp.zeros_like(x)), tree, mask)
