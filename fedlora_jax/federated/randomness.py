"""Randomness is derived, never carried.

Every random choice has a key made from the seed, the name of its stream, the round and the client's
identity. No result depends on the order of clients, on how they are chunked, or on what was drawn
before.
"""

import zlib

import jax
import jax.numpy as jnp


def stream(seed: jax.Array, name: str) -> jax.Array:
    """The key of a named stream of a seed's key.

    Raises:
      ValueError: If a number is given in the key's place.
    """
    dtype = getattr(seed, "dtype", type(seed))
    if jnp.ndim(seed) == 0 and not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        found = jnp.dtype(dtype).name
        raise ValueError(f"the seed must be a key, such as jax.random.key(0); got a single {found}")
    return jax.random.fold_in(seed, zlib.crc32(name.encode()))


def of_round(seed: jax.Array, name: str, round_index: jax.Array | int) -> jax.Array:
    """The key of a stream in one round."""
    return jax.random.fold_in(stream(seed, name), round_index)


def of_client(
    seed: jax.Array, name: str, round_index: jax.Array | int, client: jax.Array | int
) -> jax.Array:
    """The key of a stream for one client in one round."""
    return jax.random.fold_in(of_round(seed, name, round_index), client)
