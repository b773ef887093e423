"""Exact match, and pass@k against the enumeration of all choices."""

import itertools
from decimal import Decimal

import numpy as np
import pytest

from fedlora_jax.scoring.answers import final_number, pass_at_k, same_number, same_text


@pytest.mark.parametrize(
    "text, number",
    [
        ("He has 3 + 4 = <<3+4=7>>7 apples.\n#### 7", "7"),
        ("#### 1,234,567", "1234567"),
        ("#### -5", "-5"),
        ("####18", "18"),
        ("9 of them.\n#### 18\n\nQuestion: 99 bottles", "18"),
        ("#### $2.50 a piece", "2.50"),
        ("Of the 12 eggs, 3 are left.", "3"),
        ("She earns $1,050.", "1050"),
        ("It is 10-5", "5"),
        ("f(3)-4", "4"),
        ("It falls to -5.", "-5"),
        ("7 or 3,4", "4"),
        ("12,345.67 in all", "12345.67"),
        ("#### €-1,200 a year, 5 years", "-1200"),
        ("#### Step 1: eggs left\n16 - 7 = 9\n\n#### Step 2\n9 * 2 = $18.", "18"),
        ("5 apples\n#### many", "5"),
        ("####\n2 * 9 = 18", "18"),
        ("She pays $.50.", "0.5"),
        ("It falls to -.5", "-0.5"),
        ("It costs.5 or...5", "5"),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == Decimal(number)


def test_no_number():
    for text in ("", "none at all", "#### many"):
        assert final_number(text) is None
        assert not same_number(text, "#### 5")
    with pytest.raises(ValueError, match="the reference 'x' has no number"):
        same_number("5", "x")


def test_equal_answers():
    assert same_number("The answer is $18.00", "#### 18")
    assert not same_number("#### 180", "#### 18")
    assert same_text(" a  b\n", "a b") and not same_text("ab", "a b")


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_pass_at_k_is_the_share_of_choices_with_one_that_passes(samples):
    for passed in range(samples + 1):
        programs = [True] * passed + [False] * (samples - passed)
        for k in range(1, samples + 1):
            choices = [any(some) for some in itertools.combinations(programs, k)]
            assert pass_at_k(samples, passed, k) == pytest.approx(np.mean(choices))


@pytest.mark.parametrize("wrong", [(2, 3, 1), (2, 1, 3), (2, 1, 0), (2, -1, 1)])
def test_pass_at_k_of_nothing(wrong):
    with pytest.raises(ValueError, match=f"pass@{wrong[2]} of {wrong[0]} programs"):
        pass_at_k(*wrong)
