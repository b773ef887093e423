"""States on disk, against a plain dict of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax.experiment.client_store import DIRECTORY, ClientStore
from fedlora_jax.lowrank import Factors

FIRST = {
    "factors": Factors(jnp.ones((3, 2)), jnp.zeros((2, 4), jnp.bfloat16)),
    "round": jnp.int32(-1),
}
N, K = 12, 4


def states_of(generator, count):
    def drawn(x):
        return jnp.asarray(generator.normal(size=(count, *x.shape)) * 100).astype(x.dtype)

    return jax.device_get(jax.tree.map(drawn, FIRST))


def assert_equal(store, expected):
    found = store.read(np.arange(N))
    for client in range(N):
        mine = expected.get(client, jax.device_get(FIRST))
        jax.tree.map(lambda x, y, c=client: np.testing.assert_array_equal(x[c], y), found, mine)
        assert found["factors"].b.dtype == jnp.bfloat16 and found["round"].dtype == np.int32


@pytest.mark.parametrize("seed", range(3))
def test_the_newest_state_of_everybody_survives_restarts_and_forgetting(tmp_path, seed):
    generator = np.random.default_rng(seed)
    store, expected, history = ClientStore(tmp_path, FIRST, N), {}, [{}]
    for index in range(20):
        chosen = np.sort(generator.choice(N, K, replace=False))
        states = states_of(generator, K)
        store.write(index, chosen, states)
        for place, client in enumerate(chosen.tolist()):
            expected[client] = jax.tree.map(lambda x, p=place: x[p], states)
        history.append(dict(expected))
        store.forget(max(index, 1))  # the last two checkpoints are kept
        assert_equal(store, expected)
        if generator.random() < 0.3:
            back = int(generator.integers(max(index, 1), index + 2))
            assert_equal(ClientStore(tmp_path, FIRST, N, back), history[back])
            store = ClientStore(tmp_path, FIRST, N, index + 1)
    assert len(list((tmp_path / DIRECTORY).iterdir())) < N


def test_nobody_has_the_first_state(tmp_path):
    store = ClientStore(tmp_path, FIRST, N)
    store.write(0, np.arange(N), states_of(np.random.default_rng(0), N))
    found = store.read(np.array([3, -1]))
    np.testing.assert_array_equal(found["factors"].a[1], FIRST["factors"].a)
    assert not np.array_equal(found["factors"].a[0], FIRST["factors"].a)


def test_methods_without_states_leave_no_files(tmp_path):
    store = ClientStore(tmp_path, (), N)
    store.write(0, np.arange(K), ())
    assert store.read(np.arange(K)) == () and not (tmp_path / DIRECTORY).exists()


def test_states_of_another_model_are_refused(tmp_path):
    ClientStore(tmp_path, FIRST, N).write(0, np.arange(K), states_of(np.random.default_rng(0), K))
    other = {**FIRST, "round": jnp.float32(0)}
    with pytest.raises(ValueError, match=r"000000\.npy holds clients of another model"):
        ClientStore(tmp_path, other, N, rounds=1)


def test_a_state_may_be_one_bare_array(tmp_path):
    """HetLoRA's is the rank that a client has kept."""
    store = ClientStore(tmp_path, jnp.int32(7), N)
    store.write(0, np.array([1, 4]), np.array([3, 2], np.int32))
    found = ClientStore(tmp_path, jnp.int32(7), N, 1).read(np.array([0, 1, 4]))
    np.testing.assert_array_equal(found, [7, 3, 2])
