"""Which clients take part in a round."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax.federated import randomness


@functools.partial(jax.jit, static_argnames=("num_clients", "cohort_size"))
def sample(
    seed: jax.Array, round_index: jax.Array | int, *, num_clients: int, cohort_size: int
) -> jax.Array:
    """A uniform sample of clients without replacement, the same for every method under a seed.

    Args:
      seed: The seed's key.
      round_index: The round.
      num_clients: N.
      cohort_size: K.

    Returns:
      Identities in ascending order, int32 `[K]`: sums over a cohort then never depend on the order
      in which it was drawn.
    """
    key = randomness.of_round(seed, "cohort", round_index)
    return jnp.sort(jax.random.choice(key, num_clients, (cohort_size,), replace=False))


def all_rounds(seed: jax.Array, rounds: int, *, num_clients: int, cohort_size: int) -> np.ndarray:
    """The cohorts of rounds 0, 1, .., as `sample` gives them, int32 `[rounds, K]`."""
    draw = functools.partial(sample, seed, num_clients=num_clients, cohort_size=cohort_size)
    return np.asarray(jax.vmap(draw)(jnp.arange(rounds)))
