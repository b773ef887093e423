"""`docs/add_a_method.md`: its examples are methods, by the rules that it states."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax import methods, transforms
from fedlora_jax.federated import communication
from fedlora_jax.federated.round import Recipe, run_round
from tests.world import COHORT, COUNTS, any_client

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "add_a_method.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def factory(source):
    """What a file with this text would define, under its own name."""
    scope = {}
    exec(source, scope)
    (name,) = re.findall(r"^def (\w+)\(", source, re.M)
    return scope[name]


MEDIAN, MIXTURE = map(factory, EXAMPLES)


def run(world, method, rounds=2):
    step = jax.jit(functools.partial(run_round, Recipe(world.task, method, world.training)))
    federation = world.federation(method)
    for _ in range(rounds):
        before = federation
        federation, _, result = step(federation, world.data, COHORT, world.seed, jnp.float32(0.2))
    return before, result, federation


@pytest.mark.parametrize("source", EXAMPLES, ids=["median", "mixture"])
def test_examples_are_short(source):
    assert len(source.splitlines()) < 60


def test_median(world):
    _, result, after = run(world, MEDIAN())
    for path, factors in after.server.trainable.adapters.items():
        for got, each in zip(factors, result.trained.adapters[path], strict=True):
            np.testing.assert_allclose(got, np.median(np.asarray(each), axis=0), rtol=1e-6)
    with pytest.raises(ValueError, match="reads each client"):
        transforms.robust(MEDIAN(), rule="trimmed_mean", byzantine=0.2)


def test_mixture(world):
    before, result, after = run(world, MIXTURE(share=0.25))
    for position, client in enumerate(COHORT.tolist()):
        for path, factors in result.start.trainable.adapters.items():
            own, common = before.clients.adapters[path], before.server.trainable.adapters[path]
            expected = 0.25 * own.a[client] + 0.75 * common.a
            np.testing.assert_allclose(factors.a[position], expected, rtol=1e-6)
            kept = after.clients.adapters[path].b[client]
            np.testing.assert_array_equal(kept, result.trained.adapters[path].b[position])
    absent = [client for client in range(len(COUNTS)) if client not in COHORT.tolist()]
    for x, y in zip(*map(jax.tree.leaves, (before.clients, after.clients)), strict=True):
        np.testing.assert_array_equal(x[jnp.array(absent)], y[jnp.array(absent)])
    with pytest.raises(ValueError, match="between 0 and 1"):
        MIXTURE(share=2)


@pytest.mark.parametrize("make", [MEDIAN, MIXTURE], ids=["median", "mixture"])
def test_what_the_page_promises_comes_with_it(world, make):
    method = make()
    federation = world.federation(method, ranks=(1, 2, 2, 1, 2, 1, 2))
    made = communication.messages(method, federation.server, any_client(federation), len(COHORT))
    fedit = methods.fedit()
    plain = world.federation(fedit)
    usual = communication.messages(fedit, plain.server, any_client(plain), len(COHORT))
    assert communication.count(method, federation.server, made, 0) == communication.count(
        fedit, plain.server, usual, 0
    )
    combined = transforms.fedprox(method, mu=0.1)
    recipe = Recipe(world.task, combined, world.training, clients_per_chunk=3)
    step = functools.partial(run_round, recipe)
    after, _, _ = jax.eval_shape(step, federation, world.data, COHORT, world.seed, jnp.float32(0.2))
    assert jax.tree.structure(after) == jax.tree.structure(federation)
    with pytest.raises(ValueError, match="differential privacy"):
        transforms.private(method, clip=1.0, noise_multiplier=1.0)


def test_steps_name_what_is_in_the_files():
    section = PAGE.split("## In the registry")[1]
    steps = re.findall(r"^\d\. `([\w/.]+)`: (.*?)(?=^\S|\Z)", section, re.M | re.S)
    assert len(steps) == 6
    for path, step in steps:
        text = (ROOT / path).read_text()
        assert not [name for name in re.findall(r"`([A-Z]{2,})`", step) if name not in text], path
