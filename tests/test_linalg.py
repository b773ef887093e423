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
