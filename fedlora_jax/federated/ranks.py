"""The ranks that clients can afford."""

import numpy as np

from fedlora_jax.names import lookup

EQUAL = "equal"

# Shares of clients with rank r, r/2, r/4, r/8 and r/16 of the largest rank r.
_SHARES = {
    "uniform": (0.2, 0.2, 0.2, 0.2, 0.2),
    "heavy_tail_light": (0.1, 0.1, 0.2, 0.2, 0.4),
    "heavy_tail_strong": (0.4, 0.2, 0.2, 0.1, 0.1),
}


def check(wanted: str) -> None:
    """Raises ValueError if `wanted` is neither a distribution nor a list of ranks."""
    if _listed(wanted) is None:
        lookup({EQUAL: None, **_SHARES}, wanted, "distribution of ranks")


def _listed(wanted: str) -> list[int] | None:
    """The numbers of a list such as `4,2,2,1`; None if it is none."""
    parts = wanted.replace(" ", "").split(",")
    return [int(part) for part in parts] if all(part.isdecimal() for part in parts) else None


def assign(wanted: str, largest: int, num_clients: int, seed: int) -> list[int]:
    """The rank of each client.

    Args:
      wanted: `'equal'`; a rank for each client, `'4,2,2,1'`; or a distribution: `'uniform'`,
        `'heavy_tail_light'` (most clients have small ranks) or `'heavy_tail_strong'` (most have
        large ones), over r, r/2, r/4, r/8 and r/16, at least 1, as in the studies of FLoRIST.
      largest: r.
      num_clients: N.
      seed: Decides who gets which rank of a distribution; how many get it does not depend on it.

    Raises:
      ValueError: If there is no such distribution, or not one rank a client.

    References:
      *FLoRIST*, arXiv:2506.09199.
    """
    check(wanted)
    listed = _listed(wanted)
    if listed is not None:
        if len(listed) != num_clients:
            raise ValueError(f"{len(listed)} ranks were given for {num_clients} clients")
        return listed
    if wanted == EQUAL:
        return [largest] * num_clients
    ends = np.rint(np.cumsum(_SHARES[wanted]) * num_clients).astype(int)
    levels = [max(1, largest >> power) for power in range(len(ends))]
    ranks = np.repeat(levels, np.diff(ends, prepend=0))
    return np.random.default_rng([seed, num_clients]).permutation(ranks).tolist()
