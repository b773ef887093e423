"""How many clients train at once: what is tried, what is refused, and what is remembered."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from fedlora_jax.data.clients import ClientData
from fedlora_jax.experiment import chunking, hosts, memory
from fedlora_jax.methods import Server
from tests.tiny import tiny_digits

GIGABYTE = 10**9


class Rounds:
    """Rounds that take made-up time and memory, by how many clients train at once."""

    def __init__(self, monkeypatch, seconds, limit=None, working=GIGABYTE):
        self.compiled, self.timed, self.limit, self.working = [], [], limit, working
        self.seconds = seconds
        monkeypatch.setattr(memory, "estimate", self.estimate)
        monkeypatch.setattr(chunking, "_time", self.time)

    def make(self, size):
        return size

    def estimate(self, size, *arguments):
        self.compiled.append(size)
        return memory.Memory(GIGABYTE, size * self.working, self.limit)

    def time(self, size, arguments):
        self.timed.append(size)
        return self.seconds[size]

    def search(self, cohort_size=18, **options):
        return chunking.search(self.make, (), chunking.sizes(cohort_size), **options)


def test_sizes_are_few_and_divide_the_cohort():
    for cohort in range(1, 3000):
        found = chunking.sizes(cohort)
        assert found == sorted(set(found), reverse=True) and len(found) <= 5
        assert found[-1] == 1 and found[0] <= min(cohort, chunking.MOST)
        assert (found[0] == cohort) == (cohort <= chunking.MOST)
        for larger, smaller in zip(found, found[1:]):
            assert cohort % smaller == 0 or smaller in (4, 16, 64, 128)
            assert larger <= 16 * smaller or cohort < 50
    assert chunking.sizes(18) == [18, 9, 3, 1]
    assert chunking.sizes(10_000) == [125, 50, 16, 4, 1]


@pytest.mark.parametrize(
    ("wanted", "meant"), [("auto", "auto"), ("all", "all"), ("0", "all"), (3, 3), ("12", 12)]
)
def test_what_may_be_configured(wanted, meant):
    assert chunking.parse(wanted) == meant
    with pytest.raises(ValueError, match="must be auto, all or a number of clients, got 'al'"):
        chunking.parse("al")


def test_the_fastest_is_taken_and_smaller_ones_are_given_up(monkeypatch):
    rounds = Rounds(monkeypatch, {18: 1.0, 9: 0.5, 3: 0.7, 1: 0.1})
    choice = rounds.search(trial=())
    assert choice.size == 9 and rounds.timed == [18, 9, 3]
    assert str(choice).startswith(
        "9 clients at once (a round took 1.00 s with 18, 0.50 s with 9, 0.70 s with 3); a round "
        "needs 1.0 GB of state and data, 9.0 GB to train"
    )


def test_what_does_not_fit_is_not_run_and_not_compiled_where_that_is_known(monkeypatch):
    seconds = dict.fromkeys((18, 9, 3, 1), 1.0)
    rounds = Rounds(monkeypatch, seconds, limit=8 * GIGABYTE)
    assert rounds.search(trial=()).size == 3
    # Half of what 18 need is too much as well.
    assert rounds.timed == [3, 1] and set(rounds.compiled) == {18, 3, 1}
    assert rounds.search().size == 3 and rounds.timed == [3, 1]
    rounds.limit = GIGABYTE
    assert rounds.search(trial=()).size == 1


def two_hosts(monkeypatch, other):
    """As the first of two, with a false exchange: what the other one says, whatever is asked."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gather, broadcast = lambda x: np.array([x, other], x.dtype), lambda x: x
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", broadcast)


def test_of_several_hosts_the_one_with_least_memory_counts(monkeypatch):
    rounds = Rounds(monkeypatch, dict.fromkeys((18, 9, 3, 1), 1.0), limit=99 * GIGABYTE)
    assert rounds.search().size == 18
    two_hosts(monkeypatch, other=8 * GIGABYTE)
    assert rounds.search().size == 3


@pytest.mark.parametrize("count", [1, 2])
def test_what_one_host_alone_cannot_run_is_an_error(monkeypatch, count):
    """The other one waits for it in the same round, where nothing can be said to it."""

    def lacks_memory(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    if count == 1:
        assert chunking._time(lacks_memory, ()) is None
        return
    two_hosts(monkeypatch, other=0)
    with pytest.raises(ValueError, match="has not the memory .* config.clients_per_chunk"):
        chunking._time(lacks_memory, ())


def config(changes):
    made = tiny_digits(Path("nowhere"))
    made.update_from_flattened_dict(
        {"clients_per_chunk": "auto", "clients_per_round": 18, **changes}
    )
    return made


def of_run(fake, workdir, announce=None, **changes):
    server = Server({"kernel": jax.numpy.zeros(3)}, (), 1.0, (), 0)
    arguments = (server, (), (), ClientData({}, (), (), (), 0))
    workdir.mkdir(exist_ok=True)
    made = config(changes)
    return chunking.of_run(
        made, fake.make, arguments, arguments, made.clients_per_round, workdir, announce
    )


@pytest.fixture(autouse=True)
def directory():
    """Sets the directory of JAX's compilation cache, in which no test keeps a program."""

    def set_to(path):
        jax.config.update("jax_compilation_cache_dir", path and str(path))

    before = jax.config.values["jax_compilation_cache_dir"]
    set_to(None)
    yield set_to
    set_to(before)


def test_it_is_remembered_by_the_run_and_for_others_like_it(monkeypatch, tmp_path, directory):
    monkeypatch.setattr(chunking, "_found", {})
    directory(tmp_path / "kept")
    heard = []
    slow = Rounds(monkeypatch, {18: 2.0, 9: 1.0, 3: 0.5, 1: 0.7})
    assert of_run(slow, tmp_path / "a", heard.append) == 3 and slow.timed
    assert len(heard) == 1 and heard[0].startswith("fedit: 3 clients at once (a round took")
    assert json.loads((tmp_path / "a" / chunking.RECORD).read_text())["clients_per_chunk"] == 3
    fast = Rounds(monkeypatch, {18: 0.1, 9: 1.0, 3: 1.0, 1: 1.0})
    # Another seed and method; then without the directory, by what this process found.
    assert of_run(fast, tmp_path / "b", seed=3, method="flora") == 3
    directory(None)
    assert of_run(fast, tmp_path / "c") == 3
    assert not fast.timed
    # Other work is tried anew; a run that was begun stays as it was.
    assert of_run(fast, tmp_path / "d", **{"local.batch_size": 5}) == 18 and fast.timed
    assert of_run(fast, tmp_path / "a", **{"local.batch_size": 5}) == 3
    # What was found for one method is too much for another.
    fast.limit = 3 * GIGABYTE
    assert of_run(fast, tmp_path / "e") == 1


def test_a_record_that_the_first_host_cannot_write_ends_the_others_too(monkeypatch, tmp_path):
    rounds = Rounds(monkeypatch, dict.fromkeys((18, 9, 3, 1), 1.0))
    two_hosts(monkeypatch, other=True)
    with pytest.raises(ValueError, match="another host cannot go on"):
        of_run(rounds, tmp_path)


def test_short_runs_and_given_numbers_are_not_tried(monkeypatch, tmp_path):
    rounds = Rounds(monkeypatch, {})
    monkeypatch.setattr(chunking, "_found", {})
    assert of_run(rounds, tmp_path, rounds=2) == 18
    assert of_run(rounds, tmp_path, clients_per_chunk="5") == 5
    assert of_run(rounds, tmp_path, clients_per_chunk="50") == 18
    assert of_run(rounds, tmp_path, clients_per_chunk="all") == 18
    assert not rounds.timed


def test_a_run_that_cannot_fit_is_told_what_would(monkeypatch, tmp_path):
    monkeypatch.setattr(chunking, "_found", {})
    rounds = Rounds(monkeypatch, {}, limit=2 * GIGABYTE, working=4 * GIGABYTE)
    with pytest.raises(ValueError, match="fedit: .* 4.0 GB to train one client .* 2.0 GB") as error:
        of_run(rounds, tmp_path)
    assert "config.local.batch_size=2" in str(error.value)
    assert "config.precision.compute=bfloat16" in str(error.value)
    assert not rounds.timed and not list(tmp_path.iterdir())
    rounds.limit = 6 * GIGABYTE
    with pytest.raises(ValueError, match="12.0 GB .*clients_per_chunk=1 would fit"):
        of_run(rounds, tmp_path, clients_per_chunk="3")
    assert of_run(rounds, tmp_path) == 1
    rounds.limit = GIGABYTE
    with pytest.raises(ValueError, match="was begun with so many"):
        of_run(rounds, tmp_path)


def test_limits_of_control_groups(tmp_path):
    def group(path, **files):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / path / name.replace("_", ".", 1)).write_text(text)

    own = tmp_path / "cgroup"
    group(".", memory_max="1000\n", memory_current="900\n", memory_stat="inactive_file 300\n")
    group("a/b", memory_max="max\n", memory_current="5\n", memory_stat="inactive_file 1\n")
    own.write_text("0::/a/b\n")
    assert memory.free_in_groups(own, tmp_path) == [400]
    group(
        "memory",
        memory_limit_in_bytes="50\n",
        memory_usage_in_bytes="20\n",
        memory_stat="inactive_file 7\ntotal_inactive_file 2\n",
    )
    own.write_text("5:cpu:/a\n4:memory:/of/the/host\n0::/\n")
    assert memory.free_in_groups(own, tmp_path) == [32, 400]
    assert memory.free_in_groups(tmp_path / "none", tmp_path) == []
