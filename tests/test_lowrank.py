"""The algebra of factored matrices against dense float64, and what it must never form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax import Factors, lowrank


def draw(seed=0, d_in=37, d_out=29, rank=6):
    rng = np.random.default_rng(seed)
    return Factors(
        rng.standard_normal((d_in, rank)).astype(np.float32),
        rng.standard_normal((rank, d_out)).astype(np.float32),
    )


def dense(factors):
    return np.asarray(factors.a, np.float64) @ np.asarray(factors.b, np.float64)


def best(matrix, rank):
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def test_the_small_functions():
    x, y = draw(0), draw(1, rank=2)
    size = np.linalg.norm(dense(x))
    np.testing.assert_allclose(dense(lowrank.transpose(x)), dense(x).T, atol=1e-5)
    np.testing.assert_allclose(dense(lowrank.scaled(x, -2.0)), -2 * dense(x), atol=1e-4)
    np.testing.assert_allclose(dense(lowrank.pad(y, 5)), dense(y), atol=1e-5)
    np.testing.assert_allclose(
        dense(lowrank.concatenate([x, y])), dense(x) + dense(y), atol=1e-5 * size
    )
    np.testing.assert_allclose(dense(lowrank.subtract(x, y)), dense(x) - dense(y), atol=1e-4)
    assert lowrank.inner(x, y) == pytest.approx(np.sum(dense(x) * dense(y)), rel=1e-4)
    assert lowrank.norm(x) == pytest.approx(size, rel=1e-6)
    with pytest.raises(ValueError, match="rank 6 to the smaller rank 2"):
        lowrank.pad(x, 2)
    cut = lowrank.cut(x, jnp.array([1, 4]))
    for index, rank in enumerate((1, 4)):
        want = dense(Factors(x.a[:, :rank], x.b[:rank]))
        np.testing.assert_allclose(
            dense(jax.tree.map(lambda z, i=index: z[i], cut)), want, atol=1e-5
        )


@pytest.mark.parametrize("rank", [6, 29, 40, 80])
def test_norm_of_any_rank_and_of_a_difference(rank):
    x = draw(rank=rank)
    nearly = Factors(x.a, (x.b * (1 + 1e-4)).astype(np.float32))
    assert lowrank.norm(x) == pytest.approx(np.linalg.norm(dense(x)), rel=1e-5)
    want = np.linalg.norm(dense(x) - dense(nearly))
    assert lowrank.norm(lowrank.subtract(x, nearly)) == pytest.approx(want, rel=2e-2)
    assert lowrank.norm(lowrank.subtract(x, x)) <= 1e-6 * lowrank.norm(x)


def test_the_gradient_of_the_norm_is_finite_for_any_rank():
    x = draw()
    slope = jax.grad(lowrank.norm)(lowrank.pad(Factors(*x), 9))
    want = dense(x) / np.linalg.norm(dense(x)) @ x.b.T.astype(np.float64)
    np.testing.assert_allclose(slope.a[:, :6], want, atol=1e-4)
    zero = jax.grad(lowrank.norm)(jax.tree.map(jnp.zeros_like, x))
    assert all(np.all(np.isfinite(g)) for g in (*slope, *zero))


def test_what_is_stored_in_bfloat16_is_computed_with_in_float32():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), draw())
    wide = draw(rank=40)._replace(b=jnp.asarray(draw(rank=40).b, jnp.bfloat16))
    matrix = dense(half)
    assert lowrank.norm(half) == pytest.approx(np.linalg.norm(matrix), rel=1e-6)
    assert lowrank.inner(half, half) == pytest.approx(np.sum(matrix**2), rel=1e-6)
    assert lowrank.vector_norm(half.a) == pytest.approx(np.linalg.norm(np.float64(half.a)))
    gram = np.float64(half.a) @ np.float64(half.a).T
    np.testing.assert_allclose(lowrank.gram(half.a), gram, atol=1e-5)
    q = np.asarray(lowrank.orthonormal(half.a), np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(6), atol=2e-6)
    for factors in (half, wide):
        s = np.linalg.svd(dense(factors), compute_uv=False)[: factors.rank]
        np.testing.assert_allclose(lowrank.singular_values(factors), s, atol=1e-5 * s[0])
    slope = jax.grad(lowrank.norm)(half)
    assert slope.a.dtype == jnp.bfloat16 and np.all(np.isfinite(np.float32(slope.b)))


def spectrum(values, d_in=173, d_out=131, mixing=1.0, seed=0):
    """Factors of a matrix with these singular values, the factors themselves ill-conditioned."""
    rng = np.random.default_rng(seed)
    count = len(values)
    u = np.linalg.qr(rng.standard_normal((d_in, count)))[0]
    v = np.linalg.qr(rng.standard_normal((d_out, count)))[0].T
    turn = np.linalg.qr(rng.standard_normal((count, count)))[0]
    root = np.sqrt(np.asarray(values, np.float64))
    scale = mixing ** np.linspace(-1, 1, count)
    a = (u * root) @ turn * scale
    b = (turn.T * (1 / scale)[:, None]) @ (root[:, None] * v)
    return Factors(a.astype(np.float32), b.astype(np.float32))


SPECTRA = {
    "flat": np.linspace(1, 0.9, 40),
    "steep": 10 ** np.linspace(0, -6, 40),
    "very steep": 10 ** np.linspace(0, -12, 40),
    "a step below the root of eps": np.r_[1, np.full(7, 1e-5), np.full(32, 1e-7)],
    "deficient": np.r_[np.linspace(2, 1, 5), np.zeros(35)],
    "degenerate": np.r_[np.ones(8), np.full(32, 0.5)],
}


@pytest.mark.parametrize("mixing", [1.0, 100.0], ids=["balanced", "unbalanced"])
@pytest.mark.parametrize("name", SPECTRA)
def test_truncation_is_as_accurate_as_float32_allows(name, mixing):
    """A Gram matrix squares the condition number; the kept directions must not show it."""
    factors = spectrum(SPECTRA[name], mixing=mixing)
    matrix, rank = dense(factors), 8
    got = lowrank.truncate(Factors(*factors), rank)
    size = np.linalg.norm(matrix)
    optimum = np.linalg.norm(matrix - best(matrix, rank))
    assert np.linalg.norm(matrix - dense(got)) <= optimum * (1 + 1e-5) + 3e-6 * size
    gram = np.asarray(got.a, np.float64)
    np.testing.assert_allclose(gram.T @ gram, np.eye(rank), atol=2e-6)
    s = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(lowrank.svd(Factors(*factors), rank).s, s[:rank], atol=2e-6 * s[0])


def test_directions_above_a_gap_are_found_to_rounding():
    """Kept directions of sizes from 1 to 1e-5, in one product."""
    factors = spectrum(np.r_[10 ** np.linspace(0, -5, 8), np.full(32, 1e-8)])
    matrix = dense(factors)
    got = dense(lowrank.truncate(Factors(*factors), 8))
    assert np.linalg.norm(got - best(matrix, 8)) < 2e-6 * np.linalg.norm(matrix)


@pytest.mark.parametrize("d_in, d_out, rank", [(13, 17, 20), (17, 13, 20), (13, 13, 14)])
def test_more_columns_than_a_dimension_is_exact_if_the_sketch_spans_it(d_in, d_out, rank):
    factors = draw(0, d_in, d_out, rank)
    matrix = dense(factors)
    got = dense(lowrank.truncate(Factors(*factors), 4))
    assert np.linalg.norm(got - best(matrix, 4)) < 1e-5 * np.linalg.norm(matrix)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_sketch_is_near_the_optimum(decay):
    rng = np.random.default_rng(0)
    columns = 400
    a = rng.standard_normal((97, columns)) * np.arange(1, columns + 1) ** -decay
    factors = Factors(a.astype(np.float32), draw(1, 97, 101, columns).b)
    matrix = dense(factors)
    optimum = np.linalg.norm(matrix - best(matrix, 4))
    got = np.linalg.norm(matrix - dense(lowrank.truncate(Factors(*factors), 4)))
    assert optimum <= got * (1 + 1e-6) and got < 1.01 * optimum


def test_svd_gives_triplets_and_refuses_rank_zero():
    factors = draw()
    u, s, v = lowrank.svd(Factors(*factors))
    assert u.shape == (37, 6) and s.shape == (6,) and v.shape == (6, 29)
    np.testing.assert_allclose((u * s) @ v, dense(factors), atol=1e-4)
    np.testing.assert_allclose(v @ v.T, np.eye(6), atol=2e-6)
    assert np.all(np.diff(s) <= 0)
    with pytest.raises(ValueError, match="at least 1"):
        lowrank.svd(Factors(*factors), 0)
    with pytest.raises(ValueError, match="unknown split"):
        lowrank.truncate(Factors(*factors), 2, split="both")  # type: ignore[arg-type]


def test_splits_agree_in_the_product_and_first_columns_are_best():
    factors = Factors(*draw())
    right, balanced, left = (
        lowrank.truncate(factors, 4, split=split) for split in ("right", "balanced", "left")
    )
    np.testing.assert_allclose(dense(balanced), dense(right), atol=1e-4)
    np.testing.assert_allclose(dense(left), dense(right), atol=1e-4)
    np.testing.assert_allclose(
        np.linalg.norm(balanced.a, axis=0), np.linalg.norm(balanced.b, axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(dense(lowrank.cut(right, 2)), best(dense(factors), 2), atol=1e-4)
    assert lowrank.truncate(factors, 8).a.shape == (37, 8)


def test_truncated_sum_and_difference():
    terms = [draw(seed, rank=2) for seed in range(3)]
    got = lowrank.truncated_sum([terms[0], terms[1], lowrank.scaled(terms[2], -1.0)], 3)
    matrix = dense(terms[0]) + dense(terms[1]) - dense(terms[2])
    np.testing.assert_allclose(dense(got), best(matrix, 3), atol=1e-4)


def test_basis_is_orthonormal_whatever_it_is_made_of():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 8)).astype(np.float32)
    x[:, 3] = 0
    x[:, 5] = x[:, 1]
    x[:, 6] = x[:, 2] + 1e-5 * x[:, 4]
    x[:, 7] *= 1e-12
    for columns in (x, 0 * x, x[:8], np.ones((50, 8), np.float32)):
        q = np.asarray(lowrank.orthonormal(jnp.asarray(columns)), np.float64)
        np.testing.assert_allclose(q.T @ q, np.eye(8), atol=3e-6)
        np.testing.assert_allclose(q @ (q.T @ columns), columns, atol=3e-5)


@pytest.mark.parametrize("kept", [1, 2])
def test_the_derivative_of_a_truncation_and_of_its_first_columns(kept):
    factors = jax.tree.map(jnp.asarray, draw(rank=4))
    weight = np.random.default_rng(5).standard_normal((37, 29))

    def value(x):
        y = lowrank.cut(lowrank.truncate(x, 2), kept)
        return jnp.sum(weight * lowrank.matmul(y.a, y.b))

    direction = draw(7, rank=4)
    got = sum(jnp.sum(g * d) for g, d in zip(jax.grad(value)(factors), direction))

    def oracle(step):
        moved = Factors(*(np.asarray(x, np.float64) + step * d for x, d in zip(factors, direction)))
        return np.sum(weight * best(dense(moved), kept))

    assert got == pytest.approx((oracle(1e-5) - oracle(-1e-5)) / 2e-5, rel=1e-3)


@pytest.mark.parametrize("rank", [6, 29, 70])
def test_all_singular_values(rank):
    factors = draw(rank=rank)
    want = np.linalg.svd(dense(factors), compute_uv=False)[:rank]
    np.testing.assert_allclose(
        lowrank.singular_values(Factors(*factors)), want, atol=1e-5 * want[0]
    )
