"""Decompositions in batches: right, differentiable, and never waiting for each other."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax import _linalg

PLAIN = {
    "eigh": lambda x: tuple(jnp.linalg.eigh(x)),
    "svd": lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)),
    "qr_r": lambda x: jnp.linalg.qr(x, mode="r"),
    "det": jnp.linalg.det,
    "cholesky": jnp.linalg.cholesky,
    "triangular_inverse": lambda x: jnp.linalg.inv(jnp.tril(x)),
}


@pytest.fixture(scope="module")
def matrices():
    """A batch `[2, 3, 5, 5]` of positive definite ones."""
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 5)).astype(np.float32)
    return jnp.asarray(x @ x.transpose(0, 1, 3, 2) + np.eye(5, dtype=np.float32))


def assert_close(got, want):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3), got, want)


@pytest.mark.parametrize("name", PLAIN)
def test_batches_under_every_transformation(matrices, name):
    function, plain = getattr(_linalg, name), PLAIN[name]
    expected = jax.vmap(jax.vmap(plain))(matrices)
    assert_close(jax.vmap(jax.vmap(function))(matrices), expected)
    assert_close(jax.jit(jax.vmap(jax.vmap(function), in_axes=1, out_axes=1))(matrices), expected)
    assert_close(function(matrices[0, 0]), jax.tree.map(lambda x: x[0, 0], expected))

    def total(f):
        # Of what does not depend on the signs of vectors.
        return lambda x: sum(jnp.sum(jnp.abs(y)) for y in jax.tree.leaves(jax.vmap(f)(x)))

    one, two = (jax.jit(jax.grad(total(f)))(matrices[0]) for f in (function, plain))
    if name == "triangular_inverse":
        one, two = jnp.tril(one), jnp.tril(two)
    assert_close(one, two)


def hard(kind: str, rows: int, columns: int) -> np.ndarray:
    """A matrix `[rows, columns]` on which a Cholesky decomposition of its Gram matrix fails."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(rows, columns))
    if kind == "half the rank":
        half = columns // 2
        x = x[:, :half] @ generator.normal(size=(half, columns))
    elif kind == "a zero and a twin":
        x[:, 1], x[:, 3] = 0, x[:, 2]
    elif kind == "graded":
        x *= 10.0 ** -np.linspace(0, 20, columns)
    elif kind == "ones":
        x = np.ones_like(x)
    elif kind != "random":
        u, _, v = np.linalg.svd(x, full_matrices=False)
        x = u * float(kind) ** -np.linspace(0, 1, min(x.shape)) @ v
    return x.astype(np.float32)


HARD = ["random", "1e4", "1e12", "half the rank", "a zero and a twin", "graded", "ones"]


@pytest.mark.parametrize("shape", [(64, 8), (300, 120), (48, 48), (20, 32)])
def test_qr_by_products_of_what_is_hard_to_tell_apart(shape):
    matrices = np.stack([hard(kind, *shape) for kind in HARD])
    found = jax.jit(jax.vmap(_linalg.qr_by_products))(matrices)
    for kind, q, r, x in zip(HARD, *map(np.float64, (*found, matrices)), strict=True):
        np.testing.assert_allclose(q.T @ q, np.eye(min(shape)), atol=5e-6, err_msg=kind)
        np.testing.assert_array_equal(np.tril(r, -1), 0, err_msg=kind)
        # Each column to rounding of its own size.
        errors = np.linalg.norm(q @ r - x, axis=0)
        assert np.all(errors <= 5e-6 * np.linalg.norm(x, axis=0)), kind


def test_qr_by_products_of_nothing_and_of_what_is_not_finite():
    q, r = _linalg.qr_by_products(jnp.zeros((6, 3)))
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-6)
    assert not np.any(r)
    q, r = _linalg.qr_by_products(jnp.full((6, 3), jnp.nan))
    assert np.all(np.isnan(q)) and np.all(np.isnan(r[0]))


INDEPENDENT = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, jax.numpy as jnp, numpy as np
from fedlora_jax import _linalg

def chain(x):
    for _ in range(3):
        x = _linalg.cholesky(x @ x.T + 36 * jnp.eye(36)) + _linalg.triangular_inverse(x) / 36
    return x

start = np.tril(np.random.default_rng(0).normal(size=(6, 60, 36, 36))) + 36 * np.eye(36)
run = jax.jit(lambda *x: [jax.vmap(chain)(y) for y in x])
for _ in range(5):
    jax.block_until_ready(run(*start.astype(np.float32)))
"""


def test_independent_batches_on_two_cores_end():
    """With jnp.linalg in the place of _linalg, jaxlib 0.10 hangs here in the first run."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", INDEPENDENT], cwd=root, env=environment, timeout=120
    )
    assert done.returncode == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_row_is_finite_if_all_of_it_is(wrong, dtype):
    """The largest numbers there are do not overflow, and infinities do not cancel."""
    largest = float(jnp.finfo(dtype).max)
    arrays = [np.full((6, 40, 3), largest), np.full((6, 70), -largest), np.zeros((6, 1))]
    arrays[0][1, 7, 2] = arrays[1][2, 69] = arrays[2][3, 0] = wrong
    arrays[0][4, 0, 0], arrays[1][4, 0] = wrong, -wrong
    found = jax.jit(_linalg.finite_rows)([jnp.asarray(x, dtype) for x in arrays])
    np.testing.assert_array_equal(found, [True, False, False, False, False, True])
