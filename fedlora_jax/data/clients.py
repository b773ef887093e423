"""Clients' data on the device: the examples once, and an index array that says whose they are."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class ClientData(NamedTuple):
    """The data of all N clients.

    Attributes:
      examples: Arrays `[M, ...]`, shared by all clients.
      indices: int32 `[N, max_n]`, positions of a client's examples; beyond its count, padding.
        The width is a power of two, of at least three times the mean count, so that partitions of
        one kind under different seeds share a compiled program.
      counts: int32 `[N]`, how many examples a client has.
    """

    examples: dict[str, jax.Array]
    indices: jax.Array
    counts: jax.Array


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
    longest = max(int(counts.max()), math.ceil(3 * counts.mean()))
    width = 1 << (longest - 1).bit_length()
    indices = np.zeros((len(parts), width), np.int32)
    for row, part in zip(indices, parts, strict=True):
        row[: len(part)] = part
    num_examples = next(iter(sizes.values()))
    if min(map(np.min, parts)) < 0 or indices.max() >= num_examples:
        raise ValueError(f"a client has positions beyond the {num_examples} examples")
    return ClientData(
        {key: jnp.asarray(value) for key, value in examples.items()},
        jnp.asarray(indices),
        jnp.asarray(counts),
    )


def local_batch(
    client_indices: jax.Array, count: jax.Array, key: jax.Array, step: ArrayLike, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """The batch of one client at one step: epochs without replacement, shuffled anew each time.

    An epoch of a client with n examples takes `ceil(n / batch_size)` steps, and its last batch is
    partial when n is not a multiple. The batch depends on nothing but the arguments, so that
    training resumes at any step; jit and vmap apply.

    Args:
      client_indices: int32 `[max_n]`, a row of `ClientData.indices`.
      count: How many of them are the client's, at least 1.
      key: Random key of the client; a different permutation is drawn from it for each epoch.
      step: Number of the step, from 0.
      batch_size: B.

    Returns:
      Positions in the examples, int32 `[B]`, and a mask, bool `[B]`. Where it is False the position
      is that of padding, valid but without meaning.
    """
    steps_per_epoch = (count + batch_size - 1) // batch_size
    epoch, batch = jnp.divmod(step, steps_per_epoch)
    max_n = client_indices.shape[0]
    # Sorting random numbers, padding last, permutes a number of examples that jit does not know.
    order = jax.random.uniform(jax.random.fold_in(key, epoch), (max_n,))
    order = jnp.where(jnp.arange(max_n) < count, order, jnp.inf)
    shuffled = client_indices[jnp.argsort(order)]
    places = batch * batch_size + jnp.arange(batch_size)
    return shuffled[jnp.minimum(places, max_n - 1)], places < count
