"""No intermediate of any function holds both dimensions of a kernel; all digits are multiplied."""

import math

import jax
import numpy as np
import pytest

from fedlora_jax import aggregation, lowrank
from tests.aggregation import cases
from tests.jaxprs import equations

# Primes, so that no other size is a multiple of them; K r is below both, then above both.
D_IN, D_OUT = 101, 127
KERNELS = {"one": (D_IN, D_OUT), "two": (D_IN, D_OUT)}
COUNTS = {"few": (3, 2), "many": (67, 2)}
FULL = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def assert_never_dense(function, *arguments):
    closed = jax.make_jaxpr(function)(*arguments)
    count = 0
    for equation in equations(closed.jaxpr):
        count += 1
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            both = [any(n % d == 0 and n for n in shape) for d in (D_IN, D_OUT)]
            assert not all(both), f"{equation.primitive} makes {shape}"
            assert math.prod(shape) < D_IN * D_OUT * 20
        # Or accelerators would leave out digits of the factors.
        if equation.primitive.name == "dot_general":
            assert equation.params["precision"] == FULL, equation
    assert count > 3


def dense_by_mistake(stacked, weights):
    node = stacked["one"]
    return jax.vmap(lambda a, b: (a @ b).reshape(-1))(*node) * weights[:, None]


def test_the_walk_finds_a_dense_product():
    stacked = cases.clients(kernels=KERNELS)
    with pytest.raises(AssertionError, match="makes"):
        assert_never_dense(jax.jit(dense_by_mistake), stacked, cases.WEIGHTS)


@pytest.mark.parametrize("size", COUNTS)
@pytest.mark.parametrize("pair", cases.ALL, ids=cases.label)
def test_functions(pair, size):
    count, rank = COUNTS[size]
    stacked = cases.clients(count=count, rank=rank, kernels=KERNELS)
    assert_never_dense(cases.bound(pair, KERNELS), stacked, np.ones(count, np.float32))


@pytest.mark.parametrize("size", COUNTS)
def test_error_and_diagnostics(size):
    count, rank = COUNTS[size]
    stacked = cases.clients(count=count, rank=rank, kernels=KERNELS)

    def measure(stacked, weights):
        aggregated = aggregation.fedex_lora(stacked, weights)
        whole, kernels = aggregation.diagnostics(stacked, weights, aggregated)
        return aggregation.error(stacked, weights, aggregated), whole, kernels

    assert_never_dense(measure, stacked, np.ones(count, np.float32))


def test_gradient_of_the_norm():
    node = cases.extra(kernels=KERNELS)["one"]
    assert_never_dense(jax.grad(lowrank.norm), node)
