import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_jax.data import partition

SEEDS = st.integers(0, 2**32 - 1)


def _labels(seed, num_examples, num_labels=5):
    return np.random.default_rng(seed).integers(0, num_labels, num_examples)


def _check_partition(parts, num_examples, num_clients):
    assert len(parts) == num_clients
    assert all(len(part) and part.dtype == np.int32 for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(num_examples))


@given(st.integers(1, 200), st.integers(1, 20), SEEDS)
def test_iid(num_examples, num_clients, seed):
    num_examples = max(num_examples, num_clients)
    parts = partition.iid(num_examples, num_clients, seed)
    _check_partition(parts, num_examples, num_clients)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(100, 300), st.integers(1, 8), st.floats(0.3, 1e4), SEEDS)
@settings(deadline=None)
def test_dirichlet(num_examples, num_clients, alpha, seed):
    labels = _labels(seed, num_examples)
    parts = partition.dirichlet(labels, num_clients, alpha, seed, min_examples=2)
    _check_partition(parts, num_examples, num_clients)
    assert min(map(len, parts)) >= 2


@given(st.integers(200, 400), st.integers(1, 5), st.integers(1, 4), SEEDS)
@settings(deadline=None)
def test_clients_of_domains_see_one_domain(num_examples, clients_per_domain, num_domains, seed):
    labels = _labels(seed, num_examples)
    domains = 3 * _labels(seed + 1, num_examples, num_domains)  # with gaps
    num_clients = clients_per_domain * len(np.unique(domains))
    for parts in (
        partition.by_domain(domains, clients_per_domain, seed),
        partition.domain_dirichlet(labels, domains, clients_per_domain, 0.5, seed),
    ):
        _check_partition(parts, num_examples, num_clients)
        found = [np.unique(domains[part]).tolist() for part in parts]
        assert found == [[d] for d in np.unique(domains) for _ in range(clients_per_domain)]


@given(st.integers(1, 200), SEEDS)
def test_natural(num_examples, seed):
    clients = 3 * _labels(seed, num_examples)  # with gaps
    parts = partition.natural(clients)
    present = np.unique(clients)
    _check_partition(parts, num_examples, len(present))
    assert [np.unique(clients[part]).tolist() for part in parts] == [[x] for x in present]


def test_alpha_is_a_knob_from_one_label_a_client_to_iid():
    labels = np.repeat(np.arange(10), 200)

    def skew(alpha):
        parts = partition.dirichlet(labels, 5, alpha, seed=0)
        shares = np.stack([np.bincount(labels[p], minlength=10) / len(p) for p in parts])
        return np.abs(shares - 0.1).sum(axis=1).mean()

    skews = [skew(alpha) for alpha in (0.05, 0.5, 5.0, 1e4)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 1.0 and skews[-1] < 0.05


CALLS = {
    "iid": lambda seed: partition.iid(60, 6, seed),
    "dirichlet": lambda seed: partition.dirichlet(_labels(0, 60), 3, 1.0, seed),
    "by_domain": lambda seed: partition.by_domain(_labels(1, 60, 2), 3, seed),
    "domain_dirichlet": lambda seed: partition.domain_dirichlet(
        _labels(0, 60), _labels(1, 60, 2), 3, 1.0, seed
    ),
}


def test_every_partitioner_is_tried():
    assert CALLS.keys() | {"natural"} == set(partition.names())


@pytest.mark.parametrize("name", CALLS)
def test_only_the_seed_matters(name):
    np.random.seed(1)
    first = CALLS[name](7)
    np.random.seed(2)
    again, other = CALLS[name](7), CALLS[name](8)
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(first, other, strict=True))


def test_domains_are_split_independently():
    labels = np.tile(_labels(0, 100), 2)
    parts = partition.domain_dirichlet(labels, np.repeat([0, 1], 100), 4, 0.5, seed=0)
    assert [len(part) for part in parts[:4]] != [len(part) for part in parts[4:]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.iid(3, 4, 0), "3 examples cannot give each of 4 clients 1"),
        (lambda: partition.iid(3, 0, 0), "at least one client"),
        (lambda: partition.dirichlet(np.zeros(9), 2, 0.0, 0), "alpha must be positive"),
        (lambda: partition.dirichlet(np.zeros(9), 2, float("nan"), 0), "alpha must be positive"),
        (lambda: partition.dirichlet(np.zeros(9), 2, 1.0, 0, 5), "cannot give each of 2 clients 5"),
        (lambda: partition.dirichlet(np.zeros(9), 2, 1.0, 0, 0), "min_examples"),
        (lambda: partition.dirichlet(np.zeros(90), 9, 0.01, 0, 9), "use a larger alpha"),
        (lambda: partition.by_domain(np.array([0, 0, 1]), 2, 0), "1 examples cannot give"),
        (lambda: partition.by_domain(np.array([]), 2, 0), "no examples"),
        (
            lambda: partition.domain_dirichlet(np.zeros(3), np.zeros(4), 1, 1.0, 0),
            r"\(3,\) labels but \(4,\) domains",
        ),
    ],
)
def test_impossible_splits_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_registry():
    assert partition.get("iid") is partition.iid
    with pytest.raises(ValueError, match="Did you mean 'domain_dirichlet'"):
        partition.get("domain_dirichlett")
