"""Partitions that do not look at labels or domains."""

import numpy as np

from fedlora_jax import bounds
from fedlora_jax.data.partition._common import Parts, apportion, check_sizes


def iid(num_examples: int, num_clients: int, seed: int) -> Parts:
    """Splits at random into parts whose sizes differ by at most one.

    Args:
      num_examples: M.
      num_clients: N.
      seed: The same seed gives the same parts.

    Returns:
      N int32 arrays of positions in `0 .. M - 1`.

    Raises:
      ValueError: If there are more clients than examples, or no client.
    """
    bounds.check("iid", num_clients=num_clients)
    check_sizes(num_examples, num_clients, 1)
    shuffled = np.random.default_rng(seed).permutation(num_examples)
    return [part.astype(np.int32) for part in np.array_split(shuffled, num_clients)]


def quantity_skew(
    num_examples: int, num_clients: int, alpha: float, seed: int, min_examples: int = 1
) -> Parts:
    """Splits at random into parts whose sizes are drawn from a symmetric Dirichlet.

    The quantity skew of Li et al., "Federated Learning on Non-IID Data Silos: An Experimental
    Study" (ICDE 2022, arXiv:2102.02079).

    Args:
      num_examples: M.
      num_clients: N.
      alpha: Concentration: towards 0 one client has nearly all, towards infinity sizes become
        equal.
      seed: The same seed gives the same parts.
      min_examples: What every client has; the rest is split in the proportions drawn.

    Returns:
      N int32 arrays of positions in `0 .. M - 1`.

    Raises:
      ValueError: If a number is out of its bounds, or there are too few examples.
    """
    bounds.check("quantity_skew", num_clients=num_clients, alpha=alpha, min_examples=min_examples)
    check_sizes(num_examples, num_clients, min_examples)
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.full(num_clients, alpha))
    return _of_sizes(num_examples, shares, min_examples, generator)


def power_law(
    num_examples: int, num_clients: int, exponent: float, seed: int, min_examples: int = 1
) -> Parts:
    """Splits at random into parts whose sizes follow a power law.

    The k-th largest part is in proportion to `k ** -exponent`, beyond `min_examples`; which client
    has it is drawn. Power laws of sizes are those of Li et al., "Federated Optimization in
    Heterogeneous Networks" (MLSys 2020, arXiv:1812.06127).

    Args:
      num_examples: M.
      num_clients: N.
      exponent: 0 for equal sizes; the larger, the more the largest parts have.
      seed: The same seed gives the same parts.
      min_examples: What every client has; the rest is split by the power law.

    Returns:
      N int32 arrays of positions in `0 .. M - 1`.

    Raises:
      ValueError: If a number is out of its bounds, or there are too few examples.
    """
    bounds.check("power_law", num_clients=num_clients, exponent=exponent, min_examples=min_examples)
    check_sizes(num_examples, num_clients, min_examples)
    generator = np.random.default_rng(seed)
    shares = (1.0 + generator.permutation(num_clients)) ** -exponent
    return _of_sizes(num_examples, shares, min_examples, generator)


def natural(clients: np.ndarray, min_examples: int = 1) -> Parts:
    """Gives every client the examples that are its own in the data set.

    Args:
      clients: Integers `[M]`, whose each example is.
      min_examples: Clients with fewer are left out, and their examples with them.

    Returns:
      int32 arrays of positions in `0 .. M - 1`, one for each client that remains, the lowest first.

    Raises:
      ValueError: If no client has that many examples.
    """
    bounds.check("natural", min_examples=min_examples)
    clients = np.asarray(clients)
    names, counts = np.unique(clients, return_counts=True)
    if not (counts >= min_examples).any():
        raise ValueError(f"none of {len(names)} clients has {min_examples} examples")
    by_client = np.argsort(clients, kind="stable").astype(np.int32)
    parts = np.split(by_client, np.cumsum(counts)[:-1])
    return [part for part in parts if len(part) >= min_examples]


def _of_sizes(
    num_examples: int, shares: np.ndarray, min_examples: int, generator: np.random.Generator
) -> Parts:
    """Every client has the smallest size, and its share of the rest."""
    rest = num_examples - len(shares) * min_examples
    sizes = min_examples + apportion(rest, shares)
    shuffled = generator.permutation(num_examples)
    return [part.astype(np.int32) for part in np.split(shuffled, np.cumsum(sizes)[:-1])]
