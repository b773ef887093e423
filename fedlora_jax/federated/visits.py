"""Which of its examples a client meets in a round, known before the round is computed."""

from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedlora_jax.data.clients import NO_PLACE, local_batch
from fedlora_jax.federated import randomness
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.lora import Adapters
from fedlora_jax.methods import Context, Method, Server

PyTree: TypeAlias = Any

# The streams of batches that a client draws.
BATCHES, CALIBRATION = "batches", "calibration"


class Visits(Protocol):
    """A jitted function, from `make_visits`."""

    def __call__(
        self, seed: jax.Array, round_index: int, cohort: ArrayLike, counts: ArrayLike
    ) -> jax.Array:
        """The places of the examples that each client of a cohort meets.

        Args:
          seed: The seed's key.
          round_index: The round.
          cohort: Identities, int32 `[K]`; -1 is nobody, who meets nothing.
          counts: How many examples each has, int32 `[K]`.

        Returns:
          int32 `[K, V]`, ascending, without repetition, padded with `NO_PLACE`.
        """


def calibration_batches(method: Method, server: Server, client: PyTree) -> int:
    """How many batches a client's estimate of its gradient wants, found by tracing its start.

    Args:
      method: How clients and server work together.
      server: Its state.
      client: The state of one client.
    """
    wanted = [0]

    def gradient(adapters: Adapters, *, offset: Adapters | None, batches: int) -> Adapters:
        wanted.append(batches)
        return adapters

    def start(server: Server, client: PyTree, key: jax.Array, rank: jax.Array) -> None:
        method.start(server, client, Context(key, gradient, rank))

    jax.eval_shape(start, server, client, jax.random.key(0), jnp.int32(1))
    return max(wanted)


def most_visited(training: LocalTraining, calibration: int, largest: int) -> int:
    """V, the most examples that a client meets in a round.

    Args:
      training: How clients train.
      calibration: From `calibration_batches`.
      largest: The examples of the client that has most.
    """
    if training.epochs:
        return largest
    return min(largest, (training.steps + calibration) * training.batch_size)


def make_visits(training: LocalTraining, calibration: int, largest: int) -> Visits:
    """Builds the function; a client draws the very batches that it draws in `run_cohort`.

    Args:
      training: How clients train.
      calibration: From `calibration_batches`.
      largest: The examples of the client that has most.
    """
    most = most_visited(training, calibration, largest)

    def drawn(key: jax.Array, count: jax.Array, steps: int, available: jax.Array) -> jax.Array:
        """The places of the first so many batches, or of as many as there are."""

        def batch(step: jax.Array) -> jax.Array:
            there = jnp.where(step < available, step, 0)
            return local_batch(count, key, there, training.batch_size)[0]

        return jax.vmap(batch)(jnp.arange(steps)).reshape(-1)

    def of_client(
        seed: jax.Array, round_index: jax.Array, identity: jax.Array, count: jax.Array
    ) -> jax.Array:
        if training.epochs:
            every = jnp.arange(most)
            return jnp.where((every < count) & (identity >= 0), every, NO_PLACE)
        streams = (
            (BATCHES, training.steps, jnp.int32(training.steps)),
            (CALIBRATION, calibration, training.steps_of_epoch(count)),
        )
        parts = [
            drawn(randomness.of_client(seed, name, round_index, identity), count, steps, available)
            for name, steps, available in streams
        ]
        places = jnp.sort(jnp.concatenate(parts))
        repeated = jnp.pad(places[1:] == places[:-1], (1, 0))
        return jnp.sort(jnp.where(repeated | (identity < 0), NO_PLACE, places))[:most]

    return jax.jit(jax.vmap(of_client, in_axes=(None, None, 0, 0)))
