"""States on disk, against a plain dict of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax.checksums import Damaged
from fedlora_jax.experiment.client_store import DIRECTORY, ClientStore
from fedlora_jax.lowrank import Factors
from tests.damage import cut, flip

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


@pytest.mark.parametrize(("count", "size"), [(120, 12), (30, 18)])
def test_files_hold_about_twice_the_states_there_are(tmp_path, count, size):
    """And two cohorts for checkpoints; of files that were dropped when empty alone it was more."""
    first = {"x": np.zeros(3, np.float32)}
    generator, expected = np.random.default_rng(0), np.zeros((count, 3), np.float32)
    store, held, last = ClientStore(tmp_path, first, count), [], np.full(count, -1)
    for index in range(100):
        chosen = generator.choice(count, size, replace=False)
        expected[chosen], last[chosen] = generator.normal(size=(size, 3)), index
        store.write(index, chosen, {"x": expected[chosen]})
        store.forget(index)
        kept = [np.load(path) for path in (tmp_path / DIRECTORY).iterdir()]
        held.append(sum(len(records) for records in kept))
    again = ClientStore(tmp_path, first, count, 100)
    for each in (store, again):
        each.expect(last)
        np.testing.assert_array_equal(each.read(np.arange(count))["x"], expected)
    assert count < max(held) < 2.3 * count + 2 * size


def test_hosts_write_what_is_theirs_and_one_reads_it_all(tmp_path, monkeypatch):
    """Two hosts by turns, killed in their last round; then one goes on alone."""

    def on_host(index, act):
        monkeypatch.setattr("jax.process_index", lambda: index)
        return act()

    stores = [ClientStore(tmp_path, FIRST, N) for _ in range(2)]
    generator, expected, before = np.random.default_rng(0), {}, {}
    for index in range(9):
        chosen, before = generator.choice(N, K, replace=False), dict(expected)
        writers, states = np.sort(generator.integers(0, 2, K)), states_of(generator, K)
        for place, client in enumerate(chosen.tolist()):
            expected[client] = jax.tree.map(lambda x, p=place: x[p], states)
        for host, store in enumerate(stores):
            # A host does not have the rows of the other.
            own = jax.tree.map(lambda x, h=host, w=writers: x[w == h], states)
            mine = jax.tree.map(np.zeros_like, states)
            for x, values in zip(jax.tree.leaves(mine), jax.tree.leaves(own), strict=True):
                x[writers == host] = values
            on_host(host, lambda s=store, i=index, w=(chosen, mine, writers): s.write(i, *w))
        for host, store in enumerate(stores):
            on_host(host, lambda s=store, i=index: s.forget(i))
            assert_equal(store, expected)
    assert list((tmp_path / DIRECTORY).glob("*.1.npy"))
    alone = on_host(0, lambda: ClientStore(tmp_path, FIRST, N, 8))
    assert_equal(alone, before)
    everybody, states = np.arange(N), states_of(generator, N)
    alone.write(8, everybody, states)
    after = {client: jax.tree.map(lambda x, c=client: x[c], states) for client in range(N)}
    # The second host's file of the round that was killed is no more.
    assert_equal(ClientStore(tmp_path, FIRST, N, 9), after)


def test_rows_that_are_not_wanted_are_not_read(tmp_path, monkeypatch):
    store = ClientStore(tmp_path, FIRST, N)
    states = states_of(np.random.default_rng(0), K)
    store.write(0, np.arange(K), states)
    store.write(1, np.arange(K, 2 * K), states)
    opened, load = [], np.load

    def noted(path, **how):
        opened.append(path.name)
        return load(path, **how)

    monkeypatch.setattr(np, "load", noted)
    wanted = np.array([True, False, True])
    found = store.read(np.array([1, K, -1]), wanted)
    assert opened == ["000000.npy"]
    for x, y, first in zip(
        *map(jax.tree.leaves, (found, states, jax.device_get(FIRST))), strict=True
    ):
        np.testing.assert_array_equal(x[0], y[1])
        np.testing.assert_array_equal(x[2], first)


@pytest.mark.parametrize("harm", [flip, cut])
def test_a_damaged_file_without_a_newest_state_is_no_loss(tmp_path, harm):
    generator, states = np.random.default_rng(0), {}
    store = ClientStore(tmp_path, FIRST, N)
    for index in range(2):
        states = states_of(generator, N)
        store.write(index, np.arange(N), states)
    old = tmp_path / DIRECTORY / "000000.npy"
    harm(old)
    again = ClientStore(tmp_path, FIRST, N, 2)
    again.expect(np.ones(N))
    assert_equal(again, {i: jax.tree.map(lambda x, i=i: x[i], states) for i in range(N)})
    with pytest.raises(Damaged, match=r"000000\.npy is damaged"):
        ClientStore(tmp_path, FIRST, N, 1).expect(np.zeros(N))
    again.forget(1)
    assert old.exists()
    again.forget(2)
    assert not old.exists()


def test_a_damaged_file_is_not_taken_for_one_of_an_older_version(tmp_path):
    """With 6 records in its header instead of 4 it would end where its checksum does."""
    first = {"x": np.zeros(2, np.float32)}
    ClientStore(tmp_path, first, N).write(0, np.arange(4), {"x": np.ones((4, 2), np.float32)})
    path = tmp_path / DIRECTORY / "000000.npy"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"'shape': (4,)", b"'shape': (6,)"))
    assert path.read_bytes() != content
    with pytest.raises(Damaged, match=r"000000\.npy is damaged"):
        ClientStore(tmp_path, first, N, 1).expect(np.where(np.arange(N) < 4, 0, -1))


def test_a_file_of_an_older_version_is_read(tmp_path):
    """Without the round of each state, and without a checksum."""
    generator = np.random.default_rng(0)
    old, new = states_of(generator, 6), states_of(generator, 5)
    ClientStore(tmp_path, FIRST, N).write(3, np.arange(6), old)
    path = tmp_path / DIRECTORY / "000003.npy"
    records = np.load(path)
    older = np.dtype([field for field in records.dtype.descr if field[0] != "after_round"])
    np.save(path, np.array([tuple(row[name] for name in older.names) for row in records], older))
    again = ClientStore(tmp_path, FIRST, N, 4)
    again.expect(np.where(np.arange(N) < 6, 3, -1))
    again.write(4, np.arange(1, 6), new)
    # What is left of it is written again, in the form of today.
    again.write(5, np.arange(8, 12), states_of(generator, 4))
    assert sorted(np.load(tmp_path / DIRECTORY / "000005.npy")["identity"]) == [0, 8, 9, 10, 11]
    for found in (again, ClientStore(tmp_path, FIRST, N, 6)):
        found.expect(np.array([3] + [4] * 5 + [-1] * 2 + [5] * 4))
        rows = found.read(np.array([0, 1]))
        for x, first, second in zip(*map(jax.tree.leaves, (rows, old, new)), strict=True):
            np.testing.assert_array_equal(x[0], first[0])
            np.testing.assert_array_equal(x[1], second[0])
