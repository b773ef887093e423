"""Cohorts: distinct, uniform, and of a cost that does not grow with the clients there are."""

import jax
import numpy as np
import pytest
from scipy import stats

from fedlora_jax.federated import cohort, communication

SEED = jax.random.key(2)


def draw(index, num_clients, cohort_size, seed=SEED):
    drawn = cohort.sample(seed, index, num_clients=num_clients, cohort_size=cohort_size)
    return np.asarray(drawn)


@pytest.mark.parametrize(
    ("num_clients", "cohort_size"), [(1, 1), (7, 7), (30, 18), (2**31 - 1, 64)]
)
def test_a_cohort_is_of_distinct_clients(num_clients, cohort_size):
    for index in range(5):
        drawn = draw(index, num_clients, cohort_size)
        assert drawn.dtype == np.int32 and (np.diff(drawn) > 0).all()
        assert 0 <= drawn[0] and drawn[-1] < num_clients and len(drawn) == cohort_size


def test_clients_and_pairs_of_them_are_equally_likely():
    many = jax.vmap(lambda index: cohort.sample(SEED, index, num_clients=9, cohort_size=3))
    drawn = np.asarray(many(np.arange(6000)))
    pairs = [(a, b) for a in range(9) for b in range(a + 1, 9)]
    together = [((drawn == a).any(1) & (drawn == b).any(1)).sum() for a, b in pairs]
    expected = 6000 * 3 / len(pairs)
    variance = expected * (1 - 3 / len(pairs))
    assert np.abs((np.array(together) - expected) / np.sqrt(variance)).max() < 4
    assert stats.chisquare(np.bincount(drawn.ravel())).pvalue > 1e-3


def test_a_larger_cohort_than_there_are_clients_is_refused():
    for cohort_size in (0, 4):
        with pytest.raises(ValueError, match="of 3 clients cannot have"):
            draw(0, 3, cohort_size)


def test_absences_are_the_rounds_since_a_client_took_part():
    cohorts = [draw(index, 5, 2).tolist() for index in range(12)]
    for now, chosen in enumerate(cohorts):
        expected = []
        for client in chosen:
            before = [index for index in range(now) if client in cohorts[index]]
            expected.append(now - max(before, default=-1) - 1)
        last = cohort.last_rounds(SEED, now, num_clients=5, cohort_size=2)
        assert communication.absences(last, np.array(chosen), now).tolist() == expected


def test_a_panel_is_everybody_or_a_sample_of_those_who_can_be_judged():
    able = np.arange(40) % 3 > 0
    np.testing.assert_array_equal(cohort.panel(SEED, able, 40), np.arange(40))
    np.testing.assert_array_equal(cohort.panel(SEED, able, 30), np.flatnonzero(able))
    drawn = cohort.panel(SEED, able, 9)
    assert len(drawn) == 9 and (np.diff(drawn) > 0).all() and able[drawn].all()
