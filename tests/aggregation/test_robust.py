"""Robust rules against float64 NumPy on dense products, and what they must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedlora_jax import Factors, aggregation
from tests.aggregation import cases
from tests.aggregation.test_never_dense import KERNELS, assert_never_dense

COUNT, SCALE, BYZANTINE = 11, 1.5, 0.2
FAR = [2, 7]


def federation(seed=0, far=1e3):
    """Clients near each other, two of them far away; a head; where they started from; weights."""
    rng = np.random.default_rng(seed)
    start = {"adapters": cases.extra(seed + 50), "head": rng.normal(size=(5,)).astype(np.float32)}

    def moved(x):
        change = 0.3 * (rng.standard_normal(x.shape) + 0.5 * rng.standard_normal((COUNT, *x.shape)))
        change[FAR] *= far
        return (x + change).astype(np.float32)

    return jax.tree.map(moved, start), start, rng.uniform(0.5, 2, COUNT)


def vectors(clients, start, scale=SCALE):
    """Each client's change of the whole model as one vector, float64."""
    rows = []
    for name, node in clients["adapters"].items():
        first = start["adapters"][name]
        (a, b), (a0, b0) = (map(np.float64, x) for x in (node, first))
        rows.append(scale * (a @ b - a0 @ b0).reshape(len(a), -1))
    rows.append(np.float64(clients["head"]) - np.float64(start["head"]))
    return np.concatenate(rows, axis=1)


@jax.jit
def compiled(clients, start, weights):
    """All that follows from the matrix, as a program in which weights are not known."""
    gram = aggregation.gram(clients, weights, reference=start, scale=SCALE)
    return {
        "gram": gram,
        "scales": aggregation.clip_scales(gram, weights),
        "krum": aggregation.krum_weights(gram, weights, byzantine=BYZANTINE),
        "multi_krum": aggregation.krum_weights(gram, weights, byzantine=BYZANTINE, multi=True),
        "geometric_median": aggregation.geometric_median_weights(gram, weights),
        "median": aggregation.coordinate_median(clients, weights),
        "trimmed": aggregation.coordinate_trimmed_mean(clients, weights, byzantine=BYZANTINE),
    }


def of(name, clients, start, weights):
    return compiled(clients, start, jnp.float32(weights))[name]


def krum(x, f):
    """Places by score, the best first."""
    distances = np.sort(((x[:, None] - x) ** 2).sum(-1), axis=1)[:, 1:]
    return np.argsort(distances[:, : len(x) - f - 2].sum(1), kind="stable")


def geometric_median(x, p):
    v = np.median(x, axis=0)
    for _ in range(20000):
        beta = p / np.maximum(np.linalg.norm(x - v, axis=1), 1e-12)
        before, v = v, beta @ x / beta.sum()
        if np.linalg.norm(v - before) < 1e-13 * np.linalg.norm(v):
            break
    return v


@pytest.mark.parametrize("far", [1.0, 1e3])
def test_gram_is_that_of_dense_products(far):
    clients, start, weights = federation(far=far)
    x = vectors(clients, start)
    sizes = np.linalg.norm(x, axis=1)
    error = np.abs(of("gram", clients, start, weights) - x @ x.T) / np.outer(sizes, sizes)
    assert error.max() < 3e-6


def test_gram_outside_of_jit_and_without_reference():
    clients, start, weights = federation()
    zero = jax.tree.map(np.zeros_like, start)
    one = aggregation.gram(clients, weights, scale=SCALE)
    two = aggregation.gram(clients, weights, reference=zero, scale=SCALE)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    x = vectors(clients, zero)
    np.testing.assert_allclose(np.diagonal(one), (x**2).sum(1), rtol=1e-5)


def test_small_changes_of_large_products_keep_their_digits():
    clients, start, weights = federation(far=1.0)
    move = lambda x, s: (1e3 * s + (x - s)).astype(np.float32)  # noqa: E731
    start_far = jax.tree.map(lambda s: (1e3 * s).astype(np.float32), start)
    clients = {
        # Of `b` alone, so that the change of the product is 1e-3 of it.
        "adapters": {
            name: Factors(
                np.repeat(start_far["adapters"][name].a[None], COUNT, 0), move(b, first.b)
            )
            for (name, (_, b)), first in zip(
                clients["adapters"].items(), start["adapters"].values(), strict=True
            )
        },
        "head": move(clients["head"], start["head"]),
    }
    x = vectors(clients, start_far)
    np.testing.assert_allclose(
        np.diagonal(of("gram", clients, start_far, weights)), (x**2).sum(1), rtol=1e-5
    )


def test_factors_in_another_basis_are_the_same_client():
    clients, start, weights = federation()
    turn = np.linalg.qr(np.random.default_rng(4).normal(size=(COUNT, 2, 2)))[0]
    turned = {
        name: Factors((a @ turn).astype(np.float32), (turn.swapaxes(1, 2) @ b).astype(np.float32))
        for name, (a, b) in clients["adapters"].items()
    }
    one, two = (
        of("gram", tree, start, weights) for tree in (clients, {**clients, "adapters": turned})
    )
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4 * np.abs(one).max())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("absent", [[], [0, 4]])
def test_rules_are_those_of_the_papers(seed, absent):
    clients, start, weights = federation(seed)
    weights[absent] = 0
    here = np.flatnonzero(weights)
    x = vectors(clients, start)[here]
    f = int(np.ceil(BYZANTINE * len(here)))
    got = compiled(clients, start, jnp.float32(weights))
    order = krum(x, f)
    assert np.flatnonzero(got["krum"]).tolist() == [here[order[0]]]
    chosen = here[np.sort(order[: len(here) - f - 2])]
    wanted = np.zeros(COUNT)
    wanted[chosen] = weights[chosen] / weights[chosen].sum()
    np.testing.assert_allclose(got["multi_krum"], wanted, rtol=1e-5)
    norms = np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(
        np.asarray(got["scales"])[here], np.minimum(1, np.median(norms) / norms), rtol=1e-5
    )
    p = weights[here] / weights.sum()
    v = geometric_median(x, p)
    beta = np.float64(got["geometric_median"])
    assert abs(beta.sum() - 1) < 1e-5 and not beta[absent].any()
    spread = np.median(np.linalg.norm(x - v, axis=1))
    assert np.linalg.norm(beta[here] @ x - v) < 1e-2 * spread

    def check(rows, median, trimmed):
        rows = np.float64(rows)[here]
        np.testing.assert_allclose(median, np.median(rows, axis=0), rtol=1e-5, atol=1e-6)
        mean = stats.trim_mean(rows, f / len(here) + 1e-9, axis=0)
        np.testing.assert_allclose(trimmed, mean, rtol=1e-4, atol=1e-5)

    jax.tree.map(check, clients, got["median"], got["trimmed"])


def test_neither_the_order_of_clients_nor_who_is_absent_matters():
    clients, start, weights = federation()
    weights[3] = 0
    plain = compiled(clients, start, jnp.float32(weights))
    order = np.random.default_rng(1).permutation(COUNT)
    shuffled = jax.tree.map(lambda x: x[order], clients)
    other = compiled(shuffled, start, jnp.float32(weights[order]))
    for name in ("scales", "krum", "multi_krum", "geometric_median"):
        np.testing.assert_allclose(other[name], plain[name][order], rtol=2e-3, atol=1e-6)
    for name in ("median", "trimmed"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            other[name],
            plain[name],
        )

    def with_third(x, value):
        x = x.copy()
        x[3] = value
        return x

    for value in (1e20, np.nan):
        changed = jax.tree.map(lambda x, v=value: with_third(x, v), clients)
        again = compiled(changed, start, jnp.float32(weights))
        jax.tree.map(np.testing.assert_array_equal, again, plain)


@pytest.mark.parametrize("value", [1e20, np.nan])
def test_a_client_too_large_or_not_finite_counts_as_absent(value):
    clients, start, weights = federation()
    sick = jax.tree.map(
        lambda x: np.where(
            np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) == 3, np.float32(value), x
        ),
        clients,
    )
    got = compiled(sick, start, jnp.float32(weights))
    gone = weights.copy()
    gone[3] = 0
    wanted = compiled(clients, start, jnp.float32(gone))
    assert np.isinf(got["gram"][3, 3])
    for name in ("scales", "krum", "multi_krum", "geometric_median"):
        np.testing.assert_array_equal(got[name], wanted[name])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((got["median"], got["trimmed"])))


def test_clients_that_agree_count_what_they_weigh():
    clients, start, weights = federation(far=1.0)
    same = jax.tree.map(lambda x: np.repeat(x[:1], COUNT, 0), clients)
    got = compiled(same, start, jnp.float32(weights))
    np.testing.assert_allclose(got["geometric_median"], weights / weights.sum(), rtol=1e-4)
    np.testing.assert_allclose(got["scales"], 1, rtol=1e-5)


def test_a_client_alone_is_the_geometric_median():
    clients, start, weights = federation()
    weights[np.arange(COUNT) != 4] = 0
    beta = of("geometric_median", clients, start, weights)
    np.testing.assert_array_equal(beta, weights > 0)


def test_weights_of_the_geometric_median_are_finite_and_so_are_their_gradients():
    """Of one client, and of two whose distance cannot be squared, though their changes can."""

    @jax.jit
    def first(gram, weights):
        return jax.value_and_grad(lambda x: aggregation.geometric_median_weights(x, weights)[0])(
            gram
        )

    for size, weights, share in ((2.0, [1.0, 0.0], 1.0), (3e38, [1.0, 1.0], 0.5)):
        beta, slope = first(size * jnp.array([[1.0, -1.0], [-1.0, 1.0]]), jnp.array(weights))
        assert beta == pytest.approx(share) and np.isfinite(slope).all()


def test_nothing_of_the_size_of_a_kernel():
    clients, start = cases.clients(count=5, kernels=KERNELS), cases.extra(kernels=KERNELS)

    def all_of_it(clients, start, weights):
        gram = aggregation.gram(clients, weights, reference=start)
        return aggregation.geometric_median_weights(gram, weights), gram

    assert_never_dense(all_of_it, clients, start, np.ones(5, np.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, w: aggregation.krum_weights(g, w, byzantine=0.5), "robust: byzantine must be"),
        (
            lambda g, w: aggregation.krum_weights(g[:4, :4], w[:4], byzantine=0.2),
            "krum needs at least 2 f . 3 = 5 clients a round .* there are 4",
        ),
        (lambda g, w: aggregation.clip_scales(g, w, norm=0.0), "robust: norm must be above 0"),
        (
            lambda g, w: aggregation.coordinate_median({"x": np.ones((3, 2))}, w),
            r"expected arrays \[K=11, ...\] for 11 weights, got one of shape \[3, 2\]",
        ),
        (lambda g, w: aggregation.gram(cases.clients(), w), "for 11 weights"),
        (
            lambda g, w: aggregation.gram(cases.clients(), w[:3], reference={"x": np.ones(2)}),
            "differ in structure",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.eye(COUNT), np.ones(COUNT))
