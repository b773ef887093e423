"""Robust rules around methods: who refuses them, and what hostile clients can do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from fedlora_jax import methods, transforms
from fedlora_jax.experiment import program
from tests.transforms.test_server_step import models_of
from tests.world import any_client, method_of

ALL = sorted(methods.REGISTRY)
RULES = sorted(transforms.ROBUST_RULES)
COUNT, BYZANTINE = 10, 0.2
HOSTILE = [1, 6]
# Means of factors, exact sums of products, and truncated ones of layers stacked by kind.
NAMES = ["fedit", "flora", "fedsmooth_lora"]
PAIRS = [
    (name, rule)
    for name in NAMES
    for rule in RULES
    if transforms.ROBUST_RULES[rule] not in method_of(name).refuses
]


def robust(name, rule):
    return transforms.robust(method_of(name), rule=rule, byzantine=BYZANTINE)


@pytest.mark.parametrize("rule", ["krum", "median", "norm_clip"])
@pytest.mark.parametrize("name", ALL)
def test_every_method_takes_a_rule_or_says_why_not(world, name, rule):
    reason = method_of(name).refuses.get(transforms.ROBUST_RULES[rule])
    if reason:
        with pytest.raises(ValueError, match=reason[:30]):
            robust(name, rule)
        return
    method, federation = robust(name, rule), world.federation(method_of(name))

    def step(server, client):
        upload = method.unmoved(server) if name != "fedsa_lora" else server.trainable.adapters
        stacked = jax.tree.map(lambda x: jnp.stack([x] * 4), upload)
        return method.aggregate(server, stacked, jnp.ones(4))

    after, aggregated = jax.eval_shape(step, federation.server, any_client(federation))
    before = jax.eval_shape(lambda x: x, federation.server)
    same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), before, after)
    assert all(jax.tree.leaves(same))


@pytest.fixture(scope="module")
def served(world):
    """`(method, rule) -> (server, aggregate)`; the rule None is the method's own."""

    @functools.cache
    def make(name, rule):
        method = method_of(name) if rule is None else robust(name, rule)
        return world.federation(method_of(name)).server, jax.jit(method.aggregate)

    return make


def uploads_of(name, server, noise=0.1, seed=0):
    """Clients that have learned about the same, what they have learned, and where they started."""
    rng = np.random.default_rng(seed)
    start = method_of(name).unmoved(server)
    changes = jax.tree.map(
        lambda x: 0.5 * rng.normal(size=x.shape) + noise * rng.normal(size=(COUNT, *x.shape)), start
    )
    return start, changes, sent(start, changes)


def sent(start, changes):
    return jax.tree.map(lambda x, d: jnp.asarray(x + d, jnp.float32), start, changes)


def attacked(start, changes, factor):
    hostile = np.isin(np.arange(COUNT), HOSTILE)

    def false(d):
        return np.where(hostile.reshape(-1, *[1] * (d.ndim - 1)), factor * d, d)

    return sent(start, jax.tree.map(false, changes))


WEIGHTS = np.linspace(0.02, 0.05, COUNT).astype(np.float32)
EVERYBODY = jnp.asarray(WEIGHTS)
HONEST = jnp.asarray(np.where(np.isin(np.arange(COUNT), HOSTILE), 0, WEIGHTS))


def change(served, name, rule, uploads, weights=EVERYBODY):
    """What a round has made of the model, as one vector."""
    server, aggregate = served(name, rule)
    before, after = models_of(server), models_of(aggregate(server, uploads, weights)[0])
    return np.concatenate([np.ravel(after[path] - before[path]) for path in before])


def distance(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.parametrize("factor", [-5.0, 1e4])
@pytest.mark.parametrize(("name", "rule"), PAIRS)
def test_two_of_ten_cannot_carry_the_server_away(served, name, rule, factor):
    server, _ = served(name, None)
    start, changes, _ = uploads_of(name, server)
    uploads = attacked(start, changes, factor)
    truth = change(served, name, None, uploads, HONEST)
    assert distance(change(served, name, None, uploads), truth) > 0.9
    assert distance(change(served, name, rule, uploads), truth) < 0.65


@pytest.mark.parametrize("factor", [1e6, 1e10])
def test_nor_can_they_from_any_place_in_the_cohort(served, factor):
    """FedEx-LoRA subtracts one client's factors from all others': not those of a hostile one."""
    server, _ = served("fedex_lora", None)
    start, changes, _ = uploads_of("fedex_lora", server)
    cohort = attacked(start, changes, factor), EVERYBODY
    plain = change(served, "fedex_lora", "geometric_median", *cohort)
    truth = change(served, "fedex_lora", None, cohort[0], HONEST)
    assert distance(plain, truth) < 0.1
    for shift in range(1, COUNT):
        rolled = jax.tree.map(lambda x, n=shift: jnp.roll(x, n, axis=0), cohort)
        other = change(served, "fedex_lora", "geometric_median", *rolled)
        assert distance(other, plain) < 1e-3, shift


@pytest.mark.parametrize(("name", "rule"), PAIRS)
def test_of_clients_that_agree_it_is_the_method(served, name, rule):
    server, _ = served(name, None)
    _, _, uploads = uploads_of(name, server, noise=0.0)
    one, two = (change(served, name, each, uploads) for each in (rule, None))
    assert np.linalg.norm(two) > 0.1
    np.testing.assert_allclose(one, two, atol=1e-4)


@pytest.mark.parametrize(("name", "rule"), PAIRS)
def test_order_and_absent_clients_do_not_matter(served, name, rule):
    server, _ = served(name, None)
    start, changes, _ = uploads_of(name, server)
    far, order = attacked(start, changes, 1e6), np.random.default_rng(0).permutation(COUNT)
    mild = attacked(start, changes, -1.0)
    plain = change(served, name, rule, far, HONEST)
    np.testing.assert_allclose(change(served, name, rule, mild, HONEST), plain, atol=1e-5)
    shuffled = jax.tree.map(lambda x: x[order], far)
    other = change(served, name, rule, shuffled, HONEST[order])
    np.testing.assert_allclose(other, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *(("fedit", rule) for rule in ("geometric_median", "krum", "multi_krum", "norm_clip")),
        ("frlora", "geometric_median"),
    ],
)
def test_if_no_change_can_be_squared_the_server_keeps_its_state(served, name, rule):
    """And nothing is merged, neither here nor by a server's step around it."""
    server, aggregate = served(name, rule)
    start, changes, _ = uploads_of(name, server)
    far = sent(start, jax.tree.map(lambda x: 1e20 * x, changes))
    after, aggregated = aggregate(server, far, EVERYBODY)
    jax.tree.map(np.testing.assert_array_equal, after, server)
    assert (aggregated.residual is None) == (name == "fedit")
    assert not any(np.any(x) for x in jax.tree.leaves(aggregated.residual))


def test_a_clipped_client_moves_an_exact_mean_by_its_share_of_the_norm(served, world):
    """FLoRA's mean of products: what each of them adds has the norm `norm` at most."""
    method = transforms.robust(method_of("flora"), rule="norm_clip", norm=0.3)
    server, _ = served("flora", None)
    start, changes, uploads = uploads_of("flora", server)
    rows = []
    for client in range(COUNT):
        alone = jnp.zeros(COUNT).at[client].set(1.0)
        before, after = (
            models_of(server),
            models_of(served("flora", None)[1](server, uploads, alone)[0]),
        )
        kernels = [after[path] - before[path] for path in before if path != "head"]
        head = jax.tree.map(lambda x, c=client: np.float64(x[c]), changes.head)
        rows.append([*kernels, *jax.tree.leaves(head)])
    norms = np.array([np.sqrt(sum(np.sum(x**2) for x in row)) for row in rows])
    assert norms.min() > 0.3
    paths = [path for path in models_of(server) if path != "head"]
    after = models_of(jax.jit(method.aggregate)(server, uploads, EVERYBODY)[0])
    for index, path in enumerate(paths):
        wanted = sum(
            p * 0.3 / n * row[index]
            for p, n, row in zip(WEIGHTS / WEIGHTS.sum(), norms, rows, strict=True)
        )
        got = after[path] - models_of(server)[path]
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"robust.rule": "medain"}, "unknown robust rule 'medain'. Did you mean 'median'"),
        (
            {"robust.rule": "krum", "clients_per_round": 4},
            "fedit: krum needs at least .* there are 4",
        ),
        ({"robust.rule": "median", "lora.ranks": "uniform"}, "unequal ranks: most clients"),
        ({"robust.rule": "krum", "local.scaffold": True}, "SCAFFOLD: its control variates"),
        ({"robust.rule": "krum", "privacy.clip": 1.0}, "differential privacy: a robust rule reads"),
        ({"robust.rule": "median", "method": "flora"}, "rule median: its server reads each"),
        ({"robust.rule": "median", "robust.byzantine": 0.5}, "and below 0.5.*half of the clients"),
    ],
)
def test_configurations_without_sense(values, message):
    config = digits.get_config()
    config.update_from_flattened_dict(values)
    with pytest.raises(ValueError, match=message):
        program.check(config)


def test_a_second_rule_and_a_rule_around_privacy_are_refused():
    with pytest.raises(ValueError, match="robust rule already"):
        transforms.robust(robust("fedit", "krum"), rule="median")
    private = transforms.private(methods.fedit(), clip=1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="noisy mean alone"):
        transforms.robust(private, rule="krum")
