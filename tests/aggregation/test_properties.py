"""One property suite over every registered function and variant; `cases.CASES` drives it.

Compiling takes the time here: checks outside jit share the programs of one tree, those that need
programs of their own use the tree of one kernel, and oracles stand in for further shapes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax import Factors, aggregation, lowrank
from fedlora_jax.aggregation import _base
from tests.aggregation import cases

every = pytest.mark.parametrize("pair", cases.ALL, ids=cases.label)
WEIGHTS = cases.WEIGHTS
ONE = {"block/up": cases.KERNELS["block/up"]}
EXTREMES = (1e-45, 1e-38, 1e-20, 100.0, 1e20, 1e38)


@functools.cache
def jitted(pair):
    return jax.jit(cases.bound(pair, ONE))


def unlike_elsewhere(pair):
    """ScreeNOT looks at the number of singular values, so absence and padding do change it."""
    if case_of(pair).options.get("selection") == "noise":
        pytest.skip("the number of singular values is an input of ScreeNOT")


def case_of(pair) -> cases.Case:
    return cases.CASES[pair[0]][pair[1]]


def clients_of(pair, **options):
    return cases.prepared(case_of(pair), cases.clients(**options))


def products(pair, stacked, weights=WEIGHTS):
    return cases.product(cases.bound(pair)(stacked, weights), weights)


def test_every_function_has_a_case():
    assert set(cases.CASES) == set(aggregation.REGISTRY)


@every
def test_agrees_with_its_oracle(pair):
    stacked = clients_of(pair)
    want = cases.expected(pair, stacked, WEIGHTS)
    cases.close(products(pair, stacked), want, case_of(pair).tolerance)


@every
def test_exact_methods_are_exact_and_no_other_claims_to_be(pair):
    stacked = clients_of(pair)
    error = float(aggregation.error(stacked, WEIGHTS, cases.bound(pair)(stacked, WEIGHTS)))
    assert (error < 1e-6) if case_of(pair).exact else (error > 1e-4)


@every
def test_numpy_and_jax_input_agree(pair):
    stacked = clients_of(pair)
    cases.close(products(pair, jax.tree.map(jnp.asarray, stacked)), products(pair, stacked), 1e-12)


@every
def test_order_of_clients_does_not_matter(pair):
    stacked, order = clients_of(pair), np.array([2, 0, 1])
    shuffled = jax.tree.map(lambda x: x[order], stacked)
    aggregated = cases.bound(pair)(shuffled, WEIGHTS[order])
    got = cases.product(aggregated, WEIGHTS[order])
    cases.close(got, products(pair, stacked), max(5e-5, case_of(pair).tolerance))


INTEGERS = np.array([1, 3, 2])
SCALED_WEIGHTS = {
    **{f"float32 {c:g}": INTEGERS.astype(np.float32) * np.float32(c) for c in EXTREMES},
    **{f"jax float32 {c:g}": jnp.asarray(INTEGERS, jnp.float32) * c for c in (1e-37, 1e38)},
    **{f"floats {c:g}": [c * float(x) for x in INTEGERS] for c in (1e-300, 1e-45, 1e45, 1e300)},
    **{f"integers {c}": [c * int(x) for x in INTEGERS] for c in (1, 10**9, 10**18, 10**30)},
    "int64": INTEGERS.astype(np.int64) * 10**18,
    "uint64": INTEGERS.astype(np.uint64) * np.uint64(6 * 10**18),
    "int32, whose sum is none": jnp.asarray(INTEGERS * 700_000_000, jnp.int32),
    "float16, whose sum is none": jnp.asarray(INTEGERS * 20_000, jnp.float16),
    "a list of scalars": [jnp.float32(1), np.int64(3), 2.0],
}


def rounding(pair) -> float:
    """What a last digit of a weight may change; Adam's first steps are signs, which enlarge it."""
    return 1e-3 if case_of(pair).options.get("solver") == "gradient" else 1e-6


@every
def test_neither_scale_nor_type_of_weights_matters(pair):
    stacked = clients_of(pair)
    want = products(pair, stacked)
    sizes = _base._run_batch._cache_size()
    for name, weights in SCALED_WEIGHTS.items():
        got = cases.product(cases.bound(pair)(stacked, weights), WEIGHTS)
        assert cases.close(got, want, rounding(pair)), name
    assert _base._run_batch._cache_size() == sizes


def test_neither_scale_nor_type_of_weights_matters_to_what_is_measured():
    stacked = cases.clients()
    aggregated = aggregation.fedit(stacked, WEIGHTS)
    measured = lambda w: (  # noqa: E731
        aggregation.error(stacked, w, aggregated),
        aggregation.diagnostics(stacked, w, aggregated),
    )
    want = measured(WEIGHTS)
    for weights in SCALED_WEIGHTS.values():
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), measured(weights), want
        )
        present, finite = aggregation.present_clients(stacked, weights)
        assert np.all(present) and np.all(finite)


def test_a_client_of_a_weight_that_float32_does_not_have_is_present_all_the_same():
    """HetLoRA asks who is there, not with what weight."""
    stacked = cases.clients()
    for weights in ([1e-300, 1.0, 1e300], np.array([1e-45, 1.0, 3e38], np.float32)):
        got = cases.product(aggregation.hetlora(stacked, weights), WEIGHTS)
        cases.close(got, cases.product(aggregation.hetlora(stacked, np.ones(3)), WEIGHTS), 1e-6)


@every
@pytest.mark.parametrize("held", [0.0, 1.0, np.nan, np.inf], ids=["zero", "other", "nan", "inf"])
def test_weight_zero_is_absence(pair, held):
    """Whatever the absent client holds, and by whatever way it is called."""
    unlike_elsewhere(pair)
    case = case_of(pair)
    stacked = clients_of(pair)
    weights = np.array([1.0, 0.0, 2.0], np.float32)

    def disturb(x):
        x = x.copy()
        x[1] = x[1] if held == 1 else held
        return x

    disturbed = jax.tree.map(disturb, stacked)
    aggregated = cases.bound(pair)(disturbed, weights)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(aggregated))
    want = cases.expected(pair, jax.tree.map(lambda x: x[[0, 2]], stacked), weights[[0, 2]])
    if not np.isfinite(held) and pair[0] == "fedsa_lora":  # that client's own is gone
        assert not np.any(aggregated.adapters["block/up"].b[1])
    cases.close(cases.product(aggregated, weights), want, 2 * case.tolerance)


def holding(stacked, place, size):
    """With numbers of that size for the client in that place."""

    def disturb(x):
        x = x.copy()
        x[place] = size * np.sign(x[place])
        return x

    return jax.tree.map(disturb, stacked)


ABSENT = [(place, np.where(np.arange(3) == place, 0, WEIGHTS)) for place in range(3)]


@every
def test_an_absent_client_may_hold_large_numbers_in_any_place(pair):
    stacked = clients_of(pair)
    for place, weights in ABSENT:
        want = products(pair, holding(stacked, place, 0), weights)
        for size in (1e6, 1e20, 1e38):
            disturbed = holding(stacked, place, size)
            aggregated = cases.bound(pair)(disturbed, weights)
            cases.close(cases.product(aggregated, weights), want, 1e-6)
            if pair[0] == "fedsa_lora":
                own = aggregated.adapters["block/up"].b[place]
                np.testing.assert_array_equal(own, disturbed["block/up"].b[place])


def test_nor_does_it_change_what_is_measured():
    stacked = cases.clients()
    for place, weights in ABSENT:

        def measured(size, place=place, weights=weights):
            disturbed = holding(stacked, place, size)
            mean = aggregation.fedit(holding(stacked, place, 0), weights)
            return (
                aggregation.error(disturbed, weights, mean),
                aggregation.diagnostics(disturbed, weights, mean),
                aggregation.gram(disturbed, weights),
            )

        for size in (1e6, 1e20, 1e38):
            jax.tree.map(np.testing.assert_array_equal, measured(size), measured(0))


@every
def test_a_single_client_keeps_its_product(pair):
    case = case_of(pair)
    stacked = clients_of(pair, count=1, kernels=ONE)
    weights = np.array([0.3], np.float32)
    got = cases.product(cases.bound(pair, ONE)(stacked, weights), weights)
    assert all(np.all(np.isfinite(x)) for x in got)
    if case.reproduces:
        nodes = jax.tree.leaves(stacked, is_leaf=lowrank.is_factors)
        cases.close(got, [x.a[0] @ x.b[0] for x in nodes], 1e-4)


@every
def test_identical_clients_keep_their_product(pair):
    case = case_of(pair)
    stacked = clients_of(pair)
    same = jax.tree.map(lambda x: np.repeat(x[:1], cases.CLIENTS, axis=0), stacked)
    got = products(pair, same)
    assert all(np.all(np.isfinite(x)) for x in got)
    if case.reproduces:
        nodes = jax.tree.leaves(same, is_leaf=lowrank.is_factors)
        cases.close(got, [x.a[0] @ x.b[0] for x in nodes], 1e-4)


@every
def test_padding_by_zero_ranks_changes_nothing(pair):
    unlike_elsewhere(pair)
    case = case_of(pair)
    stacked = clients_of(pair, kernels=ONE)
    padded = {name: lowrank.pad(Factors(*x), cases.RANK + 1) for name, x in stacked.items()}
    changed = {}
    if pair[0] in ("flexlora", "spectral") and "rank" not in case.options:
        changed = {"rank": cases.RANK}
    got = cases.product(cases.bound(pair, ONE, **changed)(padded, WEIGHTS), WEIGHTS)
    cases.close(got, cases.expected(pair, stacked, WEIGHTS), 2 * case.tolerance)


@every
def test_jit_agrees_and_there_a_sick_client_is_absent(pair):
    function = jitted(pair)
    stacked = clients_of(pair, kernels=ONE)
    tolerance = case_of(pair).tolerance
    got = cases.product(function(stacked, WEIGHTS), WEIGHTS)
    cases.close(got, cases.expected(pair, stacked, WEIGHTS), 2 * tolerance)
    for scale in (2e-38, 1e-30, 1e30, 1e38):
        scaled = function(stacked, WEIGHTS * np.float32(scale))
        cases.close(cases.product(scaled, WEIGHTS), got, rounding(pair))
    unlike_elsewhere(pair)
    without = WEIGHTS * np.array([1, 0, 1], np.float32)
    want = cases.expected(pair, jax.tree.map(lambda x: x[[0, 2]], stacked), WEIGHTS[[0, 2]])
    for side in "ab":
        sick = jax.tree.map(lambda x: x.copy(), stacked)
        getattr(sick["block/up"], side)[1, 0, 1] = np.nan
        got = function(sick, WEIGHTS)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))
        cases.close(cases.product(got, without), want, 2 * tolerance)
    for place, weights in ABSENT:
        zeros = cases.product(function(holding(stacked, place, 0), weights), weights)
        for size in (1e6, 1e38):
            got = function(holding(stacked, place, size), weights)
            cases.close(cases.product(got, weights), zeros, 1e-6)
    nan_weight = np.array([1, np.nan, 2], np.float32)
    cases.close(cases.product(function(stacked, nan_weight), without), want, 2 * tolerance)
    nobody = function(stacked, np.full(3, np.nan, np.float32))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(nobody))


@every
def test_vmap_agrees_with_a_loop(pair):
    stacked = [clients_of(pair, seed=seed, kernels=ONE) for seed in (0, 1)]
    weights = np.stack([WEIGHTS, WEIGHTS[::-1]])
    together = jax.tree.map(lambda *x: np.stack(x), *stacked)
    got = jax.jit(jax.vmap(cases.bound(pair, ONE)))(together, weights)
    for index in range(2):
        here = jax.tree.map(lambda x, i=index: x[i], got)
        one = cases.product(here, weights[index])
        want = cases.expected(pair, stacked[index], weights[index])
        cases.close(one, want, 2 * case_of(pair).tolerance)


def loss_of(pair, shape_weights):
    """A smooth function of the new products of every kernel."""
    function = cases.bound(pair, ONE)

    def loss(stacked, weights):
        aggregated = function(stacked, weights)
        total = 0.0
        for part in aggregated:
            if part is None:
                continue
            for node, matrix in zip(_base.leaves(part), shape_weights):
                a, b = node
                b = b[0] if b.ndim == 3 else b
                total += jnp.sum(jnp.asarray(matrix) * lowrank.matmul(a, b))
        return total

    return loss


@every
def test_gradient_is_finite_and_right(pair):
    rng = np.random.default_rng(3)
    stacked = jax.tree.map(jnp.asarray, clients_of(pair, kernels=ONE))
    matrices = [rng.standard_normal(shape) for shape in ONE.values()]
    gradient = jax.jit(jax.grad(loss_of(pair, matrices)))
    slope = gradient(stacked, WEIGHTS)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(slope))
    zero = jax.tree.map(jnp.zeros_like, stacked)
    same = jax.tree.map(lambda x: jnp.repeat(x[:1], cases.CLIENTS, axis=0), stacked)
    for hard in (zero, same):
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient(hard, WEIGHTS)))
    if not case_of(pair).smooth or case_of(pair).frozen:
        return
    direction = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), stacked)

    def value(step):
        moved = jax.tree.map(lambda x, d: np.asarray(x + step * d), stacked, direction)
        matrices_at = cases.expected(pair, moved, WEIGHTS)
        if pair[0] == "fedsa_lora":
            nodes = _base.leaves(moved)
            p = WEIGHTS / WEIGHTS.sum()
            matrices_at = [np.tensordot(p, x.a, 1) @ x.b[0] for x in nodes]
        return sum(np.sum(m * x) for m, x in zip(matrices, matrices_at))

    got = sum(np.sum(s * d) for s, d in zip(*map(jax.tree.leaves, (slope, direction))))
    want = (value(1e-3) - value(-1e-3)) / 2e-3
    assert got == pytest.approx(want, rel=2e-2, abs=2e-2)


@every
def test_nothing_is_compiled_again_when_weights_or_values_change(pair):
    function = cases.bound(pair)
    function(clients_of(pair), WEIGHTS)
    before = _base._run_batch._cache_size()
    function(clients_of(pair, seed=1), WEIGHTS[::-1])
    function(clients_of(pair, seed=2), np.array([1, 0, 1], np.float32))
    assert _base._run_batch._cache_size() == before


@every
def test_bfloat16_storage(pair):
    """Storage is bfloat16 on both sides; arithmetic is as good as on the rounded input."""
    stacked = clients_of(pair, kernels=ONE)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), stacked)
    aggregated = cases.bound(pair, ONE)(half, WEIGHTS)
    for part in aggregated:
        assert part is None or {x.dtype for x in jax.tree.leaves(part)} == {jnp.bfloat16.dtype}
    rounded = jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), half)
    want = cases.expected(pair, rounded, WEIGHTS)
    terms = [_base.leaves(part)[0] for part in aggregated if part]
    scale = max(float(jnp.linalg.norm(x.a) * jnp.linalg.norm(x.b)) for x in terms)
    distance = np.linalg.norm(cases.product(aggregated, WEIGHTS)[0] - want[0])
    assert distance <= 2**-7 * scale + case_of(pair).tolerance * np.linalg.norm(want[0])


@every
def test_degenerate_clients_give_finite_results(pair):
    stacked = clients_of(pair)
    first_round = {name: x._replace(b=np.zeros_like(x.b)) for name, x in stacked.items()}
    nothing = jax.tree.map(np.zeros_like, stacked)
    deficient = jax.tree.map(lambda x: x.copy(), stacked)
    for x in deficient.values():
        x.a[:, :, 1] = x.a[:, :, 0]
        x.b[2] = 0
    tiny = {name: x._replace(b=1e-12 * x.b) for name, x in stacked.items()}
    for hard in (first_round, nothing, deficient, tiny):
        got = cases.bound(pair)(hard, WEIGHTS)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))
        error = aggregation.error(hard, WEIGHTS, got)
        assert np.isfinite(error)


@every
def test_a_product_that_is_zero_leaves_something_to_train(pair):
    """Factors that are both zero have no gradient: training from there would stand still."""
    case = case_of(pair)
    stacked = clients_of(pair)
    start = {name: x._replace(b=np.zeros_like(x.b)) for name, x in stacked.items()}
    adapters = cases.bound(pair)(start, WEIGHTS).adapters
    if adapters is None or case.options.get("correct") == "a":
        return
    for node in _base.leaves(adapters):
        alive = np.any(np.asarray(node.a) != 0, axis=-2) | np.any(np.asarray(node.b) != 0, axis=-1)
        assert np.all(alive)
