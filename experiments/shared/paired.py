"""Statistics of methods that ran under the same seeds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

# Of a difference of two numbers, relative.
_ROUNDING = 1e-9


class Difference(NamedTuple):
    """How a method differs from a reference over seeds.

    Attributes:
      mean: Mean difference, in the unit of the values.
      low: Lower end of its 95% t-interval; NaN where all seeds have the same difference, other than
        none: a t-test would be certain that no seed could have another.
      high: Upper end.
      higher: The number of seeds on which the method is higher.
      lower: The number of seeds on which it is lower.
      seeds: The number of seeds.
      p: Two-sided p-value of the paired t-test, corrected by Holm over the methods compared; NaN
        where the interval is.
    """

    mean: float
    low: float
    high: float
    higher: int
    lower: int
    seeds: int
    p: float

    @property
    def shown_p(self) -> str:
        """The p-value as tables have it."""
        if np.isnan(self.p):
            return "-"
        return f"{self.p:.3f}" if self.p >= 0.0005 else "< 0.001"


def differences(values: Mapping[str, Sequence[float]], reference: str) -> dict[str, Difference]:
    """Compares every method with one of them, paired over seeds.

    Args:
      values: By method, one number a seed (two at least), in the same order of seeds.
      reference: The method that the others are compared with.

    Returns:
      One difference for each method but the reference, in the order of `values`.
    """
    others = [method for method in values if method != reference]
    gains = np.array([np.subtract(values[method], values[reference]) for method in others])
    seeds = gains.shape[1]
    means = gains.mean(1)
    errors = gains.std(1, ddof=1) / np.sqrt(seeds)
    # Equal ones come out of a subtraction some last digits apart.
    errors[errors <= _ROUNDING * np.abs(gains).max(1)] = 0
    errors[(errors == 0) & (means != 0)] = np.nan
    half = stats.t.ppf(0.975, seeds - 1) * errors
    p_values = holm([_p_value(*pair, seeds) for pair in zip(means, errors, strict=True)])
    return {
        method: Difference(
            float(means[i]),
            float(means[i] - half[i]),
            float(means[i] + half[i]),
            int(np.sum(gains[i] > 0)),
            int(np.sum(gains[i] < 0)),
            seeds,
            float(p_values[i]),
        )
        for i, method in enumerate(others)
    }


def _p_value(mean: float, error: float, seeds: int) -> float:
    if error == 0:
        return 1.0
    return float(2 * stats.t.sf(abs(mean) / error, seeds - 1))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction: the chance of any false finding among all stays below p."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def rank_correlations(x: np.ndarray, y: np.ndarray) -> list[float]:
    """Spearman's rank correlation over methods within each seed.

    Args:
      x: `[methods, seeds]`.
      y: `[methods, seeds]`.

    Returns:
      One number a seed; a seed in which all of `x` or all of `y` are equal has none.
    """
    return [
        float(stats.spearmanr(x[:, seed], y[:, seed]).statistic)
        for seed in range(x.shape[1])
        if np.ptp(x[:, seed]) > 0 and np.ptp(y[:, seed]) > 0
    ]
