"""Statistics of methods under the same seeds."""

import numpy as np
import pytest
from scipy import stats

from experiments.shared import paired


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    return {
        name: (60 + gain + rng.normal(size=5)).tolist()
        for name, gain in {"fedit": 0, "flora": 3, "fedsvd": 0.5, "frlora": -1}.items()
    }


def test_differences_equal_those_of_scipy(values):
    found = paired.differences(values, "fedit")
    assert list(found) == ["flora", "fedsvd", "frlora"]
    tests = {name: stats.ttest_rel(values[name], values["fedit"]) for name in found}
    corrected = paired.holm([test.pvalue for test in tests.values()])
    for (name, each), p in zip(found.items(), corrected, strict=True):
        gains = np.subtract(values[name], values["fedit"])
        interval = tests[name].confidence_interval(0.95)
        np.testing.assert_allclose(
            [each.mean, each.low, each.high, each.p],
            [gains.mean(), interval.low, interval.high, p],
            rtol=1e-9,
        )
        assert (each.higher, each.lower, each.seeds) == ((gains > 0).sum(), (gains < 0).sum(), 5)


def test_two_seeds_by_hand():
    found = paired.differences({"a": [1.0, 2.0], "b": [2.0, 5.0]}, "a")["b"]
    # Differences 1 and 3: mean 2, standard error 1; with one degree of freedom t is Cauchy's.
    assert (found.mean, found.higher, found.seeds) == (2.0, 2, 2)
    assert found.high - 2 == pytest.approx(12.7062, abs=1e-4)
    assert found.p == pytest.approx(1 - 2 * np.arctan(2) / np.pi)


def test_equal_differences_have_no_interval_and_no_p_value():
    """A t-test would be certain of them, after two seeds."""
    values = {"a": [1.0, 2.0], "same": [1.0, 2.0], "up": [2.0, 3.0], "down": [0.5, 1.6]}
    found = paired.differences(values, "a")
    assert found["same"] == (0, 0, 0, 0, 0, 2, 1.0) and found["same"].shown_p == "1.000"
    assert found["up"][:1] + found["up"][3:6] == (1, 2, 0, 2)
    assert np.isnan([found["up"].low, found["up"].high, found["up"].p]).all()
    assert found["up"].shown_p == "-" and found["down"].p > 0.05
    # Of 1,200 images; the subtraction leaves 4e-17 between them.
    images = {"a": [199 / 1200, 201 / 1200], "b": [227 / 1200, 229 / 1200]}
    assert paired.differences(images, "a")["b"].shown_p == "-"


def test_holm_by_hand():
    # Sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2 and 0.04 x 1, none below the one before it.
    np.testing.assert_allclose(paired.holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(paired.holm([0.7, 0.6]), [1, 1])
    np.testing.assert_allclose(paired.holm([0.2]), [0.2])


def test_rank_correlations_are_within_a_seed():
    """Seeds at different levels do not matter."""
    errors = np.array([[0.1, 1.1, 5], [0.2, 1.3, 5], [0.3, 1.2, 5]])
    accuracies = np.array([[70, 20, 1], [60, 10, 2], [50, 15, 3]])
    np.testing.assert_allclose(paired.rank_correlations(errors, accuracies), [-1, -1])
