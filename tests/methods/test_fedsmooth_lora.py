"""FedSmoothLoRA against a float64 NumPy port of its formulas, through two rounds of two clients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlora_jax import lora, methods
from fedlora_jax.data.clients import client_data, local_batch
from fedlora_jax.federated import randomness
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.round import Recipe, create, run_round, train_cohort
from fedlora_jax.federated.task import Task, equally
from fedlora_jax.methods import Context, Server, Trainable
from tests.world import positions

D_IN, D_OUT, RANK, SCALE, GAMMA, RATE, STEPS = 9, 7, 2, 1.3, 4.0, 0.05, 3
COUNTS = (8, 5)
COHORT = jnp.array([0, 1])


def squares(outputs, batch):
    return equally(jnp.sum((outputs - batch["y"]) ** 2, axis=-1) / 2)


@pytest.fixture(scope="module")
def linear():
    """A linear model on two clients whose every batch is all they have."""
    generator = np.random.default_rng(1)
    examples = {
        "x": generator.normal(size=(sum(COUNTS), D_IN)).astype(np.float32),
        "y": generator.normal(size=(sum(COUNTS), D_OUT)).astype(np.float32),
    }
    parts = np.split(np.arange(sum(COUNTS)), np.cumsum(COUNTS)[:-1])
    model = nn.Sequential([nn.Dense(D_OUT, use_bias=False)])
    params = model.init(jax.random.key(0), examples["x"])["params"]
    adapters = lora.init(jax.random.key(1), params, targets=".*", rank=RANK)
    task = Task(model, lambda batch: (batch["x"],), squares)
    training = LocalTraining(optax.sgd(1.0), max(COUNTS), STEPS)
    server = Server(params, Trainable(adapters, {}), jnp.float32(SCALE), (), jnp.int32(0))
    return task, training, server, client_data(examples, parts), examples, parts


@pytest.fixture(scope="module")
def two_rounds(linear):
    """The states and results of two rounds; each choice of options is compiled once."""
    return functools.cache(lambda **options: run_two_rounds(linear, **options))


def test_types_stay_where_numbers_are_float64_by_default(linear):
    """Of the options that are no defaults; for those see `test_methods.py`."""
    task, training, server, data, _, _ = linear
    method = methods.fedsmooth_lora(gradient="dense", zeta_min=0.0, rounds=4)

    def run(server):
        first = create(jax.random.key(0), method, server, len(COUNTS))
        recipe = Recipe(task, method, training)
        return first, run_round(recipe, first, data, COHORT, jax.random.key(3), RATE)[0]

    with jax.enable_x64(True):
        first, after = jax.eval_shape(run, server)
    assert jax.tree.map(lambda x: x.dtype, first) == jax.tree.map(lambda x: x.dtype, after)


def run_two_rounds(linear, **options):
    task, training, server, data, _, _ = linear
    options = {"gamma": GAMMA, "calibration_batches": 1, **options}
    method = methods.fedsmooth_lora(**options)
    step = jax.jit(lambda *state: run_round(Recipe(task, method, training), *state))
    federation, rounds = create(jax.random.key(2), method, server, len(COUNTS)), []
    for _ in range(2):
        federation, _, result = step(federation, data, COHORT, jax.random.key(3), RATE)
        rounds.append((federation, result))
    return rounds


def best(matrix, rank, split):
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    left, right = {"balanced": (np.sqrt(s), np.sqrt(s)), "right": (s * 0 + 1, s)}[split]
    return u[:, :rank] * left[:rank], right[:rank, None] * v[:rank]


def aligned(gradient):
    """The gradient-aligned factors: each vector has the sign of a positive sum of cubes."""
    u, _, v = np.linalg.svd(gradient)
    length = D_OUT**0.25 / np.sqrt(GAMMA)
    left, right = u[:, :RANK], v[RANK : 2 * RANK].T
    a, b = (length * x * np.sign(np.sum(x**3, axis=0)) for x in (left, right))
    return a, b.T


def port(linear, rounds, zetas, split, exact):
    """The formulas of METHODS.md, items 1 to 7, on dense float64 matrices."""
    _, _, server, _, examples, parts = linear
    weight = np.float64(server.backbone["layers_0"]["kernel"])
    shares = np.array(COUNTS) / sum(COUNTS)
    merged, own = np.zeros_like(weight), [np.zeros_like(weight) for _ in COUNTS]
    for t, (_, result) in enumerate(rounds):
        for c, part in enumerate(parts):
            x, y = np.float64(examples["x"][part]), np.float64(examples["y"][part])
            matching = zetas[t] * (own[c] - merged)
            a, b = aligned(x.T @ (x @ (weight + SCALE * matching) - y) / len(x))
            offset = jax.tree.map(lambda z, c=c: np.float64(z[c]), result.start.offset)["layers_0"]
            seen = (matching if exact else 0) - offset.a @ offset.b
            np.testing.assert_allclose(a @ b, seen, rtol=1e-4, atol=1e-5)
            product = a @ b
            frozen = weight - SCALE * product + (SCALE * matching if exact else 0)
            if t > 0 and not exact:
                a, b = best(product + matching, RANK, split)
            for _ in range(STEPS):
                e = x.T @ (x @ (frozen + SCALE * a @ b) - y) / len(x)
                a, b = a - RATE * SCALE * e @ b.T, b - RATE * SCALE * a.T @ e
            change = a @ b - product + (matching if exact else 0)
            left, right = best(change, RANK, split)
            own[c] = left @ right
        left, right = best(sum(p * m for p, m in zip(shares, own, strict=True)), RANK, split)
        merged = left @ right
        weight = weight + SCALE * merged
        yield weight


# Options, and zeta in the two rounds. By default it is one.
CASES = [
    ({}, (1, 1)),
    ({"zeta": 0.6, "split": "right"}, (0.6, 0.6)),
    ({"zeta": 0.6, "start": "exact"}, (0.6, 0.6)),
    ({"zeta_min": 0.0, "rounds": 2}, (1, 0.5)),
    ({"zeta": 0.8, "zeta_min": 0.2, "rounds": 3, "gradient": "dense"}, (0.8, 0.65)),
]


@pytest.mark.parametrize(("options", "zetas"), CASES, ids=str)
def test_two_rounds_are_those_of_the_formulas(linear, two_rounds, options, zetas):
    rounds = two_rounds(**options)
    exact = options.get("start") == "exact"
    expected = port(linear, rounds, zetas, options.get("split", "balanced"), exact)
    for (federation, _), weight in zip(rounds, expected, strict=True):
        kernel = federation.server.backbone["layers_0"]["kernel"]
        np.testing.assert_allclose(kernel, weight, rtol=2e-4, atol=2e-5)
        assert not any(x.any() for x in jax.tree.leaves(federation.server.trainable.adapters))


def test_zeta_stays_where_it_has_fallen_to(linear):
    """In a run that goes on for more rounds than it was made for."""
    method = methods.fedsmooth_lora(zeta=0.8, zeta_min=0.2, rounds=2, start="exact")
    server, client = method.init(jax.random.key(2), linear[2])
    client = client._replace(upload=jax.tree.map(jnp.ones_like, client.upload))
    context = Context(jax.random.key(3), lambda adapters, **_: adapters, jnp.int32(RANK))

    @jax.jit
    def zeta(index):
        start = method.start(
            server._replace(round=index), client._replace(round=index - 1), context
        )
        return start.offset["layers_0"].b[0, 0]  # zeta times an upload of ones

    got = [zeta(index) for index in range(5)]
    np.testing.assert_allclose(got[1:], [0.5, 0.2, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize("batches", [1, 2, 100])
def test_calibration_is_the_mean_over_batches_of_one_pass_at_most(linear, batches):
    """Of eight examples there are two batches of five at most, and of five one."""
    task, _, server, data, examples, _ = linear
    method = methods.fedsmooth_lora(gamma=GAMMA, calibration_batches=batches)
    training = LocalTraining(optax.sgd(1.0), batch_size=5, steps=1)
    federation, seed = create(jax.random.key(2), method, server, len(COUNTS)), jax.random.key(3)
    step = jax.jit(functools.partial(train_cohort, Recipe(task, method, training)))
    offset = step(federation, data, COHORT, seed, RATE).start.offset["layers_0"]
    weight = np.float64(server.backbone["layers_0"]["kernel"])
    for client, (count, most) in enumerate(zip(COUNTS, (2, 1), strict=True)):
        key = randomness.of_client(seed, "calibration", 0, client)
        slopes = []
        for index in range(min(batches, most)):
            places, mask = local_batch(count, key, index, 5)
            rows = positions(data, client)[places[mask]]
            x, y = (np.float64(examples[name][rows]) for name in "xy")
            slopes.append(x.T @ (x @ weight - y) / len(x))
        a, b = aligned(np.mean(slopes, axis=0))
        found = -np.float64(offset.a[client]) @ np.float64(offset.b[client])
        np.testing.assert_allclose(found, a @ b, rtol=1e-3, atol=1e-4)


def test_impossible_ranks_and_options_are_refused(linear):
    task, training, server, data, _, _ = linear
    adapters = lora.init(jax.random.key(1), server.backbone, targets=".*", rank=4)
    wide = server._replace(trainable=Trainable(adapters, {}))
    with pytest.raises(ValueError, match="rank 4 is too large for 'layers_0'"):
        create(jax.random.key(2), methods.fedsmooth_lora(), wide, 2)
    with pytest.raises(ValueError, match="needs rounds"):
        methods.fedsmooth_lora(zeta_min=0.1)
    with pytest.raises(ValueError, match="'exact'"):
        methods.fedsmooth_lora(start="exactly")
