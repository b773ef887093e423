"""The server's step in the space of products, against its formula in float64, for every method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlora_jax import Factors, lora, methods, transforms
from fedlora_jax.federated import communication
from fedlora_jax.federated.round import Recipe, create, run_round
from fedlora_jax.methods import Context, Trained, trained_mask
from tests.aggregation.test_never_dense import D_IN, D_OUT, assert_never_dense
from tests.world import COHORT, COUNTS, any_client, method_of

STEPPING = [
    name for name in sorted(methods.REGISTRY) if "server_step" not in method_of(name).refuses
]
WEIGHTS = jnp.array([0.1, 0.2, 0.05, 0.3])
ROUNDS = 3
RATE, MOMENTUM = 1.7, 0.6
# By name: rate, momentum and rank. The smaller side of the larger kernel is 7.
STEPS = {
    "one": (1.0, 0.0, None),
    "two": (2.0, 0.0, None),
    "cut": (RATE, MOMENTUM, 1),
}
UNCUT = {"uncut": (RATE, MOMENTUM, 7)}
MOVING = ["fedit", "flora", "frlora"]


def noisy(key, trainable, mask):
    """What training might do."""
    leaves, structure = jax.tree.flatten(trainable)
    masks = jax.tree.leaves(mask)
    moved = [
        x + jnp.where(keep, 0.2 * jax.random.normal(jax.random.fold_in(key, i), x.shape), 0)
        for i, (x, keep) in enumerate(zip(leaves, masks, strict=True))
    ]
    return jax.tree.unflatten(structure, moved)


def gradient(adapters, *, offset, batches):
    """That of a loss that is linear in the kernels."""

    def slope(factors):
        shape = factors.a.shape[0], factors.b.shape[1]
        g = jnp.sin(jnp.arange(np.prod(shape), dtype=jnp.float32) ** 1.3).reshape(shape)
        return Factors(g @ factors.b.T, factors.a.T @ g)

    return {path: slope(factors) for path, factors in adapters.items()}


def uploads_of(method, server, clients, key):
    """What the clients of a round send and keep, with noise in the place of training."""

    def one(client, key):
        start = method.start(server, client, Context(key, gradient, jnp.int32(2)))
        start = start._replace(rank=jnp.int32(2) if start.rank is None else start.rank)
        trained = noisy(key, start.trainable, trained_mask(start))
        return method.finish(server, client, start, Trained(trained, trained))

    return jax.vmap(one)(clients, jax.random.split(key, len(COHORT)))


def models_of(server):
    """The adapted kernels and the head, float64."""
    dense, scale = lora.kernels(server.backbone), np.float64(server.scale)
    adapted = {
        path: np.float64(dense[path]) + scale * np.float64(f.a) @ np.float64(f.b)
        for path, f in server.trainable.adapters.items()
    }
    return adapted | {"head": np.float64(server.trainable.head["head"]["kernel"])}


@pytest.fixture(scope="module")
def history(world):
    """By method the servers of some rounds, bare and with each step, all of the same uploads."""

    @functools.cache
    def run(name):
        bare = method_of(name)
        stepped = {
            key: transforms.server_step(bare, rate=rate, momentum=momentum, rank=rank)
            for key, (rate, momentum, rank) in (STEPS | (UNCUT if name in MOVING else {})).items()
        }
        federation = world.federation(bare)
        clients = jax.tree.map(lambda x: x[COHORT], federation.clients)
        servers = {"bare": federation.server}
        servers |= {key: world.federation(method).server for key, method in stepped.items()}
        sent = jax.jit(functools.partial(uploads_of, bare))
        aggregate = {key: jax.jit(method.aggregate) for key, method in stepped.items()}
        # A program does not depend on the rate.
        aggregate |= {"bare": jax.jit(bare.aggregate), "one": aggregate["two"]}
        rounds = [servers]
        for index in range(ROUNDS):
            uploads, clients = sent(servers["bare"], clients, jax.random.key(index))
            found = {key: aggregate[key](x, uploads, WEIGHTS)[0] for key, x in servers.items()}
            servers = {key: x._replace(round=x.round + 1) for key, x in found.items()}
            rounds.append(servers)
        assert all(function._cache_size() == 1 for function in aggregate.values())
        return rounds

    return run


def assert_models(got, want):
    for path, kernel in want.items():
        np.testing.assert_allclose(got[path], kernel, rtol=1e-5, atol=2e-5, err_msg=path)


def weighted(*terms):
    """Sum of weights times models."""
    return {path: sum(weight * model[path] for weight, model in terms) for path in terms[0][1]}


@pytest.mark.parametrize("name", STEPPING)
def test_a_step_of_one_is_the_method(history, name):
    for servers in history(name):
        assert_models(models_of(servers["one"]), models_of(servers["bare"]))


@pytest.mark.parametrize("name", STEPPING)
def test_a_step_of_two_goes_twice_as_far(history, name):
    """From round to round too, as the change of the model does not depend on where it is."""
    first = models_of(history(name)[0]["bare"])
    one, *_ = history(name)[1:]
    head = first["head"]
    for index, servers in enumerate(history(name)[1:]):
        bare = models_of(servers["bare"])
        wanted = weighted((2, bare), (-1, first))
        # The uploads are of the head that the bare method has.
        head = 2 * bare["head"] - head
        assert_models(models_of(servers["two"]), wanted | {"head": head})
        if index == 0:
            assert_models(models_of(one["two"]), wanted)
            assert all(np.abs(bare[path] - first[path]).max() > 1e-2 for path in bare)


@pytest.mark.parametrize("name", MOVING)
def test_momentum_is_that_of_the_formula(history, name):
    rounds = history(name)
    model = models_of(rounds[0]["uncut"])
    velocity = weighted((0, model))
    for before, after in zip(rounds, rounds[1:], strict=False):
        change = weighted((1, models_of(after["bare"])), (-1, models_of(before["bare"])))
        change["head"] = models_of(after["bare"])["head"] - model["head"]
        velocity = weighted((MOMENTUM, velocity), (1, change))
        model = weighted((1, model), (RATE, velocity))
        assert_models(models_of(after["uncut"]), model)
        assert_models(models_of(after["cut"]), {"head": model["head"]})


@pytest.mark.parametrize("name", STEPPING)
def test_what_a_cut_drops_is_not_forgotten(history, name):
    """The model and what its velocity has still to give are as if nothing had been cut."""
    begin, *rounds = history(name)
    first = models_of(begin["cut"])
    for servers in rounds:
        cut, bare = models_of(servers["cut"]), models_of(servers["bare"])
        paths = list(servers["cut"].trainable.adapters)
        velocities = servers["cut"].memory.own.velocity
        scale = float(servers["cut"].scale)
        for path, velocity in zip(paths, velocities, strict=True):
            given = scale * np.float64(velocity.a[0]) @ np.float64(velocity.b[0])
            assert np.linalg.matrix_rank(given) == 1
            wanted = RATE / (1 - MOMENTUM) * (bare[path] - first[path] - MOMENTUM * given)
            np.testing.assert_allclose(cut[path] - first[path], wanted, rtol=1e-5, atol=3e-5)


def test_one_program_for_all_rounds_and_rates(world):
    def wrapped(rate):
        return transforms.server_step(methods.fedit(), rate=rate, momentum=0.5)

    step = jax.jit(functools.partial(run_round, Recipe(world.task, wrapped(1.0), world.training)))
    reached = []
    for rate in (1.0, 2.0, 3.0):
        federation = world.federation(wrapped(rate))
        for _ in range(2):
            federation, _, _ = step(federation, world.data, COHORT, world.seed, jnp.float32(0.2))
        reached.append(models_of(federation.server)["first"])
    assert step._cache_size() == 1
    assert np.abs(reached[2] - reached[0]).max() > np.abs(reached[1] - reached[0]).max() > 1e-3


def privately(method):
    return transforms.private(method, clip=0.5, noise_multiplier=0.1)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        (transforms.scaffold, transforms.ordered),
        (privately, transforms.ordered),
        (lambda method: method, transforms.scaffold),
    ],
    ids=["scaffold", "privacy", "within scaffold"],
)
def test_a_step_of_one_is_nothing_around_and_within_others(world, inner, outer):
    reached = []
    for step in (lambda x: x, lambda x: transforms.server_step(x, rate=1.0)):
        method = outer(step(inner(methods.fedit())))
        federation = world.federation(method, (1, 2, 1, 2, 1, 2, 2))
        clients = jax.tree.map(lambda x: x[COHORT], federation.clients)

        @jax.jit
        def advance(server, clients, method=method):
            uploads, clients = uploads_of(method, server, clients, jax.random.key(1))
            return method.aggregate(server, uploads, WEIGHTS)[0], clients

        server, clients = advance(federation.server, clients)
        reached.append(models_of(advance(server, clients)[0]))
    assert_models(*reached)


# Scalars of a client's messages, see tests/methods/test_methods.py.
SIDES, HEAD = 6 + 10 + 10 + 7, 7 * 3 + 3


def counted(world, method, **options):
    federation = world.federation(method)
    made = communication.messages(method, federation.server, any_client(federation), 4)
    return communication.count(method, federation.server, made, 0, **options)


@pytest.mark.parametrize("name", STEPPING)
def test_a_velocity_is_sent_to_those_who_were_absent_alone(world, name):
    bare = method_of(name)
    plain = {absent: counted(world, bare, absent=absent) for absent in (0, 1)}
    for absent, wanted in plain.items():
        stepping = transforms.server_step(bare, rate=2.0)
        assert counted(world, stepping, absent=absent) == wanted
        method = transforms.server_step(bare, rate=2.0, momentum=0.5, rank=1)
        found = counted(world, method, absent=absent)
        # The kernels do not tell what the next velocity is made of.
        catch_up = wanted.catch_up + 4 * SIDES if absent else 0
        assert found == wanted._replace(catch_up=catch_up)


def test_a_client_of_a_small_rank_is_sent_the_adapters_whole(world):
    method = transforms.server_step(methods.fedit(), rate=2.0, momentum=0.5)
    found = counted(world, method, rank=1)
    assert found.up == 4 * (SIDES + HEAD) and found.down == 4 * (2 * SIDES + HEAD)
    control = counted(world, transforms.scaffold(method), rank=1)
    assert control.down == found.down + 4 * (SIDES + HEAD)


@pytest.mark.parametrize("name", MOVING)
def test_steps_survive_in_bfloat16(world, name):
    """What is merged is far below the last place of a kernel of bfloat16."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), world.server.backbone)
    servers = (
        world.server._replace(backbone=half),
        world.server._replace(backbone=jax.tree.map(lambda x: x.astype(jnp.float32), half)),
    )
    method = transforms.server_step(method_of(name), rate=2.0, momentum=0.5)
    changes = []
    for server in servers:
        federation = create(jax.random.key(5), method, server, len(COUNTS))
        first = server = federation.server
        clients = jax.tree.map(lambda x: x[COHORT], federation.clients)
        send = jax.jit(functools.partial(uploads_of, method))
        uploads, _ = jax.device_get(send(server, clients, jax.random.key(1)))
        small = lambda x, own: own + np.float32(1e-3) * (x - own)  # noqa: E731
        uploads = jax.tree.map(small, uploads, jax.device_get(server.trainable))
        aggregate = jax.jit(method.aggregate)
        for _ in range(2):
            server, _ = aggregate(server, uploads, WEIGHTS)
        assert jax.tree.map(jnp.result_type, server) == jax.tree.map(jnp.result_type, first)
        changes.append(weighted((1, models_of(server)), (-1, models_of(first))))
    for path in ("first", "second"):
        size = np.abs(changes[1][path]).max()
        assert 0 < size < 1e-2
        assert np.abs(changes[0][path] - changes[1][path]).max() < 0.02 * size


def test_nothing_dense_but_the_kernel_itself():
    """The velocity and what is merged, of a federation whose kernels have prime sides."""
    from fedlora_jax.transforms import _server_step

    adapters = {"one": Factors(jnp.ones((D_IN, 2)), jnp.ones((2, D_OUT)))}
    change = {"one": Factors(jnp.ones((D_IN, 7)), jnp.ones((7, D_OUT)))}
    step = _server_step._Step(
        jnp.float32(2), jnp.float32(0.5), _server_step._at_rest(adapters, None), ()
    )
    assert_never_dense(_server_step._with_momentum, step, change)


@pytest.mark.parametrize("name", sorted(methods.REGISTRY.keys() - set(STEPPING)))
def test_without_a_model_for_all_there_is_no_step(name):
    with pytest.raises(ValueError, match=method_of(name).refuses["server_step"][:30]):
        transforms.server_step(method_of(name), rate=2.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: transforms.server_step(m, rate=0), "rate must be above 0, got 0"),
        (lambda m: transforms.server_step(m, rate=float("nan")), "rate must be a finite number"),
        (
            lambda m: transforms.server_step(m, rate=1, momentum=1),
            "momentum must be at least 0 and below 1",
        ),
        (lambda m: transforms.server_step(m, rate=1, rank=0), "rank must be at least 1"),
        (
            lambda m: transforms.server_step(transforms.server_step(m, rate=2), rate=2),
            "steps already",
        ),
        (
            lambda m: transforms.server_step(
                transforms.server_optimizer(m, optax.sgd(1.0)), rate=2
            ),
            "steps already, in that of factors",
        ),
        (
            lambda m: transforms.server_optimizer(
                transforms.server_step(m, rate=2), optax.sgd(1.0)
            ),
            "steps already, in the space of products",
        ),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(methods.fedit())
