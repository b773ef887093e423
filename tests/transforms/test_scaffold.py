"""SCAFFOLD on a convex problem, whose optimum has a closed form."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlora_jax import Factors, methods, transforms
from fedlora_jax.data.clients import ClientData, client_data
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.round import Recipe, create, run_round
from fedlora_jax.federated.task import Task, equally
from fedlora_jax.methods import Server, Trainable

COUNTS = np.array([2, 3, 12, 5, 8])
SCALE = 1.5
COHORTS = {"everybody": [[0, 1, 2, 3, 4]], "some": [[0, 2, 4], [1, 2, 3], [0, 3, 4], [1, 2, 4]]}


class Line(nn.Module):
    """One layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, use_bias=False, name="layer")(x)


class Convex(NamedTuple):
    """Least squares in `b` over a frozen `a`: clients disagree, and some have more to say."""

    task: Task
    data: ClientData
    server: Server
    rows: list[np.ndarray]

    def optimum(self, shares):
        """The `b` that minimises the sum of the clients' mean losses by these shares."""
        x, y = (np.float64(self.data.examples[name]) for name in ("x", "y"))
        factors = self.server.trainable.adapters["layer"]
        z = SCALE * x @ np.float64(factors.a)
        rest = y - x @ np.float64(self.server.backbone["layer"]["kernel"])
        normal = sum(p * z[k].T @ z[k] / len(k) for p, k in zip(shares, self.rows, strict=True))
        right = sum(p * z[k].T @ rest[k] / len(k) for p, k in zip(shares, self.rows, strict=True))
        return np.linalg.solve(normal, right)


@pytest.fixture(scope="module")
def convex():
    generator = np.random.default_rng(4)
    rows = np.split(np.arange(COUNTS.sum()), np.cumsum(COUNTS)[:-1])
    x = generator.normal(size=(COUNTS.sum(), 3))
    y = np.concatenate([x[k] @ generator.normal(size=(3, 2)) for k in rows])
    loss = lambda outputs, batch: equally(  # noqa: E731
        jnp.sum((outputs - batch["y"]) ** 2, axis=-1) / 2
    )
    a = Factors(jnp.asarray(generator.normal(size=(3, 2)), jnp.float32) / 2, jnp.zeros((2, 2)))
    kernel = {"kernel": jnp.asarray(generator.normal(size=(3, 2)), jnp.float32)}
    return Convex(
        Task(Line(), lambda batch: (batch["x"],), loss),
        client_data({"x": x.astype(np.float32), "y": y.astype(np.float32)}, rows),
        Server(
            {"layer": kernel}, Trainable({"layer": a}, {}), jnp.float32(SCALE), (), jnp.int32(0)
        ),
        rows,
    )


def rounds(convex, method, cohorts, number, **options):
    """The federation after so many rounds of four full gradient steps."""
    training = LocalTraining(optax.sgd(1.0), batch_size=int(COUNTS.max()), steps=4)
    step = jax.jit(functools.partial(run_round, Recipe(convex.task, method, training, **options)))
    federation = create(jax.random.key(0), method, convex.server, len(COUNTS))
    for index in range(number):
        cohort = jnp.asarray(cohorts[index % len(cohorts)])
        federation, _, _ = step(
            federation, convex.data, cohort, jax.random.key(1), jnp.float32(0.05)
        )
    return federation


@pytest.mark.parametrize("equal", [False, True], ids=["examples", "equal"])
@pytest.mark.parametrize("cohorts", COHORTS)
def test_fixed_point_is_the_optimum_by_the_weights_of_the_run(convex, cohorts, equal):
    shares = np.full(len(COUNTS), 1 / len(COUNTS)) if equal else COUNTS / COUNTS.sum()
    best, other = convex.optimum(shares), convex.optimum(np.roll(shares, 1))
    method = transforms.scaffold(methods.ffa_lora())
    after = rounds(convex, method, COHORTS[cohorts], 800, equal_weights=equal)
    reached = after.server.trainable.adapters["layer"].b
    np.testing.assert_allclose(reached, best, atol=1e-4)
    assert equal or np.abs(best - other).max() > 0.05
    own = np.float64(after.clients.control.adapters["layer"].b)
    server = np.float64(after.server.memory.own.adapters["layer"].b)
    np.testing.assert_allclose(server, np.tensordot(shares, own, 1), atol=1e-5)


def test_without_it_clients_drift_from_there(convex):
    best = convex.optimum(COUNTS / COUNTS.sum())
    after = rounds(convex, methods.ffa_lora(), COHORTS["everybody"], 400)
    assert np.abs(after.server.trainable.adapters["layer"].b - best).max() > 0.02
