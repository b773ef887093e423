"""Random permutations of which any entry is computed alone."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# Each turn is a random involution; so many of them mix few places and many alike.
_TURNS = 32
_UNROLLED = 8


def shuffled(key: jax.Array, places: ArrayLike, count: ArrayLike) -> jax.Array:
    r"""What a random permutation of `0 .. count - 1` has at these places.

    The swap-or-not shuffle: turn t pairs each x with :math:`x' = k_t - x \bmod n`, and swaps the
    two if a coin says so that both have in common, a hash of the larger one. Time and memory are
    those of the places, whatever the count, and the count may be traced.

    Args:
      key: Random key; it is the permutation.
      places: Integers `[...]`, each in `0 .. count - 1`.
      count: n, an integer `[]`, at least 1 and less than 2**31.

    Returns:
      int32 of the shape of the places.

    References:
      Hoang, Morris and Rogaway, *An Enciphering Scheme Based on a Card Shuffle*, CRYPTO 2012.
    """
    n = jnp.asarray(count, jnp.uint32)
    pairs, coins = jax.random.bits(key, (2, _TURNS), jnp.uint32)

    def turn(index: jax.Array, x: jax.Array) -> jax.Array:
        other = (pairs[index] % n + n - x) % n
        swap = _hash(jnp.maximum(x, other) ^ coins[index]) >> 31
        return jnp.where(swap == 1, other, x)

    first = jnp.asarray(places).astype(jnp.uint32)
    return jax.lax.fori_loop(0, _TURNS, turn, first, unroll=_UNROLLED).astype(jnp.int32)


def _hash(x: jax.Array) -> jax.Array:
    """The last step of MurmurHash3: every bit of the result depends on every bit of `x`."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
