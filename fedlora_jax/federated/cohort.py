"""Which clients take part in a round, and which are judged one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax.data.shuffling import shuffled
from fedlora_jax.federated import randomness


@functools.partial(jax.jit, static_argnames=("num_clients", "cohort_size"))
def sample(
    seed: jax.Array, round_index: jax.Array | int, *, num_clients: int, cohort_size: int
) -> jax.Array:
    """A uniform sample of clients without replacement, the same for every method under a seed.

    Time and memory are those of the cohort, however many clients there are.

    Args:
      seed: The seed's key.
      round_index: The round.
      num_clients: N.
      cohort_size: K.

    Returns:
      Identities in ascending order, int32 `[K]`: sums over a cohort then never depend on the order
      in which it was drawn.

    Raises:
      ValueError: If K is not in 1 .. N.
    """
    if not 1 <= cohort_size <= num_clients:
        raise ValueError(f"a cohort of {num_clients} clients cannot have {cohort_size}")
    key = randomness.of_round(seed, "cohort", round_index)
    return jnp.sort(shuffled(key, jnp.arange(cohort_size), num_clients))


def last_rounds(seed: jax.Array, rounds: int, *, num_clients: int, cohort_size: int) -> np.ndarray:
    """The last of the first so many rounds that each client took part in, int32 `[N]`; -1 if none.

    Args:
      seed: The seed's key.
      rounds: How many.
      num_clients: N.
      cohort_size: K.
    """
    last = np.full(num_clients, -1, np.int32)
    for index in range(rounds):
        drawn = sample(seed, index, num_clients=num_clients, cohort_size=cohort_size)
        last[np.asarray(drawn)] = index
    return last


def panel(seed: jax.Array, can_be_judged: np.ndarray, size: int) -> np.ndarray:
    """The clients that are judged one by one: everybody, or a sample of those who can be.

    Args:
      seed: The seed's key.
      can_be_judged: Whether a client can, bool `[N]`.
      size: The largest panel.

    Returns:
      Identities in ascending order, int32 `[P]`.
    """
    if len(can_be_judged) <= size:
        return np.arange(len(can_be_judged), dtype=np.int32)
    candidates = np.flatnonzero(can_be_judged).astype(np.int32)
    if len(candidates) <= size:
        return candidates
    key = randomness.stream(seed, "panel")
    return np.sort(candidates[np.asarray(shuffled(key, jnp.arange(size), len(candidates)))])
