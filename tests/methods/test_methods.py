"""Properties of every method, on one round of unequal clients."""

import functools
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlora_jax import Factors, aggregation, lora, methods, transforms
from fedlora_jax.experiment.checkpoints import Checkpoints
from fedlora_jax.federated import communication
from fedlora_jax.federated.round import Recipe, create, run_round
from fedlora_jax.methods import Context, Server, Start, Trainable, Trained, change, trained_mask
from tests.world import COHORT, COUNTS, alone, any_client, method_of, train_by_hand

ALL = sorted(methods.REGISTRY)
EXACT = ["fedex_lora", "fedsvd", "ffa_lora", "flora", "oracle", "random_basis_lora", "rolora"]
MERGING = ["fedex_lora", "fedsmooth_lora", "flora", "frlora", "oracle", "random_basis_lora"]
PERSONAL = [name for name in ALL if method_of(name).personal is not None]
# Sizes of the two adapted kernels of the test's model, its rank, and the head's parameters.
D_IN, D_OUT, RANK, HEAD = 6 + 10, 10 + 7, 2, 7 * 3 + 3
WHOLE = RANK * (D_IN + D_OUT) + HEAD


@pytest.fixture(scope="module")
def cohort_of(world):
    """The state before a method's last round, what its clients did, and the state after it."""

    @functools.cache
    def run(name, rounds=1):
        before, after, _, result = world.run(name, [COHORT] * rounds)
        return before, result, after

    return run


def kernels(server, adapters):
    """The adapted kernels of `backbone + s adapters`, float64."""
    dense = lora.kernels(server.backbone)
    return {
        path: np.float64(dense[path]) + np.float64(server.scale) * np.float64(f.a) @ np.float64(f.b)
        for path, f in adapters.items()
    }


def models_of(server):
    return kernels(server, server.trainable.adapters)


def ideal(world, before, result):
    """`W + s sum_k p_k (a_k b_k + offset_k)` from what the clients arrived at."""
    counts = np.float64(world.data.counts[COHORT])
    changes = jax.device_get(jax.jit(jax.vmap(change))(result.start, result.trained))
    total = None
    for index, share in enumerate(counts / counts.sum()):
        mine = kernels(before.server, at(changes, index))
        mine = {path: share * kernel for path, kernel in mine.items()}
        total = mine if total is None else {path: total[path] + mine[path] for path in mine}
    return total


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("rounds", [1, 2])
def test_exact_methods_give_the_mean_of_the_clients_models(world, cohort_of, name, rounds):
    before, result, after = cohort_of(name, rounds=rounds)
    reached = kernels(after.server, after.server.trainable.adapters)
    start = kernels(before.server, before.server.trainable.adapters)
    for path, kernel in ideal(world, before, result).items():
        np.testing.assert_allclose(reached[path], kernel, rtol=1e-5, atol=2e-6)
        assert np.abs(reached[path] - start[path]).max() > 1e-4


@pytest.mark.parametrize("name", ALL)
def test_a_round_leaves_types_as_they_are_where_numbers_are_float64_by_default(world, name):
    """Another type after the first round is a second program."""

    def run(server):
        first = create(jax.random.key(0), method_of(name), server, len(COUNTS))
        recipe = Recipe(world.task, method_of(name), world.training)
        rate = jnp.float32(0.1)
        return first, run_round(recipe, first, world.data, COHORT, world.seed, rate)[0]

    with jax.enable_x64(True):
        first, after = jax.eval_shape(run, world.server)
    assert jax.tree.map(lambda x: x.dtype, first) == jax.tree.map(lambda x: x.dtype, after)


# With one client: all but those that truncate (fedsmooth_lora, spectral), leave the length of the
# product free (lora_fair), or have no global model (local; of fedsa_lora the server's b is none).
ALONE = sorted(set(ALL) - {"fedsmooth_lora", "spectral", "lora_fair", "local", "fedsa_lora"})


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("rounds", [1, 2])
def test_one_client_alone_is_centralised_training(world, name, rounds):
    """The global model is what plain LoRA steps on that client's data give, in its own words."""
    if name == "central":  # the world's data are not pooled, but one client is all there is here
        name = "fedit"
    before, after, _, result = world.run(name, [alone(3)] * rounds)
    first = at(result.start, 0)
    penalty = method_of(name).penalty

    def correct(gradient, trainable):
        """HetLoRA has a term of its own in the loss."""
        if penalty is None:
            return gradient
        mine = at(jax.device_get(before.clients), 3)
        slope = slope_of(penalty)(before.server, mine, first, trainable)
        return jax.tree.map(np.add, gradient, slope)

    trained = train_by_hand(
        world,
        3,
        first.trainable,
        rounds - 1,
        trains=trained_mask(first),
        backbone=before.server.backbone,
        correct=correct,
    )
    reached = kernels(after.server, after.server.trainable.adapters)
    for path, kernel in kernels(before.server, trained.adapters).items():
        np.testing.assert_allclose(reached[path], kernel, rtol=1e-3, atol=2e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5),
        after.server.trainable.head,
        trained.head,
    )


@functools.cache
def slope_of(penalty):
    """The gradient of a method's term in the loss, compiled once."""
    return jax.jit(jax.grad(penalty, argnums=3))


RANKED = [name for name in ALL if "unequal_ranks" not in method_of(name).refuses]
RANKS = (1, 2, 2, 1, 2, 1, 2)


@pytest.mark.parametrize("name", RANKED)
def test_clients_of_a_smaller_rank_train_and_send_no_more_than_that(world, name):
    before, after, metrics, result = world.run(name, [COHORT] * 2, ranks=RANKS)
    full = {path: f.rank for path, f in after.server.trainable.adapters.items()}
    ranks = np.array(RANKS)[COHORT]
    widest = ranks * max(full.values()) // RANK
    if name != "hetlora":  # which may have pruned
        np.testing.assert_array_equal(metrics.ranks, widest)
    assert (metrics.ranks <= widest).all()
    for path, trained in result.trained.adapters.items():
        for position, rank in enumerate(ranks * full[path] // RANK):
            assert not trained.a[position, :, rank:].any()
            assert not trained.b[position, rank:].any()
            assert trained.a[position, :, :rank].any() and trained.b[position, :rank].any()
    if name in EXACT:
        reached = kernels(after.server, after.server.trainable.adapters)
        for path, kernel in ideal(world, before, result).items():
            np.testing.assert_allclose(reached[path], kernel, rtol=1e-5, atol=2e-6)


# Of methods for unequal ranks, those whose clients get no best approximation, and why.
UNORDERED = {
    "central": "all data lie with one client, which has the whole rank",
    "fedsa_lora": "b stays with the client, in the basis that it was trained in",
    "ffa_lora": "a is the same for ever",
    "flora": "clients start afresh: the product is zero, and any first columns are as good",
    "hetlora": "its penalty puts in the first columns what matters",
    "local": "clients go on from their own",
    "random_basis_lora": "any part of a random basis is as good as another",
    "rolora": "the resting factor is not sent again",
}


@pytest.mark.parametrize("name", sorted(set(RANKED) - set(UNORDERED)))
def test_clients_of_a_smaller_rank_start_from_the_best_of_that_rank(world, name):
    """Within rounding of float32; what lies there in no order is far from it."""
    before, _, _, result = world.run(name, [COHORT] * 2, ranks=RANKS)
    method, weights = transforms.ordered(method_of(name)), world.data.counts[COHORT]
    plain, _ = method_of(name).aggregate(before.server, result.uploads, weights)
    server, _ = method.aggregate(before.server, result.uploads, weights)
    start = method.start(server, (), Context(jax.random.key(0), None, jnp.int32(1)))
    for path, factors in start.trainable.adapters.items():
        whole = plain.trainable.adapters[path]
        product = np.float64(whole.a) @ np.float64(whole.b)
        np.testing.assert_allclose(factors.a @ factors.b, product, atol=1e-6)
        u, s, v = np.linalg.svd(product)
        got = np.float64(factors.a[:, :1]) @ np.float64(factors.b[:1])
        np.testing.assert_allclose(got, s[0] * np.outer(u[:, 0], v[0]), atol=1e-5 * s[0])
        first = np.float64(whole.a[:, :1]) @ np.float64(whole.b[:1])
        assert not method.free_basis or np.linalg.norm(product - first) > 1.1 * s[1]


@pytest.mark.parametrize("name", sorted(UNORDERED))
def test_methods_that_hold_to_their_basis_are_left_alone(name):
    assert transforms.ordered(method_of(name)) is method_of(name)


@pytest.mark.parametrize("name", ALL)
def test_a_free_basis_is_of_methods_that_remember_nothing(world, name):
    if method_of(name).free_basis:
        federation = world.federation(method_of(name))
        assert federation.clients == () and federation.server.memory == ()


def test_what_remembers_a_basis_is_left_alone():
    for method in (
        transforms.scaffold(methods.fedit()),
        transforms.server_optimizer(methods.lora_fair(), optax.sgd(1.0, 0.9)),
        transforms.fedprox(transforms.scaffold(methods.fedit()), mu=0.1),
    ):
        assert transforms.ordered(method) is method
    kept = transforms.fedprox(methods.fedit(), mu=0.1)
    assert transforms.ordered(kept).aggregate is not kept.aggregate


@pytest.mark.parametrize("name", sorted(set(ALL) - set(RANKED)))
def test_unequal_ranks_are_refused_with_the_reason(world, name):
    with pytest.raises(ValueError, match="unequal ranks: its "):
        world.federation(method_of(name), RANKS)
    world.federation(method_of(name), [2] * len(RANKS))


@pytest.mark.parametrize(
    "ranks", [(1, 2), (0, 1, 1, 1, 1, 1, 1), (3, 1, 1, 1, 1, 1, 1), (1.9, 2, 2, 2, 2, 2, 2)]
)
def test_impossible_ranks_are_refused(world, ranks):
    with pytest.raises(ValueError, match="ranks of 7 clients, each from 1 to 2"):
        world.federation(method_of("fedit"), ranks)


def test_hetlora_prunes_a_tail_that_shrinks_and_keeps_what_it_pruned(world):
    method, penalty = methods.hetlora(pruning=5.0), jax.jit(aggregation.tail_penalty)
    step = jax.jit(functools.partial(run_round, Recipe(world.task, method, world.training)))
    ones = jax.tree.map(jnp.ones_like, world.server.trainable.adapters)
    server = world.server._replace(trainable=world.server.trainable._replace(adapters=ones))
    federation, ranks = world._replace(server=server).federation(method), []
    for _ in range(3):
        rate = jnp.float32(0.05)
        federation, metrics, result = step(federation, world.data, COHORT, world.seed, rate)
        ranks.append(np.asarray(metrics.ranks))
        # The state says what the next round has.
        kept = np.asarray(federation.clients)[COHORT]
        before, after = (
            np.array([penalty(at(tree, k), r) for k, r in enumerate(ranks[-1])])
            for tree in jax.device_get((result.start.trainable.adapters, result.trained.adapters))
        )
        pruned = (after < before) & (ranks[-1] > 1)
        np.testing.assert_array_equal(kept, np.where(pruned, ranks[-1] - 1, ranks[-1]))
    assert ranks[0].tolist() == [2] * 4 and ranks[-1].min() == 1
    assert (np.diff(ranks, axis=0) <= 0).all()
    absent = [client for client in range(len(RANKS)) if client not in COHORT.tolist()]
    assert (np.asarray(federation.clients)[absent] == 2).all()


def at(tree, position):
    return jax.tree.map(lambda x: x[position], tree)


@pytest.mark.parametrize("percent", [39, 50, 52, 59, 75, 78, 84, 90, 95, 99])
def test_hetlora_prunes_to_the_floor_exactly(percent):
    """Of adapters of ones the penalty of a tail is its length."""
    largest = 512
    ranks = np.arange(1, largest + 1)
    want = ranks * percent // 100
    ones = {"dense": Factors(jnp.ones((1, largest)), jnp.ones((largest, 1)))}

    @jax.vmap
    def length(rank):
        return aggregation.tail_penalty(ones, rank, decay=percent / 100)

    np.testing.assert_array_equal(np.round(length(ranks)), largest - want)
    method = methods.hetlora(decay=percent / 100)
    server = Server({}, Trainable(ones, {}), jnp.float32(1), (), jnp.int32(0))
    arrived = Trainable(jax.tree.map(jnp.zeros_like, ones), {})

    @jax.vmap
    def kept(rank):
        start = Start(Trainable(ones, {}), rank=rank)
        return method.finish(server, rank, start, Trained(arrived, arrived))[1]

    np.testing.assert_array_equal(kept(ranks), np.where(ranks > 1, want, 1))


def test_hetlora_without_pruning_is_its_aggregation_alone():
    assert methods.hetlora(pruning=0.0).penalty is None


@pytest.mark.parametrize("name", sorted(set(ALL) - set(MERGING)))
def test_backbone_is_touched_by_merging_methods_alone(world, cohort_of, name):
    _, _, after = cohort_of(name)
    jax.tree.map(np.testing.assert_array_equal, after.server.backbone, world.server.backbone)


@pytest.mark.parametrize("name", MERGING)
def test_merging_methods_do_touch_it(world, cohort_of, name):
    before, _, after = cohort_of(name)
    for path, kernel in lora.kernels(after.server.backbone).items():
        if path in after.server.trainable.adapters:
            assert np.abs(kernel - lora.kernels(before.server.backbone)[path]).max() > 1e-4


@pytest.mark.parametrize("name", ["ffa_lora", "fedsvd", "rolora"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_frozen_factors_do_not_move(cohort_of, name, rounds):
    _, result, _ = cohort_of(name, rounds=rounds)
    frozen = "b" if name == "rolora" and rounds == 2 else "a"
    moving = {"a": "b", "b": "a"}[frozen]
    for path, trained in result.trained.adapters.items():
        start = result.start.trainable.adapters[path]
        np.testing.assert_array_equal(getattr(trained, frozen), getattr(start, frozen))
        assert np.abs(getattr(trained, moving) - getattr(start, moving)).max() > 1e-4


@pytest.mark.parametrize("name", ALL)
def test_server_depends_on_what_is_sent_alone(world, cohort_of, name):
    """Arrays of the upload that do not cross may hold anything."""
    before, result, _ = cohort_of(name)
    method, weights = method_of(name), world.data.counts[COHORT].astype(jnp.float32)
    sent = {id(x) for x in jax.tree.leaves(method.sent(result.uploads, 0))}
    other = jax.tree.map(
        lambda x: x if id(x) in sent or method.pooled else x * 0 + 7, result.uploads
    )
    one, _ = method.aggregate(before.server, result.uploads, weights)
    two, _ = method.aggregate(before.server, other, weights)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), one, two)


def averaged():
    """The methods of which the page says that the server needs a mean alone."""
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    return re.findall(
        r"^\| `(\w+)` \| .* \| yes \| [^|]* \|$", page.split("sends and keeps")[1], re.M
    )


def test_the_page_says_of_some_that_a_mean_would_do():
    assert {"fedit", "fedsa_lora", "rolora"} < set(averaged()) and "flora" not in averaged()


@pytest.mark.parametrize("name", averaged())
def test_a_mean_would_do_where_the_page_says_so(world, cohort_of, name):
    """As many copies of the mean give the same server, to rounding."""
    weights = world.data.counts[COHORT].astype(jnp.float32)
    before, result, _ = cohort_of(name)
    mean = methods.mean(result.uploads, weights)
    copies = jax.tree.map(lambda x: np.stack([x] * len(COHORT)), mean)
    one, _ = method_of(name).aggregate(before.server, result.uploads, weights)
    two, _ = method_of(name).aggregate(before.server, copies, weights)
    for x, y in zip(*map(jax.tree.leaves, (model_and_head(one), model_and_head(two)))):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def model_and_head(server):
    return models_of(server), server.trainable.head


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scale", [np.int32(100_000_000), np.float32(1e37)])
def test_scale_and_type_of_weights_do_not_matter(world, cohort_of, name, scale):
    """The integers' sum, 3.6e9, is none of their type; that of the numbers is infinite."""
    before, result, _ = cohort_of(name)
    method, counts = method_of(name), np.asarray(world.data.counts[COHORT])
    one, _ = method.aggregate(before.server, result.uploads, counts.astype(np.float32))
    two, _ = method.aggregate(before.server, result.uploads, counts.astype(scale.dtype) * scale)
    for x, y in (one.trainable.head, two.trainable.head), (models_of(one), models_of(two)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), x, y)


@pytest.mark.parametrize("name", ALL)
def test_state_of_absent_clients_stays(world, cohort_of, name):
    before, _, after = cohort_of(name)
    absent = [i for i in range(len(world.data.counts)) if i not in COHORT.tolist()]
    for x, y in zip(jax.tree.leaves(before.clients), jax.tree.leaves(after.clients), strict=True):
        np.testing.assert_array_equal(np.asarray(x)[absent], np.asarray(y)[absent])


@pytest.mark.parametrize("name", ALL)
def test_a_restored_state_goes_on_to_the_bit(world, cohort_of, name, tmp_path):
    _, _, after = cohort_of(name)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, after)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore(1, world.federation(method_of(name)))
    checkpoints.close()
    _, _, second = cohort_of(name, rounds=2)
    # By way of NumPy, or the program would be compiled again for arrays tied to a device.
    resumed = world.go_on(name, jax.device_get(restored))
    jax.tree.map(np.testing.assert_array_equal, resumed, second)


# What rank 2 of `random_basis_lora` is in the kernels 6 x 10 and 10 x 7, for as many numbers.
WIDE = {"first": 2 * (6 + 10) // 10, "second": 2 * (10 + 7) // 7}
WIDE_B = WIDE["first"] * 10 + WIDE["second"] * 7

# Scalars up and down for one client of a cohort of four, by METHODS' formulas.
SCALARS = {
    "central": (0, 0),
    "fedex_lora": (WHOLE, WHOLE + 3 * RANK * (D_IN + D_OUT)),
    "fedit": (WHOLE, WHOLE),
    "fedrot_lora": (WHOLE, WHOLE),
    "fedsa_lora": (RANK * D_IN, RANK * D_IN),
    "fedsmooth_lora": (WHOLE, WHOLE),
    "fedsvd": (RANK * D_OUT + HEAD, WHOLE),
    "ffa_lora": (RANK * D_OUT + HEAD, RANK * D_OUT + HEAD),
    "flexlora": (WHOLE, WHOLE),
    "flora": (WHOLE, 4 * RANK * (D_IN + D_OUT) + HEAD),
    "flora_na": (WHOLE, WHOLE),
    "frlora": (WHOLE, WHOLE),
    "hetlora": (WHOLE, WHOLE),
    "local": (0, 0),
    "lora_fair": (WHOLE, WHOLE),
    "oracle": (WHOLE, WHOLE + 3 * RANK * (D_IN + D_OUT)),
    "random_basis_lora": (WIDE_B + HEAD, WIDE_B + HEAD),
    "rolora": (RANK * D_OUT + HEAD, RANK * D_OUT + HEAD),
    "spectral": (WHOLE, WHOLE),
}


def counted(world, method, round_index):
    """Bytes up and down of one client of a cohort of four, before anything is trained."""
    federation = world.federation(method)
    made = communication.messages(method, federation.server, any_client(federation), 4)
    # Shapes alone: `spectral` counts by the values, which are all zero here.
    federation = jax.eval_shape(lambda x: x, federation)
    return communication.count(method, federation.server, made, round_index)[:2]


@pytest.mark.parametrize("name", ALL)
def test_bytes_are_those_of_the_formulas(world, name):
    method = method_of(name)
    assert counted(world, method, 0) == tuple(4 * scalars for scalars in SCALARS[name])


@pytest.mark.parametrize("name", ALL)
def test_bytes_are_those_of_the_arrays_that_cross(world, cohort_of, name):
    before, result, after = cohort_of(name)
    method = method_of(name)
    made = communication.messages(method, before.server, any_client(before), len(COHORT))
    counted = communication.count(method, after.server, made, 0)
    upload = at(result.uploads, 0)
    arrays = jax.tree.leaves(method.sent(upload, 0))
    assert counted.up == sum(np.asarray(x).nbytes for x in arrays)
    _, aggregated = method.aggregate(before.server, result.uploads, jnp.ones(len(COHORT)))
    arrays = jax.tree.leaves(method.received(after.server, aggregated, 0))
    assert counted.down == sum(np.asarray(x).nbytes for x in arrays)


def test_spectral_receives_the_directions_that_were_kept(world):
    method = methods.spectral(threshold=0.5)
    step = jax.jit(functools.partial(run_round, Recipe(world.task, method, world.training)))
    federation = world.federation(method)
    made = communication.messages(method, federation.server, any_client(federation), len(COHORT))
    federation, _, _ = step(federation, world.data, COHORT, world.seed, jnp.float32(0.2))
    sizes = {"first": 6 + 10, "second": 10 + 7}
    scalars = HEAD
    for path, factors in federation.server.trainable.adapters.items():
        kept = int(np.any(np.asarray(factors.b) != 0, axis=1).sum())
        assert kept == 1
        scalars += kept * sizes[path]
    assert communication.count(method, federation.server, made, 0).down == 4 * scalars


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "flexlora", "flora", "fedsa_lora"])
def test_bytes_of_unequal_ranks(world, name):
    """Up and down of a whole cohort of ranks 1, 2, 1, 2, by METHODS' formulas."""
    method = method_of(name)
    federation = world.federation(method, RANKS)
    made = communication.messages(method, federation.server, any_client(federation), len(COHORT))
    ranks = [RANKS[client] for client in COHORT.tolist()]
    each = [communication.count(method, federation.server, made, 0, rank=rank) for rank in ranks]
    up, down = {
        "fedit": ([r * (D_IN + D_OUT) + HEAD for r in ranks],) * 2,
        "ffa_lora": ([r * D_OUT + HEAD for r in ranks],) * 2,
        "flexlora": ([r * (D_IN + D_OUT) + HEAD for r in ranks],) * 2,
        "flora": (
            [r * (D_IN + D_OUT) + HEAD for r in ranks],
            [sum(ranks) * (D_IN + D_OUT) + HEAD] * len(ranks),
        ),
        "fedsa_lora": ([r * D_IN for r in ranks],) * 2,
    }[name]
    assert sum(x.up for x in each) == 4 * sum(up)
    assert sum(x.down for x in each) == 4 * sum(down)


@pytest.mark.parametrize("step", [None, 2.0])
def test_a_merged_mean_is_sent_whole_to_clients_of_small_ranks(world, step):
    """It is in the backbone on which they all go on, and of the rank of the widest client."""
    method = method_of("random_basis_lora")
    if step is not None:
        method = transforms.server_step(method, rate=step)
    federation = world.federation(method, RANKS)
    made = communication.messages(method, federation.server, any_client(federation), len(COHORT))
    half = max(WIDE.values()) // 2
    found = communication.count(method, federation.server, made, 0, rank=half, absent=1)
    sent = WIDE["first"] // 2 * 10 + half * 7
    assert found == (4 * (sent + HEAD), 4 * (WIDE_B + HEAD), 4 * WIDE_B)


DENSE = 6 * 10 + 10 * 7
RESIDUALS = {
    "fedex_lora": 3 * RANK * (D_IN + D_OUT),
    "oracle": 3 * RANK * (D_IN + D_OUT),
    "flora": 4 * RANK * (D_IN + D_OUT),
    "frlora": RANK * (D_IN + D_OUT),
    "fedsmooth_lora": RANK * (D_IN + D_OUT),
    "random_basis_lora": WIDE_B,
    "rolora": RANK * D_IN,
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("absent", [0, 1, 2, 5])
def test_catching_up_costs_the_residuals_missed_or_the_kernels_themselves(world, name, absent):
    method = method_of(name)
    federation = world.federation(method)
    made = communication.messages(method, federation.server, any_client(federation), len(COHORT))
    found = communication.count(method, federation.server, made, 0, absent=absent)
    once = RESIDUALS.get(name, 0)
    times = min(absent, 1) if name == "rolora" else absent
    assert found.catch_up == 4 * min(times * once, DENSE)


def test_rolora_sends_the_other_factor_in_odd_rounds(world):
    method = method_of("rolora")
    found = counted(world, method, 1)
    assert found == (4 * (RANK * D_IN + HEAD),) * 2


@pytest.mark.parametrize("name", PERSONAL)
def test_personal_models_are_each_clients_own(cohort_of, name):
    _, _, after = cohort_of(name)
    own = jax.jit(jax.vmap(method_of(name).personal, in_axes=(None, 0)))
    personal = jax.device_get(own(after.server, jax.tree.map(lambda x: x[COHORT], after.clients)))
    found = [kernels(after.server, at(personal, k).adapters) for k in range(len(COHORT))]
    for path in found[0]:
        for one, other in itertools.combinations(found, 2):
            assert np.abs(one[path] - other[path]).max() > 1e-4


@pytest.mark.parametrize("name", ["fedsa_lora", "local"])
def test_personal_model_is_what_the_client_kept(world, cohort_of, name):
    _, result, after = cohort_of(name)
    for position, client in enumerate(COHORT.tolist()):
        own = method_of(name).personal(after.server, at(after.clients, client))
        for path, factors in own.adapters.items():
            trained = at(result.trained.adapters[path], position)
            np.testing.assert_array_equal(factors.b, trained.b)
            if name == "local":
                np.testing.assert_array_equal(factors.a, trained.a)
            else:
                np.testing.assert_array_equal(factors.a, after.server.trainable.adapters[path].a)


@pytest.mark.parametrize("name", ["fedsmooth_lora"])
def test_clients_that_go_on_are_judged_where_they_ended(world, cohort_of, name):
    """Up to what the truncation to rank r drops of a change of rank 2 r."""
    _, result, after = cohort_of(name)
    personal = jax.jit(method_of(name).personal)
    # Here no two layers have one shape.
    uploads = {
        path: jax.tree.map(lambda x: x[:, 0], factors)
        for path, factors in zip(
            after.server.trainable.adapters, result.uploads.adapters, strict=True
        )
    }
    for client in range(len(world.data.counts)):
        mine = at(jax.device_get(after.clients), client)
        reached = kernels(after.server, personal(after.server, mine).adapters)
        for path, kernel in reached.items():
            if client not in COHORT.tolist():
                np.testing.assert_allclose(kernel, lora.kernels(after.server.backbone)[path])
                continue
            upload = at(uploads[path], COHORT.tolist().index(client))
            whole = world.server.backbone[path]["kernel"] + 1.5 * np.asarray(upload.a @ upload.b)
            np.testing.assert_allclose(kernel, whole, rtol=1e-4, atol=1e-5)


def test_defaults_of_every_method_make_it():
    for name in ALL:
        methods.get(name)(**methods.defaults(name))


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, key) for name in ALL for key, x in methods.defaults(name).items() if type(x) is str],
)
def test_an_unknown_value_is_refused_when_a_method_is_made(name, option):
    with pytest.raises(ValueError, match="'zzz'. Valid names: "):
        methods.get(name)(**{option: "zzz"})


def test_a_solver_that_does_not_fit_is_refused_when_a_method_is_made():
    with pytest.raises(ValueError, match="solves similarity='frobenius', not 'cosine'"):
        methods.lora_fair(solver="closed_form")
    methods.lora_fair(solver="closed_form", similarity="frobenius")


def test_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="'lora_fair'"):
        methods.get("lorafair")
