"""What the partitioners share."""

import numpy as np

Parts = list[np.ndarray]


def check_sizes(num_examples: int, num_clients: int, min_examples: int) -> None:
    """Raises ValueError unless there are enough examples."""
    if num_examples < num_clients * min_examples:
        raise ValueError(
            f"{num_examples} examples cannot give each of {num_clients} clients {min_examples}"
        )


def apportion(total: int, shares: np.ndarray) -> np.ndarray:
    """Whole numbers in given proportions, by largest remainders, of equal ones the first.

    Args:
      total: What the numbers sum to.
      shares: Proportions `[N]`, of any positive sum.

    Returns:
      Integers `[N]`, each less than 1 away from its exact share.
    """
    # Rounded, so that no last bit of a floating-point sum decides who gets an example.
    exact = np.round(total * (shares / shares.sum()), 9)
    sizes = np.floor(exact).astype(int)
    order = np.argsort(sizes - exact, kind="stable")
    sizes[order[: total - sizes.sum()]] += 1
    return sizes
