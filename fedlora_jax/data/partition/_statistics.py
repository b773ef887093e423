"""How far the clients of a partition are from each other and from all data."""

import numpy as np


def entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy of distributions, in nats.

    Args:
      counts: How often each kind occurs, `[..., L]`, each row with a positive sum.

    Returns:
      Floats `[...]`, from 0 where all is of one kind to `log(L)`.
    """
    p = _shares(counts)
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1) + 0.0  # no -0


def distance(counts: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Total variation distance of distributions from that of all data.

    Args:
      counts: How often each kind occurs, `[..., L]`, each row with a positive sum.
      whole: The same of all data, `[L]`.

    Returns:
      Floats `[...]`, from 0 where the distributions are equal to 1 where they share nothing.
    """
    return np.abs(_shares(counts) - _shares(whole)).sum(-1) / 2


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / counts.sum(-1, keepdims=True)
