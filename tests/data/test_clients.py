import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_jax.data.clients import client_data, local_batch

MAX_N = 23
_batch = jax.jit(local_batch, static_argnums=3)


def _epoch(count, batch_size, epoch, seed=0):
    steps = -(-count // batch_size)
    key = jax.random.key(seed)
    batches = [_batch(count, key, epoch * steps + step, batch_size) for step in range(steps)]
    masks = np.stack([mask for _, mask in batches])
    return np.stack([places for places, _ in batches])[masks], masks


@given(st.integers(1, MAX_N), st.sampled_from([1, 4, 23, 32]), st.integers(0, 3), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_an_epoch_holds_every_example_once(count, batch_size, epoch, seed):
    chosen, masks = _epoch(count, batch_size, epoch, seed)
    np.testing.assert_array_equal(np.sort(chosen), np.arange(count))
    assert masks[:-1].all()  # only the last batch is partial
    assert masks[-1].sum() == count - (len(masks) - 1) * batch_size


def test_epochs_and_keys_are_shuffled_differently():
    orders = [_epoch(MAX_N, 4, epoch, seed)[0] for epoch, seed in [(0, 0), (1, 0), (0, 1)]]
    for i in range(3):
        for j in range(i):
            assert not np.array_equal(orders[i], orders[j])


def test_vmap_over_clients_of_different_sizes_equals_one_by_one():
    counts = jnp.array([1, 5, 23])
    keys = jax.random.split(jax.random.key(3), 3)
    together = jax.vmap(local_batch, in_axes=(0, 0, None, None))(counts, keys, 7, 4)
    for k in range(3):
        alone = _batch(counts[k], keys[k], 7, 4)
        np.testing.assert_array_equal(together[0][k], alone[0])
        np.testing.assert_array_equal(together[1][k], alone[1])


def test_a_batch_larger_than_all_data_repeats_the_epoch_with_a_mask():
    for step in range(3):
        places, mask = local_batch(jnp.int32(3), jax.random.key(0), step, 8)
        assert places.shape == mask.shape == (8,) and mask.sum() == 3
        assert sorted(places[mask].tolist()) == [0, 1, 2] and places.max() <= 2


def test_client_data_is_one_list_of_positions():
    examples = {"image": np.ones((6, 2), np.uint8), "label": np.arange(6)}
    data = client_data(examples, [np.array([4, 1, 2]), np.array([0])])
    assert data.counts.tolist() == [3, 1] and data.offsets.tolist() == [0, 3]
    assert data.positions.dtype == jnp.int32 and data.positions[:4].tolist() == [4, 1, 2, 0]
    assert data.examples["image"].shape == (6, 2) and data.examples["image"].dtype == jnp.uint8


@pytest.mark.parametrize(
    ("sizes", "width"), [([1, 1], 6), ([4, 2], 6), ([6, 5], 16), ([3] * 6, 32)]
)
def test_partitions_of_the_same_examples_share_a_width(sizes, width):
    parts = [np.arange(size) for size in sizes]
    assert client_data({"x": np.ones(6)}, parts).positions.shape == (width,)


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
