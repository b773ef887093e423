"""How predictions are judged, each measure with its unit and its direction.

A metric is a weighted mean over examples, so that sums over domains, clients, batches and devices
are exact, or a score of a whole set of predictions, computed on the host. `get("accuracy")` finds
one by name.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedlora_jax import lowrank
from fedlora_jax.names import lookup

Batch: TypeAlias = Mapping[str, jax.Array]
Score: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]


class Weighted(NamedTuple):
    """A value for each example of a batch, and how much it counts, `[B]` each.

    A batch has `sum(weight * value) / sum(weight)`. For language models the weight is the number
    of tokens to be predicted, so that tokens count equally and not texts.
    """

    value: jax.Array
    weight: jax.Array


Measure: TypeAlias = Callable[[Any, Batch], Weighted]


def equally(values: jax.Array) -> Weighted:
    """Values `[B]` that count equally."""
    return Weighted(values, jnp.ones_like(values, jnp.float32))


def by_example(what: str, found: Any, size: int) -> Weighted:
    """What a loss or a measure gave for so many examples, if it is as `Weighted` says.

    Both are of float32 or wider, whatever they were, for sums over many examples.

    Raises:
      ValueError: If it is something else, such as a mean over the batch, or values alone.
    """
    pair = isinstance(found, tuple | list) and [getattr(x, "shape", None) for x in found]
    if pair != [(size,)] * 2:
        raise ValueError(
            f"{what} must give, for a batch of {size} examples, a Weighted of values and weights, "
            f"[{size}] each; got {jax.tree.map(jnp.shape, found)}. Of values [{size}] that count "
            "equally `metrics.equally` makes one"
        )
    return Weighted(*map(lowrank.wide, found))


class Metric(NamedTuple):
    """A way to judge a model.

    Attributes:
      name: What it is called in configurations and in `metrics.jsonl`.
      unit: Of what is shown, `"%"` or `"nats/token"`; empty where there is none.
      higher_is_better: Its direction.
      measure: `(outputs, batch) -> Weighted`; None for a metric of sets.
      score: `(labels [M], predictions [M], weights [M], every) -> float`, on the host; `every` are
        all labels held out, so that it need not depend on which of them a client has. None for a
        metric of examples.
      finish: Applied to means over examples, domains or clients: what the metric reports.
      factor: What is shown is the metric times this.
      digits: Decimals of what is shown.
      bounds: Smallest and largest value, where both are known.
    """

    name: str
    unit: str
    higher_is_better: bool
    measure: Measure | None = None
    score: Score | None = None
    finish: Callable[[np.ndarray], np.ndarray] = np.asarray
    factor: float = 1.0
    digits: int = 3
    bounds: tuple[float, float] | None = None

    @property
    def title(self) -> str:
        """The name and the unit, for axes and columns."""
        return f"{self.words} ({self.unit})" if self.unit else self.words

    @property
    def words(self) -> str:
        """The name in words."""
        return self.name.replace("_", " ")

    @property
    def sentence(self) -> str:
        """The title as a sentence begins with it."""
        return f"{self.title[0].upper()}{self.title[1:]}"

    @property
    def better(self) -> str:
        """Which is better: `"higher"` or `"lower"`."""
        return "higher" if self.higher_is_better else "lower"

    @property
    def difference_unit(self) -> str:
        """The unit of differences: those of percentages are points."""
        return "points" if self.unit == "%" else self.unit or "difference"

    def show(self, value: float) -> str:
        """A value with its unit."""
        unit = f" {self.unit}" if self.unit and self.unit != "%" else self.unit
        return f"{self.factor * value:.{self.digits}f}{unit}"

    def best(self, values: Mapping[Any, float]) -> Any:
        """The key of the best value, of equal ones the first."""
        return (max if self.higher_is_better else min)(values, key=lambda key: values[key])


def cross_entropy(logits: jax.Array, batch: Batch) -> Weighted:
    """The negative log-likelihood of integer labels `batch['label']`, in nats."""
    values = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), batch["label"]
    )
    return equally(values)


def squared_error(outputs: jax.Array, batch: Batch) -> Weighted:
    """The squared distance of outputs `[B, 1]` from labels `batch['label']`."""
    values = (outputs[:, 0].astype(jnp.float32) - batch["label"]) ** 2
    return equally(values)


def token_nll(scores: Any, batch: Batch) -> Weighted:
    """The mean negative log-likelihood of the tokens of a row's answer, in nats.

    Args:
      scores: `TokenScores` of each token after the first, `[B, T - 1]`.
      batch: With `answer`, bool `[B, T]`: which tokens are to be predicted.
    """
    return _over_answer(scores.nll, batch)


def _token_accuracy(scores: Any, batch: Batch) -> Weighted:
    return _over_answer(scores.correct, batch)


def _over_answer(values: jax.Array, batch: Batch) -> Weighted:
    answer = batch["answer"][:, 1:]
    count = jnp.sum(answer, axis=1, dtype=jnp.float32)
    total = jnp.sum(jnp.where(answer, values.astype(jnp.float32), 0.0), axis=1)
    return Weighted(total / jnp.maximum(count, 1.0), count)


def _accuracy(logits: jax.Array, batch: Batch) -> Weighted:
    return equally((jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32))


def _f1(
    labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray, every: np.ndarray
) -> float:
    """Of class 1 where there are two, as GLUE has it; else the plain mean over classes."""
    from sklearn.metrics import f1_score

    options = {"average": "macro", "sample_weight": weights, "zero_division": 0.0}
    return f1_score(labels, predictions, labels=[1] if every.max() < 2 else None, **options)


def _matthews(
    labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray, every: np.ndarray
) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, predictions, sample_weight=weights)


def _pearson(
    labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray, every: np.ndarray
) -> float:
    """NaN where labels or predictions are all equal."""
    # NumPy's covariance knows no bfloat16.
    labels, predictions = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    # Their weighted mean is so up to rounding alone, and rounding correlates.
    if not (np.ptp(labels) and np.ptp(predictions)):
        return float("nan")
    covariance = np.cov(labels, predictions, aweights=weights, ddof=0)
    spread = np.sqrt(covariance[0, 0] * covariance[1, 1])
    return float(covariance[0, 1] / spread) if spread > 0 else float("nan")


def _spearman(
    labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray, every: np.ndarray
) -> float:
    """Pearson's of the ranks, which are those of SciPy; weights count in the correlation alone."""
    from scipy.stats import rankdata

    labels, predictions = (rankdata(np.asarray(x, np.float64)) for x in (labels, predictions))
    return _pearson(labels, predictions, weights, every)


_SHARE: dict[str, Any] = {"factor": 100.0, "digits": 1, "bounds": (0.0, 1.0)}
_METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "%", True, _accuracy, **_SHARE),
        Metric("cross_entropy", "nats", False, cross_entropy),
        Metric("f1", "%", True, score=_f1, **_SHARE),
        Metric("matthews", "", True, score=_matthews, bounds=(-1.0, 1.0)),
        Metric("squared_error", "", False, squared_error),
        Metric("pearson", "", True, score=_pearson, bounds=(-1.0, 1.0)),
        Metric("spearman", "", True, score=_spearman, bounds=(-1.0, 1.0)),
        Metric("nll", "nats/token", False, token_nll),
        Metric("perplexity", "", False, token_nll, finish=np.exp, digits=2),
        Metric("token_accuracy", "%", True, _token_accuracy, **_SHARE),
    )
}


def get(name: str) -> Metric:
    """The metric of that name.

    Raises:
      ValueError: If there is none; the message lists those there are.
    """
    return lookup(_METRICS, name, "metric")
