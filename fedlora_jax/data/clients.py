"""Clients' data on the device: the examples once, and whose they are, client after client."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedlora_jax.data.shuffling import shuffled


class CohortExamples(NamedTuple):
    """The examples that the clients of a cohort meet in a round, each client's own.

    Attributes:
      examples: Arrays `[K, V, ...]`.
      places: Which of the client's examples they are, int32 `[K, V]` in `0 .. n - 1`, ascending,
        and padded with `NO_PLACE`.
    """

    examples: dict[str, Any]
    places: jax.Array | np.ndarray


# Greater than any place.
NO_PLACE = np.iinfo(np.int32).max


class ClientData(NamedTuple):
    """The data of all N clients, in memory that grows with clients and examples, not with both.

    Attributes:
      examples: Arrays `[M, ...]`, shared by all clients; or those of one round's cohort alone.
      positions: int32 `[P]`, where in the examples they are: those of the first client, then those
        of the second, and so on; what is left is padding. P is M, or the next power of two if
        clients share so many examples, so that partitions under different seeds share a compiled
        program.
      offsets: int32 `[N]`, where in the positions a client's begin.
      counts: int32 `[N]`, how many examples a client has.
      total: Their sum, float32 `[]`.
    """

    examples: dict[str, jax.Array] | CohortExamples
    positions: jax.Array
    offsets: jax.Array
    counts: jax.Array
    total: jax.Array


def client_data(examples: Mapping[str, ArrayLike], parts: Sequence[np.ndarray]) -> ClientData:
    """Puts examples and their partition on the device.

    Args:
      examples: Arrays `[M, ...]` with a common leading axis.
      parts: For each client, the positions of its examples.

    Raises:
      ValueError: If there are no clients, a client is empty, arrays differ in their leading axis,
        or a position is not in `0 .. M - 1`.
    """
    counts = np.array([len(part) for part in parts], np.int32)
    if not len(counts):
        raise ValueError("there is no client")
    if not counts.min():
        raise ValueError(
            f"client {counts.argmin()} has no example; every client needs at least one example"
        )
    if not examples:
        raise ValueError("there are no arrays of examples")
    sizes = {key: len(np.asarray(value)) for key, value in examples.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"arrays differ in their number of examples: {sizes}")
    num_examples = next(iter(sizes.values()))
    positions = np.concatenate(parts).astype(np.int32)
    if positions.min() < 0 or positions.max() >= num_examples:
        raise ValueError(f"a client has positions beyond the {num_examples} examples")
    width = max(num_examples, len(positions))
    if width > num_examples:
        width = 1 << (width - 1).bit_length()
    return ClientData(
        {key: jnp.asarray(value) for key, value in examples.items()},
        jnp.asarray(np.pad(positions, (0, width - len(positions)))),
        jnp.asarray(np.cumsum(counts) - counts, jnp.int32),
        jnp.asarray(counts),
        jnp.float32(counts.sum()),
    )


def local_batch(
    count: jax.Array, key: jax.Array, step: ArrayLike, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """The batch of one client at one step: epochs without replacement, shuffled anew each time.

    An epoch of a client with n examples takes `ceil(n / batch_size)` steps, and its last batch is
    partial when n is not a multiple. The batch depends on nothing but the arguments, so that
    training resumes at any step; jit and vmap apply. Its cost does not grow with n.

    Args:
      count: How many examples the client has, n, at least 1.
      key: Random key of the client; a different permutation is drawn from it for each epoch.
      step: Number of the step, from 0.
      batch_size: B.

    Returns:
      Which of the client's examples, int32 `[B]` in `0 .. n - 1`, and a mask, bool `[B]`. Where it
      is False the example is valid but without meaning.
    """
    steps_per_epoch = (count + batch_size - 1) // batch_size
    epoch, batch = jnp.divmod(step, steps_per_epoch)
    places = batch * batch_size + jnp.arange(batch_size)
    mask = places < count
    return shuffled(jax.random.fold_in(key, epoch), jnp.where(mask, places, 0), count), mask
