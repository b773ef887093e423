"""The store against a plain dict of states, through kills at any point of a round."""

import tempfile
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_jax.experiment.client_store import DIRECTORY, ClientStore

N = 30
FIRST = {"a": np.zeros((2, 3), ml_dtypes.bfloat16), "nothing": (), "rank": np.int32(7)}
# Where a round is killed: before the last host's file is there, while it is written, before the
# round's checkpoint is there, after it, or not at all.
KILLS = ("no file", "part of a file", "no checkpoint", "after", None, None, None)
ROUND = st.tuples(
    st.sets(st.integers(0, N - 1), min_size=1),
    st.integers(0, 2**31),
    st.sampled_from(KILLS),
    # Whether the newer checkpoint is damaged then, and how many hosts go on.
    st.booleans(),
    st.integers(1, 3),
)


class Run:
    """Hosts by turns, with the last two checkpoints."""

    def __init__(self, workdir):
        self.workdir, self.history, self.checkpoints = workdir, {0: {}}, [0]
        self.start(3)

    def start(self, hosts):
        for rounds in self.checkpoints:
            self.compare(ClientStore(self.workdir, FIRST, N, rounds), rounds)
        self.index = self.checkpoints[-1]
        self.stores = [ClientStore(self.workdir, FIRST, N, self.index) for _ in range(hosts)]

    def compare(self, store, rounds):
        found, known = store.read(np.arange(-1, N)), self.history[rounds]
        store.expect(np.array([known.get(client, (-1,))[0] for client in range(N)]))
        for place, client in enumerate(range(-1, N)):
            _, a, rank = known.get(client, (-1, FIRST["a"], FIRST["rank"]))
            assert found["a"][place].tobytes() == a.tobytes() and found["rank"][place] == rank

    def round(self, cohort, seed, kill):
        """Whether its checkpoint is there in the end."""
        generator, who = np.random.default_rng(seed), np.array(sorted(cohort))
        writers = generator.integers(0, len(self.stores), len(who))
        a = generator.normal(size=(len(who), 2, 3)).astype(ml_dtypes.bfloat16)
        rank = generator.integers(0, 99, len(who), np.int32)
        for host, store in enumerate(self.stores[: -1 if kill == "no file" else None]):
            # A host does not have the rows of others.
            own = {"a": a.copy(), "nothing": (), "rank": rank.copy()}
            own["a"][writers != host], own["rank"][writers != host] = 0, 0
            with mock.patch("jax.process_index", lambda host=host: host):
                store.write(self.index, who, own, writers)
        if kill == "part of a file":
            newest = max((self.workdir / DIRECTORY).glob("*.npy"))
            newest.rename(newest.with_name(newest.name + ".part"))
        if kill in ("no file", "part of a file"):
            return False
        for host, store in enumerate(self.stores):
            with mock.patch("jax.process_index", lambda host=host: host):
                store.forget(self.checkpoints[0])
        if kill == "no checkpoint":
            return False
        new = {c: (self.index, a[i], rank[i]) for i, c in enumerate(who.tolist())}
        self.history[self.index + 1] = {**self.history[self.index], **new}
        self.index += 1
        self.checkpoints = [*self.checkpoints, self.index][-2:]
        return True


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(ROUND, min_size=20, max_size=40))
def test_the_states_of_both_checkpoints_survive_kills(rounds):
    with tempfile.TemporaryDirectory() as workdir, mock.patch("os.fsync"):
        run = Run(Path(workdir))
        for cohort, seed, kill, damaged, hosts in rounds:
            if run.round(cohort, seed, kill):
                run.compare(run.stores[-1], run.index)
            if kill:
                run.checkpoints = run.checkpoints[: 1 if damaged else 2]
                run.start(hosts)
