"""What the partitioners share."""

import numpy as np

Parts = list[np.ndarray]


def check_sizes(num_examples: int, num_clients: int, min_examples: int) -> None:
    """Checks that there are enough examples.

    Raises:
      ValueError: If there are not, or a number is not positive.
    """
    if num_clients < 1:
        raise ValueError(f"there must be at least one client, not {num_clients}")
    if min_examples < 1:
        raise ValueError(f"min_examples must be at least 1, not {min_examples}")
    if num_examples < num_clients * min_examples:
        raise ValueError(
            f"{num_examples} examples cannot give each of {num_clients} clients {min_examples}"
        )


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless a parameter is above 0 and finite."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive, not {value}")


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
