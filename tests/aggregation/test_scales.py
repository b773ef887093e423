"""A server's step knows no size: small updates, near agreement and unequal clients change nothing.

First rounds, small learning rates and language models give factors of any size; every function is
homogeneous in each of them, and none that claims to reduce FedIT's error ever exceeds it.
"""

import functools
import math

import jax
import numpy as np
import pytest

from fedlora_jax import Factors, aggregation, lowrank
from tests.aggregation import cases

every = pytest.mark.parametrize("pair", cases.ALL, ids=cases.label)
WEIGHTS = cases.WEIGHTS
# Of one factor, and of both: their squares are no numbers any more at the ends.
SCALES = {
    "a": [(c, 1) for c in (1e-25, 1e-8, 1e-4, 1e-2, 1e2, 1e4, 1e8, 1e18, 1e25)],
    "b": [(1, c) for c in (1e-25, 1e-8, 1e-4, 1e-2, 1e2, 1e4, 1e8, 1e18, 1e25)],
    "ab": [(1e-12, 1e-12), (1e11, 1e11), (1e-20, 1e20), (1e20, 1e-20)],
}


def case_of(pair) -> cases.Case:
    return cases.CASES[pair[0]][pair[1]]


def times(tree, factors):
    def scaled(x):
        return Factors(*(np.float32(c) * side for c, side in zip(factors, x)))

    return jax.tree.map(scaled, tree, is_leaf=lowrank.is_factors)


@every
@pytest.mark.parametrize("sides", SCALES)
def test_factors_times_a_number_give_the_product_times_it(pair, sides):
    case = case_of(pair)
    if not case.homogeneous:
        pytest.skip("raw units reproduce a descent that depends on sizes, and runs away from large")
    stacked = cases.prepared(case, cases.clients())
    want = cases.product(cases.bound(pair)(stacked, WEIGHTS), WEIGHTS)
    for factors in SCALES[sides]:
        trees = {case.tree: times(cases.extra(), factors)} if case.tree else {}
        function = functools.partial(cases.bound(pair), **trees)
        scaled = function(times(stacked, factors), WEIGHTS)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(scaled))
        got = [matrix / math.prod(factors) for matrix in cases.product(scaled, WEIGHTS)]
        cases.close(got, want, max(1e-5, case.tolerance))


@pytest.mark.parametrize("sides", SCALES)
def test_diagnostics_know_no_size_either(sides):
    """But for the norm and the spectrum, which are that number times larger."""

    def described(stacked):
        mean = aggregation.fedit(stacked, WEIGHTS)
        return aggregation.diagnostics(stacked, WEIGHTS, mean)

    def numbers(whole, kernels, factor):
        parts = [x._replace(norm=x.norm / factor) for x in (whole, *kernels.values())]
        spectra = [x.spectrum / factor for x in parts[1:]]
        return [*(x._replace(spectrum=None) for x in parts), *spectra]

    stacked = cases.clients()
    want = numbers(*described(stacked), 1)
    for factors in SCALES[sides]:
        got = numbers(*described(times(stacked, factors)), math.prod(factors))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, want)


def draw(seed, *, spread, size=1.0, count=8, rank=4, kernel=(32, 48)):
    """Clients around common factors, updates of unequal length, `b` of a given size."""
    generator = np.random.default_rng(seed)
    d_in, d_out = kernel
    a = generator.standard_normal((d_in, rank)) + spread * generator.standard_normal(
        (count, d_in, rank)
    )
    b = generator.standard_normal((rank, d_out)) + spread * generator.standard_normal(
        (count, rank, d_out)
    )
    lengths = 1 + spread * generator.exponential(size=(count, 1, 1))
    factors = Factors(a * d_in**-0.5, size * lengths * b)
    return {"dense": jax.tree.map(np.float32, factors)}


reducing = pytest.mark.parametrize(
    "pair", [p for p in cases.ALL if case_of(p).reduces], ids=cases.label
)


@reducing
@pytest.mark.parametrize("size", [1.0, 1e-4], ids="size={:.0e}".format)
def test_the_error_is_never_above_that_of_fedit(pair, size):
    weights = np.random.default_rng(0).uniform(0.5, 3, 8).astype(np.float32)
    for seed, spread in enumerate([3.0, 0.5, 0.1, 1e-2, 1e-3]):
        stacked = draw(seed, spread=spread, size=size)
        theirs = aggregation.error(stacked, weights, aggregation.fedit(stacked, weights))
        ours = aggregation.error(stacked, weights, cases.bound(pair)(stacked, weights))
        assert float(ours) <= float(theirs) * (1 + 1e-4) + 1e-6, spread


def test_lora_fair_at_its_defaults_corrects_as_much_whatever_the_size():
    """Descent on a cosine in raw units makes a product of 1e-4 thousands of times too long."""
    weights = np.ones(8, np.float32)
    errors = []
    for size in (1e8, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-8):
        stacked = draw(0, spread=0.5, size=size)
        errors.append(
            [
                float(aggregation.error(stacked, weights, function(stacked, weights)))
                for function in (aggregation.lora_fair, aggregation.fedit)
            ]
        )
    fair, plain = np.array(errors).T
    np.testing.assert_allclose(fair, fair[0], rtol=1e-4)
    assert np.all(fair < 0.98 * plain)


@pytest.mark.parametrize("seed", range(8))
def test_a_noise_threshold_never_loses_the_whole_aggregate(seed):
    """Also where every direction looks like noise."""
    generator = np.random.default_rng(seed)
    stacked = {
        "dense": Factors(
            generator.standard_normal((8, 32, 4)).astype(np.float32),
            generator.standard_normal((8, 4, 48)).astype(np.float32),
        )
    }
    weights = np.ones(8, np.float32)
    kept = aggregation.spectral(stacked, weights, selection="noise")
    assert np.any(np.asarray(kept.adapters["dense"].b))
    assert float(aggregation.error(stacked, weights, kept)) < 1
