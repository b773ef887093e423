import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_jax.data.clients import client_data, local_batch

MAX_N = 23
PADDING = 10_000
_batch = jax.jit(local_batch, static_argnums=4)


def _row(count):
    """Indices 100, 101, .. of a client, padded with what must not be chosen."""
    return jnp.where(jnp.arange(MAX_N) < count, 100 + jnp.arange(MAX_N), PADDING)


def _epoch(count, batch_size, epoch, seed=0):
    steps = -(-count // batch_size)
    key = jax.random.key(seed)
    batches = [
        _batch(_row(count), count, key, epoch * steps + step, batch_size) for step in range(steps)
    ]
    masks = np.stack([mask for _, mask in batches])
    return np.stack([indices for indices, _ in batches])[masks], masks


@given(st.integers(1, MAX_N), st.sampled_from([1, 4, 23, 32]), st.integers(0, 3), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_an_epoch_holds_every_example_once(count, batch_size, epoch, seed):
    chosen, masks = _epoch(count, batch_size, epoch, seed)
    np.testing.assert_array_equal(np.sort(chosen), 100 + np.arange(count))
    assert masks[:-1].all()  # only the last batch is partial
    assert masks[-1].sum() == count - (len(masks) - 1) * batch_size


def test_epochs_and_keys_are_shuffled_differently():
    orders = [_epoch(MAX_N, 4, epoch, seed)[0] for epoch, seed in [(0, 0), (1, 0), (0, 1)]]
    for i in range(3):
        for j in range(i):
            assert not np.array_equal(orders[i], orders[j])


def test_vmap_over_clients_of_different_sizes_equals_one_by_one():
    counts = jnp.array([1, 5, 23])
    rows = jnp.stack([_row(count) for count in counts])
    keys = jax.random.split(jax.random.key(3), 3)
    together = jax.vmap(local_batch, in_axes=(0, 0, 0, None, None))(rows, counts, keys, 7, 4)
    for k in range(3):
        alone = _batch(rows[k], counts[k], keys[k], 7, 4)
        np.testing.assert_array_equal(together[0][k], alone[0])
        np.testing.assert_array_equal(together[1][k], alone[1])


def test_a_batch_larger_than_all_data_repeats_the_epoch_with_a_mask():
    rows = jnp.array([5, 6, 7])
    for step in range(3):
        indices, mask = local_batch(rows, jnp.int32(3), jax.random.key(0), step, 8)
        assert indices.shape == mask.shape == (8,) and mask.sum() == 3
        assert sorted(indices[mask].tolist()) == [5, 6, 7]


def test_client_data_pads_and_counts():
    examples = {"image": np.ones((6, 2), np.uint8), "label": np.arange(6)}
    data = client_data(examples, [np.array([4, 1, 2]), np.array([0])])
    assert data.counts.tolist() == [3, 1]
    assert data.indices.shape == (2, 8) and data.indices.dtype == jnp.int32
    assert data.indices[0, :3].tolist() == [4, 1, 2] and data.indices[1, 0] == 0
    assert data.examples["image"].shape == (6, 2) and data.examples["image"].dtype == jnp.uint8


@pytest.mark.parametrize(
    ("counts", "width"),
    [([1, 1], 4), ([1, 2], 8), ([5, 5, 5], 16), ([1, 1, 1, 9], 16), ([1] * 30 + [17], 32)],
)
def test_widths_are_powers_of_two_of_three_times_the_mean_or_more(counts, width):
    parts = [np.zeros(count, int) for count in counts]
    assert client_data({"x": np.ones(1)}, parts).indices.shape == (len(counts), width)


def test_batches_do_not_depend_on_the_padding():
    for step in range(5):
        narrow = local_batch(_row(9)[:9], jnp.int32(9), jax.random.key(1), step, 4)
        wide = local_batch(_row(9), jnp.int32(9), jax.random.key(1), step, 4)
        np.testing.assert_array_equal(narrow[1], wide[1])
        np.testing.assert_array_equal(narrow[0][narrow[1]], wide[0][wide[1]])


@pytest.mark.parametrize(
    ("examples", "parts", "message"),
    [
        ({"x": np.ones(3)}, [], "there is no client"),
        ({"x": np.ones(3)}, [np.array([0]), np.array([], int)], "client 1 has no example"),
        ({"x": np.ones(3), "y": np.ones(4)}, [np.array([0])], "differ in their number"),
        ({"x": np.ones(3)}, [np.array([0, 3])], "beyond the 3 examples"),
        ({"x": np.ones(3)}, [np.array([0, -1])], "beyond the 3 examples"),
        ({}, [np.array([0])], "no arrays"),
    ],
)
def test_client_data_refuses_what_is_inconsistent(examples, parts, message):
    with pytest.raises(ValueError, match=message):
        client_data(examples, parts)
