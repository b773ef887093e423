"""Every partitioner, and partitions from a file."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_jax.data import partition

PAGE = (Path(__file__).parents[2] / "docs" / "partitions.md").read_text()
SEEDS = st.integers(0, 2**32 - 1)

# Fixed data, large enough for every case below.
LABELS = (np.arange(240) * 7 % 11) % 5
DOMAINS = np.arange(240) // 80
CLIENTS = (np.arange(240) * 5) % 7
THREE = [[0.1, 0.3, 0.2, 0.2, 0.2], [0.6, 0.1, 0.1, 0.1, 0.1], [0, 0.25, 0.25, 0.25, 0.25]]

# Of each partitioner with its options: the call, and the SHA-256 of its parts under the seed 3.
CASES = {
    "iid": (
        lambda seed: partition.iid(240, 7, seed),
        "25b8f4f27af1b110e95f94db92ec56ccb81c68e8937e7a89a27704aeb1dcb9d0",
    ),
    "quantity_skew": (
        lambda seed: partition.quantity_skew(240, 7, 0.5, seed),
        "2d6ae5a8564b02067168222db8c15ba61dc6647a6b05a40bba240fc5f53754eb",
    ),
    "quantity_skew with min_examples": (
        lambda seed: partition.quantity_skew(240, 7, 0.1, seed, min_examples=5),
        "0d3fdc3297d80d99489dc89f6f1a45b04c6a6e7dc14ac2287ad1dd4d2db8698b",
    ),
    "power_law": (
        lambda seed: partition.power_law(240, 7, 1.5, seed, min_examples=5),
        "5a5150dbf746124f0c2c8a04c858846f1efb50208a49a88f67903b20ea7d32d8",
    ),
    "dirichlet": (
        lambda seed: partition.dirichlet(LABELS, 6, 0.5, seed),
        "131aa492f97ed9777a9aeceabd2d63c0e8a5e60f1fd3ba82d1a36447cbd2f6d1",
    ),
    "dirichlet with min_examples": (
        lambda seed: partition.dirichlet(LABELS, 6, 0.3, seed, min_examples=5),
        "9b137d226eb296bfd095d825abf25d335d62e14efe501e976214527385b4dc42",
    ),
    "dirichlet balanced": (
        lambda seed: partition.dirichlet(LABELS, 7, 0.3, seed, balanced=True),
        "ef1502883c617feb5adf7359d1d78058917a341decfddd6eedda002b25a41b9c",
    ),
    "shards": (
        lambda seed: partition.shards(LABELS, 7, 2, seed),
        "76699c02409aab4f438e3c071f0901ed362fdcb84ec313d8003441cb7a7ae6f4",
    ),
    "label_proportions": (
        lambda seed: partition.label_proportions(LABELS, THREE, seed),
        "3a252d9fb31dd35c790028d53720776ce6ada8727a45f1d579327849c4d70966",
    ),
    "by_domain": (
        lambda seed: partition.by_domain(DOMAINS, 4, seed),
        "09f872507a138cd907a433c50dc8a7c120421e674f8e04e9fbc1fb0ad0b64a88",
    ),
    "domain_dirichlet": (
        lambda seed: partition.domain_dirichlet(LABELS, DOMAINS, 4, 0.5, seed),
        "fb998a105e97878d9e81c281c700093cada245ce44eab7c4e2fed8a2d0cd3f43",
    ),
    "domain_dirichlet balanced": (
        lambda seed: partition.domain_dirichlet(LABELS, DOMAINS, 3, 0.5, seed, balanced=True),
        "61ec7d8d7fd6c539040aa83682cb7f33392071a8e702e529146ac0c70d11548a",
    ),
}
# Those without a seed.
NATURAL = "09ddd3360d3ec047e44cc8394bc1e69b87960abf2ae01a2f7b28ab310597b1b5"


def _check(parts, num_examples, num_clients=None, whole=True):
    """What is promised of all parts."""
    assert num_clients in (None, len(parts))
    assert all(len(part) and part.dtype == np.int32 for part in parts)
    positions = np.sort(np.concatenate(parts))
    assert (np.diff(positions) > 0).all()
    assert positions[0] >= 0 and positions[-1] < num_examples
    assert not whole or len(positions) == num_examples


def _sizes(parts):
    return [len(part) for part in parts]


def _labels(seed, num_examples, num_labels=5):
    return np.random.default_rng(seed).integers(0, num_labels, num_examples)


def test_every_partitioner_is_tried():
    assert {name.split()[0] for name in CASES} | {"natural", "file"} == set(partition.names())


@pytest.mark.parametrize("name", CASES)
def test_same_seed_same_clients_on_every_machine(name):
    assert partition.digest_of_parts(CASES[name][0](3)) == CASES[name][1]


def test_the_clients_of_the_data_are_the_same_on_every_machine():
    assert partition.digest_of_parts(partition.natural(CLIENTS)) == NATURAL


@pytest.mark.parametrize("name", CASES)
def test_only_the_seed_matters(name):
    call = CASES[name][0]
    np.random.seed(1)
    first = partition.digest_of_parts(call(7))
    np.random.seed(2)
    assert partition.digest_of_parts(call(7)) == first != partition.digest_of_parts(call(8))


@pytest.mark.parametrize("name", CASES)
@given(seed=SEEDS)
@settings(deadline=None, max_examples=20)
def test_parts_of_every_partitioner(name, seed):
    parts = CASES[name][0](seed)
    _check(parts, 240, whole="label_proportions" not in name)
    if "min_examples" in name:
        assert min(_sizes(parts)) >= 5
    if name in ("iid", "dirichlet balanced", "label_proportions"):
        assert np.ptp(_sizes(parts)) <= 1


@given(st.integers(1, 200), st.integers(1, 20), st.floats(0.01, 1e4), SEEDS)
@settings(deadline=None)
def test_sizes(num_examples, num_clients, knob, seed):
    num_examples = max(num_examples, 2 * num_clients)
    equal = partition.iid(num_examples, num_clients, seed)
    _check(equal, num_examples, num_clients)
    assert np.ptp(_sizes(equal)) <= 1
    for skewed in (
        partition.quantity_skew(num_examples, num_clients, knob, seed, min_examples=2),
        partition.power_law(num_examples, num_clients, knob, seed, min_examples=2),
    ):
        _check(skewed, num_examples, num_clients)
        assert min(_sizes(skewed)) >= 2


def test_a_power_law_of_sizes():
    sizes = _sizes(partition.power_law(12_000, 4, 1.0, seed=0, min_examples=1))
    # 11,996 examples as 1 : 1/2 : 1/3 : 1/4, that is 12 : 6 : 4 : 3, one more each.
    assert sorted(sizes, reverse=True) == [5759, 2880, 1920, 1441]
    assert np.ptp(_sizes(partition.power_law(103, 4, 0.0, seed=0))) == 1


@given(st.integers(100, 300), st.integers(1, 8), st.floats(0.3, 1e4), SEEDS)
@settings(deadline=None)
def test_dirichlet(num_examples, num_clients, alpha, seed):
    labels = _labels(seed, num_examples)
    parts = partition.dirichlet(labels, num_clients, alpha, seed, min_examples=2)
    _check(parts, num_examples, num_clients)
    assert min(_sizes(parts)) >= 2


@given(st.integers(1, 100), st.integers(1, 8), st.floats(1e-4, 1e4), SEEDS)
@settings(deadline=None)
def test_balanced_dirichlet(num_examples, num_clients, alpha, seed):
    num_examples = max(num_examples, num_clients)
    labels = _labels(seed, num_examples)
    parts = partition.dirichlet(labels, num_clients, alpha, seed, balanced=True)
    _check(parts, num_examples, num_clients)
    assert np.ptp(_sizes(parts)) <= 1


@given(st.integers(1, 10), st.integers(1, 4), st.integers(0, 100), SEEDS)
def test_shards(num_clients, shards_per_client, more, seed):
    num_examples = num_clients * shards_per_client + more
    labels = _labels(seed, num_examples)
    parts = partition.shards(labels, num_clients, shards_per_client, seed)
    _check(parts, num_examples, num_clients)
    assert np.ptp(_sizes(parts)) <= shards_per_client


def test_pathological_shards_of_the_paper():
    """Two shards a client: digits of equal frequency give every client two at most."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 600))
    parts = partition.shards(labels, 100, 2, seed=0)
    assert set(_sizes(parts)) == {60}
    kinds = [len(np.unique(labels[part])) for part in parts]
    assert max(kinds) == 2 and np.mean(kinds) > 1.5


def test_label_proportions_of_the_paper():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1], [400, 1600]))
    wanted = [[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]]
    parts = partition.label_proportions(labels, wanted, seed=0)
    # 0.1 + 0.9 + 0.5 of a client's size are to be found among 400.
    counts = [np.bincount(labels[part], minlength=2).tolist() for part in parts]
    assert counts == [[27, 239], [239, 27], [133, 133]]
    few = partition.label_proportions(labels, wanted, seed=0, examples_per_client=20)
    counts = [np.bincount(labels[part], minlength=2).tolist() for part in few]
    assert counts == [[2, 18], [18, 2], [10, 10]]


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=6).filter(
        lambda rows: all(map(sum, rows))
    ),
    SEEDS,
)
def test_label_proportions(weights, seed):
    labels = np.concatenate([np.arange(3), _labels(seed, 200, 3)])
    wanted = np.array(weights) / np.sum(weights, axis=1, keepdims=True)
    parts = partition.label_proportions(labels, wanted.tolist(), seed)
    _check(parts, len(labels), len(weights), whole=False)
    (size,) = set(_sizes(parts))
    counts = np.array([np.bincount(labels[part], minlength=3) for part in parts])
    assert (np.abs(counts - size * wanted) < 1).all()
    # As large as possible: some label would not do for two more each.
    assert ((size + 2) * wanted.sum(0) + len(weights) > np.bincount(labels)).any()


@given(st.integers(200, 400), st.integers(1, 5), st.integers(1, 4), SEEDS)
@settings(deadline=None)
def test_clients_of_domains_see_one_domain(num_examples, clients_per_domain, num_domains, seed):
    labels = _labels(seed, num_examples)
    domains = 3 * _labels(seed + 1, num_examples, num_domains)  # with gaps
    num_clients = clients_per_domain * len(np.unique(domains))
    for parts in (
        partition.by_domain(domains, clients_per_domain, seed),
        partition.domain_dirichlet(labels, domains, clients_per_domain, 0.5, seed),
        partition.domain_dirichlet(labels, domains, clients_per_domain, 0.5, seed, balanced=True),
    ):
        _check(parts, num_examples, num_clients)
        found = [np.unique(domains[part]).tolist() for part in parts]
        assert found == [[d] for d in np.unique(domains) for _ in range(clients_per_domain)]


@given(st.integers(1, 200), st.integers(1, 3), SEEDS)
def test_natural(num_examples, min_examples, seed):
    clients = 3 * _labels(seed, num_examples)  # with gaps
    present, counts = np.unique(clients, return_counts=True)
    kept = present[counts >= min_examples]
    if not len(kept):
        with pytest.raises(ValueError, match="none of"):
            partition.natural(clients, min_examples)
        return
    parts = partition.natural(clients, min_examples)
    _check(parts, num_examples, len(kept), whole=min_examples == 1)
    assert [np.unique(clients[part]).tolist() for part in parts] == [[x] for x in kept]


@pytest.mark.parametrize("balanced", [False, True])
def test_alpha_is_a_knob_from_one_label_a_client_to_iid(balanced):
    labels = np.repeat(np.arange(10), 200)

    def skew(alpha):
        parts = partition.dirichlet(labels, 5, alpha, seed=0, balanced=balanced)
        counts = np.stack([np.bincount(labels[p], minlength=10) for p in parts])
        return partition.distance(counts, np.bincount(labels)).mean()

    skews = [skew(alpha) for alpha in (0.05, 0.5, 5.0, 1e4)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.5 and skews[-1] < 0.1


def test_domains_are_split_independently():
    labels = np.tile(_labels(0, 100), 2)
    parts = partition.domain_dirichlet(labels, np.repeat([0, 1], 100), 4, 0.5, seed=0)
    assert _sizes(parts[:4]) != _sizes(parts[4:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.iid(3, 4, 0), "3 examples cannot give each of 4 clients 1"),
        (lambda: partition.iid(3, 0, 0), "iid: num_clients must be at least 1, got 0"),
        (lambda: partition.quantity_skew(9, 2, -1.0, 0), "alpha must be"),
        (lambda: partition.quantity_skew(9, 2, 1.0, 0, 5), "cannot give each of 2 clients 5"),
        (lambda: partition.power_law(9, 2, -1.0, 0), "exponent must be at least 0"),
        (lambda: partition.dirichlet(np.zeros(9), 2, 0.0, 0), "alpha must be"),
        (lambda: partition.dirichlet(np.zeros(9), 2, float("nan"), 0), "alpha must be"),
        (lambda: partition.dirichlet(np.zeros(9), 2, 1.0, 0, 5), "cannot give each of 2 clients 5"),
        (lambda: partition.dirichlet(np.zeros(9), 2, 1.0, 0, 0), "min_examples"),
        (lambda: partition.dirichlet(np.zeros(90), 9, 0.01, 0, 9), "use a larger alpha"),
        (lambda: partition.shards(np.zeros(9), 2, 5, 0), "cannot give each of 2 clients 5"),
        (lambda: partition.shards(np.zeros(9), 2, 0, 0), "shards_per_client must be at least 1"),
        (lambda: partition.by_domain(np.array([0, 0, 1]), 2, 0), "1 examples cannot give"),
        (lambda: partition.by_domain(np.array([]), 2, 0), "no examples"),
        (
            lambda: partition.domain_dirichlet(np.zeros(3), np.zeros(4), 1, 1.0, 0),
            r"\(3,\) labels but \(4,\) domains",
        ),
        (lambda: partition.natural(np.array([0, 1, 1]), 3), "none of 2 clients has 3"),
    ],
)
def test_impossible_splits_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("proportions", "options", "message"),
    [
        ([[0.5, 0.4], [0.5, 0.5]], {}, "client 0 must not be negative and sum to 1"),
        ([[0.5, 0.5], [1.5, -0.5]], {}, "client 1 must not be negative and sum to 1"),
        ([[0.5, 0.5], [1.0]], {}, "a row a client and a column a label"),
        ([], {}, "a row a client and a column a label"),
        ([[1.0]], {}, "labels 0 to 0, but there is a label 1"),
        ([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], {}, r"\[6, 3, 0\] examples .* not enough"),
        ([[0.5, 0.5]], {"examples_per_client": 8}, "from 1 to 7 for each"),
        ([[0.5, 0.5]], {"examples_per_client": 0}, "from 1 to 7 for each"),
    ],
)
def test_impossible_proportions_are_refused(proportions, options, message):
    with pytest.raises(ValueError, match=message):
        partition.label_proportions(np.repeat([0, 1], [6, 3]), proportions, 0, **options)


def test_registry():
    assert partition.get("iid") is partition.iid
    with pytest.raises(ValueError, match="Did you mean 'domain_dirichlet'"):
        partition.get("domain_dirichlett")


def test_options():
    assert list(partition.options("domain_dirichlet")) == [
        "clients_per_domain",
        "alpha",
        "min_examples",
        "balanced",
    ]
    assert list(partition.options("file")) == ["path"]
    partition.check_options("dirichlet", {"num_clients": 3, "alpha": 1.0})
    with pytest.raises(ValueError, match="partition 'dirichlet': 'alfa'. Did you mean 'alpha'"):
        partition.check_options("dirichlet", {"num_clients": 3, "alfa": 1.0})
    with pytest.raises(ValueError, match="'dirichlet' needs the option num_clients, alpha"):
        partition.check_options("dirichlet", {})


def test_the_page_lists_all_partitioners_with_their_options():
    listed = dict(re.findall(r"^\| `(\w+)` \| .*? \| (.*?) \| .*\|$", PAGE, re.M))
    for name in partition.names():
        known = partition.options(name)
        wanted = [key if p.default is p.empty else f"{key}={p.default}" for key, p in known.items()]
        assert listed[name] == ", ".join(f"`{option}`" for option in wanted)


def test_entropy_and_distance():
    counts = np.array([[2, 2, 0], [0, 0, 5], [1, 1, 2]])
    np.testing.assert_allclose(partition.entropy(counts), np.log([2, 1, 2 * 2**0.5]))
    whole = np.array([10, 10, 0])
    np.testing.assert_allclose(partition.distance(counts, whole), [0, 1, 0.5])


# A file.


def _written(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "content", [[[4, 0], [2]], {"clients": {"bo": [4, 0], "al": [2]}, "comment": "by hand"}]
)
def test_partitions_from_a_file_keep_its_order(tmp_path, content):
    parts = partition.file(5, _written(tmp_path, content))
    assert [part.tolist() for part in parts] == [[4, 0], [2]]
    _check(parts, 5, whole=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[0], [1, 5]], "client 1: position 5 is out of range, the 5 examples are 0 to 4"),
        ([[0], [-1]], "client 1: position -1 is out of range"),
        ([[0], [2**70]], "client 1: position 1180591620717411303424 is out of range"),
        ([[3, 1], [2, 3]], "client 1 has example 3, as has client 0"),
        ([[3, 1], [2, 2]], "client 1 has example 2 twice"),
        ([[0], []], "client 1 is empty"),
        ({"clients": {"al": [0], "bo": [7]}}, "client 'bo': position 7 is out of range"),
        ({"clients": {"al": [0], "bo": [0]}}, "client 'bo' has example 0, as has client 'al'"),
        ({"clients": {"al": []}}, "client 'al' is empty"),
        ('{"clients": {"al": [0], "al": [1]}}', "'al' is there twice"),
        ({"clients": [[0], [1]]}, "expected a list with a list of positions for each client"),
        ({"al": [0]}, "expected a list with a list of positions for each client"),
        ([0, 1], "client 0: expected a list of positions, not 0"),
        ([[0, 1.0]], "client 0: a position is a whole number, not 1.0"),
        ([[True]], "client 0: a position is a whole number, not True"),
        ([["0"]], "client 0: a position is a whole number, not '0'"),
        ([], "there is no client"),
        ("[[0, 1], [2", "not JSON"),
        ("", "not JSON"),
        ({"parts": [[0]]}, "lacks data, format, sha256"),
    ],
)
def test_files_that_are_wrong_are_refused_by_name(tmp_path, content, message):
    path = _written(tmp_path, content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        partition.file(5, path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no partition file .*none.json"):
        partition.file(5, tmp_path / "none.json")


def test_digests_change_with_all_that_partitioners_look_at():
    found = {
        partition.digest(3),
        partition.digest(4),
        partition.digest(3, labels=np.arange(3)),
        partition.digest(3, domains=np.arange(3)),
        partition.digest(3, clients=np.arange(3)),
        partition.digest(3, labels=np.arange(3), domains=np.arange(3)),
        partition.digest(3, labels=np.arange(3)[::-1]),
        partition.digest(3, labels=np.arange(3.0)),
    }
    assert len(found) == 8
    same = {partition.digest(3, np.arange(3, dtype=kind)) for kind in (np.int32, np.int64, ">i2")}
    assert len(same) == 1
