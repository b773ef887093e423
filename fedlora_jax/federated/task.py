"""What is learned: a model, what it reads from a batch, the loss, and how it is judged."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedlora_jax import blocks, lora
from fedlora_jax.federated import metrics
from fedlora_jax.federated.metrics import Batch, Measure, Metric, Weighted, equally
from fedlora_jax.lora import Adapters, Params
from fedlora_jax.methods import Trainable
from fedlora_jax.names import lookup

__all__ = [
    "Batch",
    "Metric",
    "Task",
    "Weighted",
    "causal_language_model",
    "classification",
    "equally",
    "metrics_of",
    "outputs",
    "regression",
]


class Task(NamedTuple):
    """A supervised task on batches that are dicts of arrays with a leading example axis.

    Attributes:
      model: Any Linen module that needs parameters alone: no random keys (no dropout), and no other
        collections (no batch statistics).
      inputs: From a batch to the positional arguments of the model.
      loss: `(outputs, batch) -> Weighted`, the loss of each example and how much it counts.
      metrics: How the model is judged; the first is the headline.
      predict: `outputs -> [B]`, for metrics of sets; None for a task without them.
      loop: Go through the model's blocks in a loop (`blocks`): compiled in a fraction of the time
        where they are many, for the memory of one more backbone.
    """

    model: nn.Module
    inputs: Callable[[Batch], tuple[jax.Array, ...]]
    loss: Measure
    metrics: tuple[Metric, ...] = ()
    predict: Callable[[Any], jax.Array] | None = None
    loop: bool = False

    def frozen(self, backbone: Params) -> Params:
        """A backbone as the model is to be given it, for `outputs`: once a program."""
        return blocks.stack(backbone) if self.loop else backbone


# The metrics that a kind of task can be judged by.
_METRICS = {
    "classification": ("accuracy", "cross_entropy", "f1", "matthews"),
    "regression": ("pearson", "spearman", "squared_error"),
    "causal_lm": ("nll", "perplexity", "token_accuracy"),
}


def classification(
    model: nn.Module,
    inputs: Callable[[Batch], tuple[jax.Array, ...]],
    judged_by: Sequence[str] = ("accuracy",),
) -> Task:
    """Cross-entropy on integer labels `batch['label']`.

    Args:
      model: Gives logits `[B, classes]`.
      inputs: From a batch to its arguments.
      judged_by: Of accuracy, cross_entropy, f1 and matthews, the headline first.

    Raises:
      ValueError: On a metric that is none of these.
    """
    judges = metrics_of("classification", judged_by)
    return Task(model, inputs, metrics.cross_entropy, judges, lambda x: jnp.argmax(x, axis=-1))


def regression(
    model: nn.Module,
    inputs: Callable[[Batch], tuple[jax.Array, ...]],
    judged_by: Sequence[str] = ("pearson",),
) -> Task:
    """Squared error on numbers `batch['label']`, as GLUE's STS-B is learned.

    Args:
      model: Gives one output, `[B, 1]`.
      inputs: From a batch to its arguments.
      judged_by: Of pearson, spearman and squared_error, the headline first.

    Raises:
      ValueError: On a metric that is none of these.
    """
    judges = metrics_of("regression", judged_by)
    return Task(model, inputs, metrics.squared_error, judges, lambda x: x[:, 0])


def causal_language_model(model: nn.Module, judged_by: Sequence[str] = ("nll",)) -> Task:
    """Negative log-likelihood of the tokens to be predicted, each counting the same.

    A batch has `tokens` int32 `[B, T]` and `answer` bool `[B, T]`: which of them are to be
    predicted from those before; never the first, which has none, nor padding.

    Args:
      model: Called with tokens and the tokens after them, `[B, T - 1]` both, gives
        `models.llama.TokenScores` of the latter.
      judged_by: Of nll, perplexity and token_accuracy, the headline first.

    Raises:
      ValueError: On a metric that is none of these.
    """

    def inputs(batch: Batch) -> tuple[jax.Array, ...]:
        return batch["tokens"][:, :-1], batch["tokens"][:, 1:]

    return Task(model, inputs, metrics.token_nll, metrics_of("causal_lm", judged_by))


def metrics_of(kind: str, names: Sequence[str]) -> tuple[Metric, ...]:
    """The metrics of these names for a kind of task: classification, regression or causal_lm.

    Raises:
      ValueError: If there is no such kind, no name, or one that does not fit the kind.
    """
    fitting = lookup(_METRICS, kind, "task")
    if not names or isinstance(names, str):
        raise ValueError(f"expected one metric or more of {', '.join(fitting)}, got {names!r}")
    for name in names:
        if "," in name:
            several = tuple(name.split(","))
            raise ValueError(f"{name!r} is taken for one metric; several are written as {several}")
    table = {name: metrics.get(name) for name in fitting}
    return tuple(lookup(table, name, f"metric of a {kind} task") for name in names)


def outputs(
    task: Task,
    backbone: Params,
    trainable: Trainable,
    batch: Batch,
    *,
    scale: jax.Array,
    offset: Adapters | None = None,
) -> Any:
    """The model's outputs on a batch, from parameters of `Task.frozen` and trained ones."""
    return lora.apply(
        task.model,
        lora.join_head(backbone, trainable.head),
        trainable.adapters,
        *task.inputs(batch),
        scale=scale,
        offset=offset,
    )
