"""Random clients of awkward kinds: results stay finite, and what is exact stays exact.

Shapes come from few buckets, so that compiled programs are shared; values, weights, spectra and
defects are drawn freely.
"""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_jax import Factors, aggregation, lowrank
from tests.aggregation import oracles

SHAPES = [(1, 7, 5, 1), (3, 11, 13, 2), (5, 13, 11, 4)]  # K, d_in, d_out, r
DEFECTS = ("none", "zero b", "zero client", "same", "deficient", "graded", "shared start", "nan")
CHEAP = ["fedit", "ffa_lora", "rolora", "fedsa_lora", "flora", "fedex_lora", "hetlora"]
DEAR = ["flexlora", "fedsvd", "spectral", "flora_na"]
FAIR = {"similarity": "frobenius", "solver": "closed_form"}


@st.composite
def federations(draw):
    count, d_in, d_out, rank = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    a = rng.standard_normal((count, d_in, rank))
    b = rng.standard_normal((count, rank, d_out))
    weights = rng.exponential(size=count) * (rng.random(count) > 0.3)
    defect = draw(st.sampled_from(DEFECTS))
    if defect == "zero b":
        b[:] = 0
    elif defect == "zero client":
        a[-1], b[-1] = 0, 0
    elif defect == "same":
        a[:], b[:] = a[0], b[0]
    elif defect == "deficient":
        a[..., -1] = a[..., 0]
    elif defect == "graded":
        b *= 10.0 ** -rng.integers(0, 8, (count, rank, 1))
        a *= 10.0 ** rng.integers(-3, 3, (count, 1, rank))
    elif defect == "shared start":
        a = a[:1] + 1e-5 * a
    elif defect == "nan":
        a[-1, 0, 0] = np.nan
        weights[-1] = 0
    if not weights.any():
        weights[0], a[0] = 1, np.nan_to_num(a[0])
    size = 10.0 ** draw(st.integers(-6, 4))
    return {"dense": Factors(a.astype(np.float32), (size * b).astype(np.float32))}, weights


def check_one(name, stacked, weights, **options):
    aggregated = aggregation.get(name)(stacked, weights, **options)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(aggregated))
    error = float(aggregation.error(stacked, weights, aggregated))
    assert np.isfinite(error)
    return error


@settings(max_examples=40, deadline=None, derandomize=True)
@given(federations())
def test_results_are_finite_and_exact_ones_exact(federation):
    stacked, weights = federation
    weights = weights.astype(np.float32)
    errors = {name: check_one(name, stacked, weights) for name in CHEAP}
    errors["fair"] = check_one("lora_fair", stacked, weights, **FAIR)
    assert errors["flora"] < 2e-6
    a, b = (np.nan_to_num(x.astype(np.float64)) for x in stacked["dense"])
    p = weights / weights.sum(dtype=np.float64)
    # Rounding is relative to the terms of a sum, and these may cancel.
    terms = sum(w * np.linalg.norm(x) * np.linalg.norm(y) for w, x, y in zip(p, a, b))
    size = max(np.linalg.norm(oracles.ideal(a, b, p)), 1e-30)
    assert errors["fedex_lora"] < 2e-5 * max(1, terms / size) * 10


@settings(max_examples=15, deadline=None, derandomize=True)
@given(federations())
def test_decompositions_are_finite_and_near_the_optimum(federation):
    stacked, weights = federation
    weights = weights.astype(np.float32)
    errors = {name: check_one(name, stacked, weights) for name in DEAR}
    a, b = (np.nan_to_num(x.astype(np.float64)) for x in stacked["dense"])
    p = weights / weights.sum(dtype=np.float64)
    ideal = oracles.ideal(a, b, p)
    size = np.linalg.norm(ideal)
    if size < 1e-20:
        return
    optimum = np.linalg.norm(ideal - oracles.best(ideal, a.shape[2])) / size
    terms = sum(w * np.linalg.norm(x) * np.linalg.norm(y) for w, x, y in zip(p, a, b)) / size
    assert optimum - 1e-5 * terms <= errors["flexlora"] <= optimum * (1 + 1e-4) + 1e-5 * terms
    plain = check_one("fedit", stacked, weights)
    assert errors["flora_na"] <= plain * (1 + 1e-4) + 1e-5 * terms


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(0, 12), st.sampled_from([1.0, 1e3]))
def test_truncation_of_any_spectrum(seed, decades, mixing):
    rng = np.random.default_rng(seed)
    values = np.sort(10.0 ** -(decades * rng.random(12)))[::-1]
    u = np.linalg.qr(rng.standard_normal((31, 12)))[0]
    v = np.linalg.qr(rng.standard_normal((23, 12)))[0].T
    turn = np.linalg.qr(rng.standard_normal((12, 12)))[0] * mixing ** rng.uniform(-1, 1, 12)
    a = (u * np.sqrt(values)) @ turn
    b = np.linalg.inv(turn) @ (np.sqrt(values)[:, None] * v)
    factors = Factors(a.astype(np.float32), b.astype(np.float32))
    matrix = factors.a.astype(np.float64) @ factors.b.astype(np.float64)
    best = oracles.best(matrix, 4)
    got = lowrank.truncate(factors, 4)
    got = np.float64(got.a) @ np.float64(got.b)
    size = np.linalg.norm(matrix)
    excess = np.linalg.norm(matrix - got) - np.linalg.norm(matrix - best)
    assert excess < 5e-6 * size + 1e-4 * np.linalg.norm(matrix - best)
