"""What is learned: a model, what it reads from a batch, and the loss."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fedlora_jax import lora
from fedlora_jax.lora import Adapters, Params
from fedlora_jax.methods import Trainable

Batch: TypeAlias = Mapping[str, jax.Array]


class Task(NamedTuple):
    """A supervised task on batches that are dicts of arrays with a leading example axis.

    Attributes:
      model: Any Linen module.
      inputs: From a batch to the positional arguments of the model.
      loss: `(outputs, batch) -> [B]`, the loss of each example.
      correct: `(outputs, batch) -> [B]`, 1 where the prediction is right, 0 elsewhere.
    """

    model: nn.Module
    inputs: Callable[[Batch], tuple[jax.Array, ...]]
    loss: Callable[[jax.Array, Batch], jax.Array]
    correct: Callable[[jax.Array, Batch], jax.Array]


def classification(model: nn.Module, inputs: Callable[[Batch], tuple[jax.Array, ...]]) -> Task:
    """Cross-entropy and accuracy on integer labels `batch['label']`."""

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), batch["label"]
        )

    def correct(logits: jax.Array, batch: Batch) -> jax.Array:
        return (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)

    return Task(model, inputs, loss, correct)


def outputs(
    task: Task,
    backbone: Params,
    trainable: Trainable,
    batch: Batch,
    *,
    scale: jax.Array,
    offset: Adapters | None = None,
) -> jax.Array:
    """The model's outputs on a batch, from frozen and trained parameters."""
    return lora.apply(
        task.model,
        lora.join_head(backbone, trainable.head),
        trainable.adapters,
        *task.inputs(batch),
        scale=scale,
        offset=offset,
    )
