"""Local training and the round, against plain Python and against themselves in other orders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlora_jax import lora, methods
from fedlora_jax.experiment import memory
from fedlora_jax.federated import faults
from fedlora_jax.federated.cohort import sample
from fedlora_jax.federated.round import (
    Recipe,
    create,
    make_cohort_round,
    make_round,
    run_round,
    train_cohort,
)
from fedlora_jax.federated.task import Weighted
from fedlora_jax.methods import Trainable
from tests.world import (
    COHORT,
    COUNTS,
    NOBODY,
    alone,
    learning_rate,
    method_of,
    positions,
    train_by_hand,
)

AVERAGING = ["fedit", "lora_fair", "flora_na"]


def assert_close(got, want, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), got, want)


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def rounds(world, name, cohorts, **options):
    """Runs a round for each cohort; returns the federation and the metrics of the last round."""
    _, federation, metrics, _ = world.run(name, cohorts, **options)
    return federation, metrics


def model(server):
    """The parameters of the global model."""
    merged = lora.merge(server.backbone, server.trainable.adapters, scale=server.scale)
    return lora.join_head(merged, server.trainable.head)


def test_round_is_training_by_hand_and_averaging(world):
    federation, metrics = rounds(world, "fedit", [COHORT])
    trained = [train_by_hand(world, client, world.server.trainable) for client in COHORT]
    shares = np.float32(COUNTS)[COHORT] / np.sum(np.array(COUNTS)[COHORT])
    mean = jax.tree.map(lambda *x: sum(p * y for p, y in zip(shares, x, strict=True)), *trained)
    assert_close(federation.server.trainable, mean)
    assert int(metrics.excluded) == 0
    assert float(metrics.aggregation_error) > 1e-3
    assert_equal(federation.server.backbone, world.server.backbone)


def test_equal_weights(world):
    federation, _ = rounds(world, "fedit", [COHORT], equal_weights=True)
    trained = [train_by_hand(world, client, world.server.trainable) for client in COHORT]
    assert_close(federation.server.trainable, jax.tree.map(lambda *x: sum(x) / len(x), *trained))


def test_epochs_are_passes_over_the_clients_own_data(world):
    training = world.training._replace(steps=0, epochs=2)
    # Batches of 6 from 3, 4, 17 and 12 examples.
    assert training.steps_of(world.data.counts[COHORT]).tolist() == [2, 2, 6, 4]
    expected = [
        train_by_hand(world, client, world.server.trainable, training=training)
        for client in COHORT.tolist()
    ]
    step = functools.partial(run_round, Recipe(world.task, method_of("fedit"), training))
    federation = world.federation(method_of("fedit"))
    _, metrics, result = jax.jit(step)(federation, world.data, COHORT, world.seed, jnp.float32(0.2))
    got = jax.device_get(result.trained)
    for position, trained in enumerate(expected):
        assert_close(jax.tree.map(lambda x, k=position: x[k], got), trained)
    assert np.isfinite(metrics.client_loss).all()


@pytest.mark.parametrize(
    ("name", "chunk"), [("fedit", 1), ("fedit", 3), ("fedsmooth_lora", 3), ("local", 3)]
)
def test_chunks_of_a_cohort_give_what_the_cohort_gives(world, name, chunk):
    whole, after, _, result = world.run(name, [COHORT])
    recipe = Recipe(world.task, method_of(name), world.training, clients_per_chunk=chunk)
    chunked, metrics, pieces = jax.jit(functools.partial(run_round, recipe))(
        whole, world.data, COHORT, world.seed, jnp.float32(0.2)
    )
    # FedSmoothLoRA's start is made of singular vectors, which magnify rounding.
    assert_close(model(chunked.server), model(after.server), rtol=1e-3, atol=1e-3)
    assert_close(pieces.loss, result.loss, rtol=1e-3)
    assert metrics.client_loss.shape == COHORT.shape


def test_no_client_waits_for_one_of_another_chunk(world):
    steps, uploads = {}, {}
    counts = -(-np.asarray(world.data.counts)[COHORT] // world.training.batch_size)
    for chunk in (None, 1, 3):
        taken = steps[chunk] = []

        def update(updates, state, params=None, taken=taken):
            jax.debug.callback(lambda: taken.append(1))
            return updates, state

        counting = optax.GradientTransformation(optax.init_empty_state, update)
        optimizer = optax.chain(world.training.optimizer, counting)
        training = world.training._replace(optimizer=optimizer, steps=0, epochs=1)
        recipe = Recipe(world.task, method_of("fedit"), training, clients_per_chunk=chunk)
        federation = world.federation(method_of("fedit"))
        state = (federation, world.data, COHORT, world.seed, jnp.float32(0.2))
        uploads[chunk] = jax.jit(functools.partial(train_cohort, recipe))(*state).uploads
        assert_close(uploads[chunk], uploads[None])
    jax.effects_barrier()
    assert len(set(counts)) > 1
    assert len(steps[None]) == counts.max()
    assert len(steps[1]) == counts.sum()
    assert len(steps[3]) == counts[:3].max() + counts[3]


def test_chunks_bound_the_memory(world):
    """What the compiler plans for six clients at once, and for one at a time."""
    training = world.training._replace(batch_size=256)
    federation, cohort = world.federation(method_of("fedit")), jnp.arange(6)
    needed = []
    for chunk in (None, 1):
        recipe = Recipe(world.task, method_of("fedit"), training, clients_per_chunk=chunk)
        function = make_round(recipe)
        arguments = (federation, world.data, cohort, world.seed, jnp.float32(0.2))
        found = memory.estimate(function, *arguments)
        needed.append(found.working)
        assert found.held > 0 and "to train" in str(found)
    assert needed[1] < needed[0] / 2


def test_rounds_may_be_a_part_of_other_programs(world):
    """A scan over them with gradients through it, within another jit, and of constants alone."""
    method = method_of("fedit")
    training = world.training._replace(optimizer=optax.sgd(1.0), steps=2)
    one_round = make_round(Recipe(world.task, method, training))
    federation = last = world.federation(method)
    rates = (0.1, 0.2)

    def loss(factor):
        def step(state, rate):
            state, metrics = one_round(state, world.data, COHORT, world.seed, factor * rate)
            return state, metrics.loss

        after, losses = jax.lax.scan(step, federation, jnp.array(rates))
        return losses[-1], after

    for rate in rates:
        last, metrics = one_round(last, world.data, COHORT, world.seed, rate)
    with_slope = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (found, after), slope = with_slope(1.0)
    assert_close(after, last)
    assert found == pytest.approx(float(metrics.loss), rel=1e-5)
    higher, lower = (float(with_slope(factor)[0][0]) for factor in (1.02, 0.98))
    assert slope == pytest.approx((higher - lower) / 0.04, rel=0.02)
    constant = jax.jit(lambda: one_round(federation, world.data, COHORT, world.seed, rates[0]))
    again = one_round(*constant()[:1], world.data, COHORT, world.seed, rates[1])[0]
    assert_close(again, last)


@pytest.mark.parametrize("make", [make_round, make_cohort_round])
def test_batches_of_nothing_are_refused(world, make):
    training = world.training._replace(batch_size=0)
    with pytest.raises(ValueError, match="training: batch_size must be at least 1, got 0"):
        make(Recipe(world.task, method_of("fedit"), training))


@pytest.mark.parametrize("make", [make_round, make_cohort_round])
def test_training_that_takes_no_steps_is_refused(world, make):
    training = world.training._replace(steps=0, epochs=0)
    with pytest.raises(ValueError, match="training: steps or epochs must be at least 1"):
        make(Recipe(world.task, method_of("fedit"), training))


def test_a_project_may_forbid_itself_promotion_of_types(world):
    """With an optimiser that does without; `test_transforms` has methods and combinations."""
    method = method_of("fedit")._replace(diagnosed=True)
    training = world.training._replace(steps=0, epochs=1, faults=faults.make("huge", share=0.25))
    one_round = make_round(Recipe(world.task, method, training, clients_per_chunk=2))
    federation = world.federation(method)
    arguments = (federation, world.data, COHORT, world.seed, jnp.float32(0.1))
    expected = jax.eval_shape(one_round, *arguments)
    with jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(one_round, *arguments) == expected


@pytest.mark.parametrize("seed", [0, np.int64(3), jnp.int32(0)])
def test_a_number_is_no_key(world, seed):
    function = make_round(Recipe(world.task, method_of("fedit"), world.training))
    federation = world.federation(method_of("fedit"))
    with pytest.raises(ValueError, match=r"a key, such as jax.random.key\(0\); got a single int"):
        function(federation, world.data, COHORT, seed, 0.1)
    with pytest.raises(ValueError, match="the seed must be a key"):
        sample(seed, 0, num_clients=4, cohort_size=2)


def test_a_layer_is_adapted_or_trained_whole(world):
    head = {"head": next(iter(world.server.trainable.adapters.values()))}
    trainable = world.server.trainable._replace(adapters=world.server.trainable.adapters | head)
    server = world.server._replace(trainable=trainable)
    with pytest.raises(ValueError, match=r"adapters on \['head'\], which are not in its backbone"):
        create(jax.random.key(0), methods.fedit(), server, len(COUNTS))


def test_data_of_more_clients_than_there_are_are_refused(world):
    few = world.federation(method_of("fedit"))
    few = few._replace(ranks=few.ranks[:3])
    function = make_round(Recipe(world.task, method_of("fedit"), world.training))
    with pytest.raises(ValueError, match="data are of 7 clients, the federation has 3"):
        function(few, world.data, COHORT[:2], world.seed, 0.1)


NOT_BY_EXAMPLE = {
    "a mean": lambda values, batch: jnp.mean(values),
    "no weights": lambda values, batch: values[:, 0],
    "means": lambda values, batch: Weighted(jnp.mean(values), jnp.float32(1)),
    "by class": lambda values, batch: Weighted(values, jnp.ones_like(values)),
    "one weight": lambda values, batch: Weighted(values[:, 0], jnp.float32(1)),
}


@pytest.mark.parametrize("what", NOT_BY_EXAMPLE)
@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_loss_not_by_example_is_refused(world, what, batch_size):
    """Two losses without weights would be taken for a loss and a weight."""
    task = world.task._replace(loss=NOT_BY_EXAMPLE[what])
    recipe = Recipe(task, method_of("fedit"), world.training._replace(batch_size=batch_size))
    inputs = (world.federation(method_of("fedit")), world.data, COHORT, world.seed, 0.1)
    with pytest.raises(ValueError, match=rf"loss.*Weighted.*\[{batch_size}\] each.*equally"):
        jax.eval_shape(functools.partial(run_round, recipe), *inputs)


def test_memory_that_does_not_fit_is_seen():
    assert memory.Memory(1, 2, None).fits and memory.Memory(1, 2, 3).fits
    assert not memory.Memory(2, 2, 3).fits
    assert str(memory.Memory(10**6, 2 * 10**9, 8 * 10**9)) == (
        "1 MB of state and data, 2.0 GB to train, of 8.0 GB that are free"
    )


def test_second_round_starts_from_the_first_with_its_own_rate_and_batches(world):
    federation, _ = rounds(world, "fedit", [COHORT, alone(0)])
    first, _ = rounds(world, "fedit", [COHORT])
    assert_close(
        federation.server.trainable, train_by_hand(world, 0, first.server.trainable, round_index=1)
    )


@pytest.mark.parametrize("name", AVERAGING)
def test_one_client_is_its_own_aggregate(world, name):
    federation, metrics = rounds(world, name, [alone(0)])
    trained = train_by_hand(world, 0, world.server.trainable)
    for path, (a, b) in federation.server.trainable.adapters.items():
        start, end = world.server.trainable.adapters[path], trained.adapters[path]
        product = np.asarray(a @ b)
        if name == "lora_fair":  # the cosine leaves the length of the product free
            product = product * np.linalg.norm(end.a @ end.b) / np.linalg.norm(product)
        np.testing.assert_allclose(product, end.a @ end.b, rtol=1e-3, atol=1e-5)
        assert not np.allclose(product, start.a @ start.b)
    if name != "lora_fair":
        assert float(metrics.aggregation_error) < 1e-5


@pytest.mark.parametrize("name", sorted(methods.REGISTRY))
def test_order_of_clients_does_not_matter(world, name):
    order = jnp.array([2, 0, 3, 1])
    one, metrics = rounds(world, name, [COHORT, COHORT])
    two, permuted = rounds(world, name, [COHORT[order], COHORT[order]])
    # Of the factors only the product is unique.
    assert_close(model(two.server), model(one.server), rtol=1e-3, atol=1e-3)
    assert_close(permuted.client_loss, metrics.client_loss[order], rtol=1e-3)


@pytest.mark.parametrize("name", AVERAGING)
def test_nothing_recompiles_after_the_first_round(world, name, caplog):
    method = method_of(name)
    function = make_round(Recipe(world.task, method, world.training))
    federation = world.federation(method)
    federation, _ = function(federation, world.data, COHORT, world.seed, jnp.float32(0.2))
    cohorts, seeds = [COHORT + 0, COHORT - 0], [jax.random.key(seed) for seed in (3, 4)]
    caplog.clear()
    with jax.log_compiles():
        for cohort, seed in zip(cohorts, seeds, strict=True):
            rate = learning_rate(federation)
            federation, _ = function(federation, world.data, cohort, seed, rate)
    assert not [record for record in caplog.records if "ompiling" in record.message]


def test_jit_equals_no_jit(world):
    """Small: without jit each operation on each shape is a program of its own."""
    method, cohort = methods.lora_fair(steps=2), COHORT[:2]
    adapters, head = world.server.trainable
    trainable = Trainable({"second": adapters["second"]}, head)
    world = world._replace(server=world.server._replace(trainable=trainable))
    training = world.training._replace(optimizer=optax.sgd(1.0), steps=2)
    step = functools.partial(run_round, Recipe(world.task, method, training))
    state = (world.federation(method), world.data, cohort, world.seed, jnp.float32(0.2))
    jitted, _, _ = jax.jit(step)(*state)
    with jax.disable_jit():
        plain, _, _ = step(*state)
    assert_close(plain, jitted)


@pytest.mark.parametrize("name", AVERAGING)
def test_diverged_client_is_left_out(world, name):
    poisoned = int(positions(world.data, 2)[0])
    x = world.data.examples["x"].at[poisoned].set(jnp.nan)
    bad = world._replace(data=world.data._replace(examples={**world.data.examples, "x": x}))
    with_it, metrics = rounds(bad, name, [COHORT])
    without, _ = rounds(world, name, [alone(0, 3, 6)])
    assert int(metrics.excluded) == 1
    assert np.isfinite(metrics.loss) and np.isfinite(metrics.aggregation_error)
    assert_close(with_it.server.trainable, without.server.trainable)


def test_diverged_client_keeps_its_last_state(world):
    poisoned = int(positions(world.data, 2)[0])
    x = world.data.examples["x"].at[poisoned].set(jnp.nan)
    bad = world._replace(data=world.data._replace(examples={**world.data.examples, "x": x}))
    federation, _ = rounds(bad, "local", [COHORT])
    kept = jax.tree.map(lambda x: x[2], jax.device_get(federation.clients))
    assert_equal(kept, world.server.trainable)


def test_if_all_diverge_the_server_keeps_its_state(world):
    x = jnp.full_like(world.data.examples["x"], jnp.nan)
    bad = world._replace(data=world.data._replace(examples={**world.data.examples, "x": x}))
    federation, metrics = rounds(bad, "fedit", [COHORT])
    assert int(metrics.excluded) == len(COHORT)
    assert_equal(federation.server.trainable, world.server.trainable)


def test_a_place_of_nobody_changes_nobody(world):
    """Wherever it is, also beside the last of all clients."""
    one, metrics = rounds(world, "local", [jnp.array([NOBODY, 6, NOBODY, 0])])
    two, _ = rounds(world, "local", [alone(0, 6)])
    assert_equal(one.clients, two.clients)
    assert int(metrics.excluded) == 0
    for x in map(np.asarray, jax.tree.leaves(one.clients)):
        moved = np.any(x != x[3], axis=tuple(range(1, x.ndim)))
        assert moved.tolist() == [k in (0, 6) for k in range(7)]


@pytest.mark.parametrize("name", ["fedit", "local"])
def test_a_client_that_is_not_there_is_nobody(world, name):
    """And not the last one once more."""
    one, metrics = rounds(world, name, [jnp.array([0, 7, 6, 10**6])])
    two, _ = rounds(world, name, [jnp.array([0, NOBODY, 6, NOBODY])])
    assert_equal(one, two)
    assert int(metrics.excluded) == 0


def test_local_clients_train_alone_and_absent_ones_stay(world):
    federation, metrics = rounds(world, "local", [COHORT])
    clients = jax.device_get(federation.clients)
    for client in range(len(world.data.counts)):
        got = jax.tree.map(lambda x, c=client: x[c], clients)
        if client in COHORT.tolist():
            assert_close(got, train_by_hand(world, client, world.server.trainable))
        else:
            assert_equal(got, world.server.trainable)
    assert_equal(federation.server.trainable, world.server.trainable)
    assert np.isnan(metrics.aggregation_error)


def test_padding_never_moves_anything(world):
    """What stands beyond the last client's positions may be anything."""
    total = int(world.data.counts.sum())
    padded = jnp.pad(world.data.positions[:total], (0, 9), constant_values=1)
    other = world.data._replace(positions=padded)
    one, _ = rounds(world, "fedit", [COHORT])
    two, _ = rounds(world._replace(data=other), "fedit", [COHORT])
    assert_equal(one, two)


def test_trainable_is_adapters_and_head(world):
    assert isinstance(world.server.trainable, Trainable)
    assert set(world.server.trainable.head) == {"head"}


def test_what_no_round_changes_is_not_copied(world):
    """Of a backbone that nothing is merged into there is one, before and after."""
    for name, merges in (("fedit", False), ("fedex_lora", True)):
        method = method_of(name)
        function = make_cohort_round(Recipe(world.task, method, world.training))
        state = world.federation(method)
        arguments = (state.ranks, world.data, COHORT, world.seed, learning_rate(state))
        server, *_ = function(state.server, (), *arguments)
        same = jax.tree.map(lambda x, y: x is y, server.backbone, state.server.backbone)
        assert same["first"]["bias"] and same["first"]["kernel"] != merges
        assert_close(server, world.run(name, [COHORT])[1].server)
