import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedlora_jax.data.shuffling import shuffled


@jax.jit
def _permutations(keys, places, count):
    return jax.vmap(shuffled, in_axes=(0, None, None))(keys, places, count)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 1001])
def test_every_place_gets_another_number(count):
    keys = jax.random.split(jax.random.key(count), 3)
    for order in _permutations(keys, jnp.arange(count), count):
        np.testing.assert_array_equal(jnp.sort(order), jnp.arange(count))


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_permutation_is_as_likely(count):
    keys = jax.random.split(jax.random.key(0), 12_000)
    orders = np.asarray(_permutations(keys, jnp.arange(count), count))
    _, seen = np.unique(orders, axis=0, return_counts=True)
    assert len(seen) == np.prod(np.arange(1, count + 1))
    assert stats.chisquare(seen).pvalue > 1e-3


def test_neighbours_part_and_nothing_stays():
    """Of many, pairs of places next to each other are spread like pairs of random numbers."""
    count, keys = 1000, jax.random.split(jax.random.key(1), 200)
    orders = np.asarray(_permutations(keys, jnp.arange(count), count))
    steps = (np.diff(orders, axis=1) % count).ravel()
    seen = np.bincount(steps, minlength=count)[1:]
    assert stats.chisquare(seen).pvalue > 1e-3
    fixed = (orders == np.arange(count)).sum(1)
    assert 0.7 < fixed.mean() < 1.3  # one, of a random permutation


def test_as_many_as_int32_can_count():
    chosen = shuffled(jax.random.key(0), jnp.arange(8), 2**31 - 1)
    assert len(set(chosen.tolist())) == 8 and (chosen >= 0).all()
