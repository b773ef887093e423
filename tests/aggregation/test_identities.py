"""Identities of METHODS section 0, the order of errors, and what the docstrings promise."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax import Factors, aggregation, lowrank
from tests.aggregation import cases, oracles

WEIGHTS = cases.WEIGHTS


def test_what_the_mean_misses_is_the_covariance_and_of_low_rank():
    stacked = cases.clients()
    a, b = (np.asarray(x, np.float64) for x in stacked["block/up"])
    for weights in (WEIGHTS, np.roll(WEIGHTS, 1), np.roll(WEIGHTS, 2), np.ones(3)):
        residual = aggregation.fedex_lora(stacked, weights).residual["block/up"]
        assert residual.rank == (cases.CLIENTS - 1) * cases.RANK
        p = weights / weights.sum()
        mean_a, mean_b = oracles.means(a, b, p)
        want = sum(w * (x - mean_a) @ (y - mean_b) for w, x, y in zip(p, a, b))
        cases.close([residual.a @ residual.b], [want], 1e-5)
    assert aggregation.fedex_lora(cases.clients(count=1), np.ones(1)).residual is None


@pytest.mark.parametrize("seed", range(10))
def test_order_of_errors(seed):
    stacked = cases.clients(seed=seed)

    def error(name, **options):
        aggregated = aggregation.get(name)(stacked, WEIGHTS, **options)
        return np.array(
            list(aggregation.error(stacked, WEIGHTS, aggregated, per_kernel=True).values())
        )

    best, plain = error("flexlora"), error("fedit")
    fair = error("lora_fair", similarity="frobenius", solver="closed_form", regularization=0.0)
    near, gradient = error("flora_na"), error("flora_na", solver="gradient")
    for middle in (fair, near, gradient):
        assert np.all(best <= middle + 1e-5) and np.all(middle <= plain + 1e-6)
    assert np.all(fair < plain) and np.all(near < plain)
    shared = error("flora_na", shared=True)
    sizes = np.array(
        [
            float(lowrank.norm(lowrank.weighted_sum(x, WEIGHTS / WEIGHTS.sum())))
            for _, x in sorted(stacked.items())
        ]
    )
    whole = [np.sum((x * sizes) ** 2) for x in (near, shared, plain)]
    assert whole[0] <= whole[1] * (1 + 1e-5) and whole[1] <= whole[2] * (1 + 1e-6)


def test_the_toy_of_flora_na():
    """It gains when clients' updates differ in size, and comes close to the SVD."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal((64, 4))
    size = np.array([0.2, 1.0, 5.0])[:, None, None]
    a = start + 0.3 * size * rng.standard_normal((3, 64, 4))
    b = size * (rng.standard_normal((4, 48)) + 0.1 * rng.standard_normal((3, 4, 48)))
    stacked = {"dense": Factors(a.astype(np.float32), b.astype(np.float32))}
    errors = {
        name: float(
            aggregation.error(stacked, np.ones(3), aggregation.get(name)(stacked, np.ones(3)))
        )
        for name in ("fedit", "flora_na", "flexlora")
    }
    assert errors["flora_na"] < 0.6 * errors["fedit"]


def test_clients_of_unequal_rank_take_the_first_columns():
    stacked = cases.clients()
    adapters = aggregation.flexlora(stacked, WEIGHTS).adapters
    given = aggregation.cut(adapters, [1, 2, 1])
    for index, rank in enumerate((1, 2, 1)):
        best = oracles.flexlora(*stacked["block/up"], WEIGHTS / WEIGHTS.sum(), rank=rank)
        cases.close([given["block/up"].a[index] @ given["block/up"].b[index]], [best], 1e-5)


def test_factors_of_flexlora_and_fedsvd():
    stacked = cases.clients()
    for name in ("flexlora", "fedsvd"):
        node = aggregation.get(name)(stacked, WEIGHTS).adapters["block/up"]
        np.testing.assert_allclose(node.a.T @ node.a, np.eye(cases.RANK), atol=2e-6)
        gram = np.asarray(node.b @ node.b.T)
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-4)


def test_frozen_factors_come_back_to_the_bit():
    stacked = cases.clients()
    start = cases.extra()
    for name, side, options in (
        ("ffa_lora", "a", {}),
        ("rolora", "a", {"trained": "b"}),
        ("rolora", "b", {"trained": "a"}),
        ("rolora", "b", {"trained": jnp.asarray(False)}),
    ):
        got = aggregation.get(name)(stacked, np.array([0, 1, 1]), **options).adapters
        for key, node in stacked.items():
            assert np.array_equal(getattr(got[key], side), getattr(node, side)[1])
    got = aggregation.ffa_lora(stacked, WEIGHTS, initial=start).adapters
    assert np.array_equal(got["block/up"].a, start["block/up"].a)
    got = aggregation.frlora(stacked, WEIGHTS, initial=start).adapters
    assert np.array_equal(got["block/up"].b, start["block/up"].b)
    own = aggregation.fedsa_lora(stacked, np.array([0, 1, 1])).adapters["block/up"].b
    assert np.array_equal(own, stacked["block/up"].b)


def test_rotation_of_clients_that_differ_by_a_rotation_alone_is_undone():
    rng = np.random.default_rng(1)
    one = cases.extra(rank=3)
    turned = []
    for _ in range(4):
        turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        turn[:, 0] *= np.linalg.det(turn)
        turned.append({k: Factors(x.a @ turn, turn.T @ x.b) for k, x in one.items()})
    stacked, weights = aggregation.stack(turned), np.ones(4)
    for side in "ab":
        got = aggregation.fedrot_lora(stacked, weights, reference=one, aligned=side)
        assert aggregation.error(stacked, weights, got) < 1e-5
    none = aggregation.fedrot_lora(stacked, weights, reference=one, strength=0.0)
    cases.close(
        cases.product(none, weights),
        cases.product(aggregation.fedit(stacked, weights), weights),
        1e-5,
    )


@pytest.mark.parametrize("side", "ba")
def test_directions_that_a_reference_lacks_are_not_rotated(side):
    """Of a reference of deficient rank they are left open: rounding is not to say where they go."""
    rng = np.random.default_rng(0)
    base = cases.extra(rank=3)
    near = jax.tree.map(
        lambda x: np.float32(x + 0.02 * rng.standard_normal((4, *x.shape)) * np.std(x)), base
    )
    reference = {}
    for name, node in base.items():
        u, s, v = np.linalg.svd(getattr(node, side), full_matrices=False)
        reference[name] = node._replace(**{side: s[0] * u[:, :1] @ v[:1]})
    weights = np.ones(4)
    rotated = aggregation.fedrot_lora(near, weights, reference=reference, aligned=side)
    plain = aggregation.error(near, weights, aggregation.fedit(near, weights))
    assert aggregation.error(near, weights, rotated) < 1.2 * plain
    moved = jax.tree.map(lambda x: x * np.float32(1 + 2e-7), near)
    again = aggregation.fedrot_lora(moved, weights, reference=reference, aligned=side)
    cases.close(cases.product(again, weights), cases.product(rotated, weights), 1e-5)


def test_spectral_leaves_random_columns_free_and_keeps_what_the_threshold_says():
    stacked = cases.clients()
    kept = aggregation.spectral(stacked, WEIGHTS, threshold=0.5, rank=4).adapters["block/up"]
    free = np.all(np.asarray(kept.b) == 0, axis=1)
    assert 0 < free.sum() < 4
    norms = np.linalg.norm(kept.a, axis=0)
    assert np.all(norms[free] > 0.3) and np.all(norms[free] < 3)
    other = aggregation.spectral(stacked, WEIGHTS, threshold=0.5, rank=4, key=jax.random.key(5))
    assert not np.allclose(other.adapters["block/up"].a[:, free], kept.a[:, free])


def test_screenot_keeps_the_signal_and_drops_the_noise():
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.standard_normal((97, 2)))[0]
    right = np.linalg.qr(rng.standard_normal((61, 2)))[0].T
    signal = Factors(40 * left, right)
    noise = Factors(rng.standard_normal((97, 38)) * 0.7, rng.standard_normal((38, 61)) * 0.2)
    whole = lowrank.concatenate([jax.tree.map(jnp.asarray, x) for x in (signal, noise)])
    stacked = {"dense": jax.tree.map(lambda x: x[None].astype(jnp.float32), whole)}
    kept = aggregation.spectral(stacked, np.ones(1), selection="noise", rank=10).adapters["dense"]
    assert int(jnp.sum(jnp.any(kept.b != 0, axis=1))) == 2


def test_more_columns_than_a_dimension():
    """K r > min(d_in, d_out), where SVD methods have no exact core to decompose."""
    weights = np.arange(1.0, 8.0, dtype=np.float32)
    stacked = cases.clients(count=7, rank=3)
    p = weights / weights.sum()
    for name, want in (("flexlora", oracles.flexlora), ("fedex_lora", oracles.fedex_lora)):
        got = cases.product(aggregation.get(name)(stacked, weights), weights)
        nodes = [tuple(np.float64(x) for x in stacked[key]) for key in sorted(stacked)]
        cases.close(got, [want(a, b, p) for a, b in nodes], 2e-5)


def test_thousands_of_clients():
    kernels = {"dense": (31, 37)}
    stacked, weights = cases.clients(count=2000, kernels=kernels), np.ones(2000, np.float32)
    best = aggregation.flexlora(stacked, weights)
    a, b = (np.float64(x) for x in stacked["dense"])
    want = np.linalg.norm(
        oracles.ideal(a, b, weights / 2000) - oracles.flexlora(a, b, weights / 2000)
    )
    size = np.linalg.norm(oracles.ideal(a, b, weights / 2000))
    assert aggregation.error(stacked, weights, best) == pytest.approx(want / size, abs=1e-4)
    assert aggregation.error(stacked, weights, aggregation.flora(stacked, weights)) < 1e-6


def test_a_start_from_noise_loses_what_a_start_from_zero_keeps():
    """The published start from noise is there to be reproduced, not to be used."""
    stacked = cases.clients(rank=8, kernels={"dense": (64, 48)})
    stacked = {name: x._replace(b=0.05 * x.b) for name, x in stacked.items()}
    cosines = []
    for start in ("zero", "xavier"):
        fair = aggregation.lora_fair(stacked, WEIGHTS, correction_init=start)
        cosines.append(float(aggregation.diagnostics(stacked, WEIGHTS, fair)[0].cosine))
    assert cosines[0] > 0.9 and cosines[1] < 0.8


def test_error_and_diagnostics():
    stacked = cases.clients()
    aggregated = aggregation.fedit(stacked, WEIGHTS)
    whole, kernels = aggregation.diagnostics(stacked, WEIGHTS, aggregated)
    p = WEIGHTS / WEIGHTS.sum()
    dense = {}
    for name, node in stacked.items():
        a, b = (np.float64(x) for x in node)
        ideal, got = oracles.ideal(a, b, p), oracles.fedit(a, b, p)
        s = np.linalg.svd(ideal, compute_uv=False)[: len(kernels[name].spectrum)]
        np.testing.assert_allclose(kernels[name].spectrum, s, atol=1e-5 * s[0])
        shares = s / s.sum()
        rank = np.exp(-np.sum(shares * np.log(np.maximum(shares, 1e-30))))
        assert kernels[name].effective_rank == pytest.approx(rank, rel=1e-4)
        dropped = np.linalg.norm(ideal - oracles.best(ideal, a.shape[2])) / np.linalg.norm(ideal)
        assert kernels[name].dropped == pytest.approx(dropped, rel=1e-4)
        assert kernels[name].cosine == pytest.approx(
            np.sum(ideal * got) / np.linalg.norm(ideal) / np.linalg.norm(got), abs=1e-5
        )
        mean_a = oracles.means(a, b, p)[0]
        drift = np.sqrt(np.tensordot(p, np.sum((a - mean_a) ** 2, (1, 2)), 1))
        assert kernels[name].drift_a == pytest.approx(drift / np.linalg.norm(mean_a), rel=1e-4)
        assert kernels[name].cosine_b == pytest.approx(1, abs=1e-5)
        dense[name] = ideal, got
    error = np.sqrt(
        sum(np.sum((x - y) ** 2) for x, y in dense.values())
        / sum(np.sum(x**2) for x, _ in dense.values())
    )
    assert whole.error == pytest.approx(error, rel=1e-5)
    assert aggregation.error(stacked, WEIGHTS, aggregated) == pytest.approx(error, rel=1e-5)
    per_kernel = aggregation.error(stacked, WEIGHTS, aggregated, per_kernel=True)
    assert set(per_kernel) == set(stacked)
    assert whole.spectrum is None and whole.effective_rank > 1
    best = aggregation.flexlora(stacked, WEIGHTS)
    assert aggregation.error(stacked, WEIGHTS, best) == pytest.approx(
        float(whole.dropped), rel=1e-4
    )
    every, _ = aggregation.diagnostics(stacked, WEIGHTS, rank=1000)
    assert every.dropped == 0 < whole.dropped < 1
    plain, _ = aggregation.diagnostics(stacked, WEIGHTS)
    assert plain.error is None and plain.cosine is None


def test_tail_penalty():
    node = cases.extra(rank=4)["block/up"]
    want = np.linalg.norm(node.a[:, 2:]) * np.linalg.norm(node.b[2:])
    assert aggregation.tail_penalty({"x": node}, 3, decay=0.99) == pytest.approx(want, rel=1e-5)


def test_imports_nothing_but_jax_and_chex():
    code = (
        "import sys, fedlora_jax.aggregation, fedlora_jax.lowrank\n"
        "bad = {'flax', 'optax', 'tensorflow', 'orbax', 'scipy.stats', 'sklearn', 'torch',"
        " 'pandas', 'matplotlib', 'tensorflow_datasets', 'ml_collections'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
