"""Combinations: that each does what its formula says, and which methods refuse it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlora_jax import methods, transforms
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.round import Recipe, run_round
from tests.world import COHORT, COUNTS, any_client, method_of, positions, train_by_hand

ALL = sorted(methods.REGISTRY)
COMBINE = {
    "fedprox": lambda method: transforms.fedprox(method, mu=0.3),
    "scaffold": transforms.scaffold,
    "server_optimizer": lambda method: transforms.server_optimizer(method, optax.adam(0.1)),
    "server_step": lambda method: transforms.server_step(method, rate=2.0, momentum=0.5),
    "privacy": lambda method: transforms.private(method, clip=0.5, noise_multiplier=1.0),
}


def assert_close(got, want, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), got, want)


def run(world, method, rounds=1, training=None, cohort=COHORT):
    """States before and after each round, and what the clients did; of NumPy, as in `World.run`."""
    step = jax.jit(
        functools.partial(run_round, Recipe(world.task, method, training or world.training))
    )
    federation, history = world.federation(method), []
    for index in range(rounds):
        rate = jnp.float32(0.2 / (1 + index))
        after, metrics, result = step(federation, world.data, cohort, world.seed, rate)
        history.append(jax.device_get((federation, result, metrics, after)))
        federation = after
    return history


def products(server):
    return {path: f.a @ f.b for path, f in server.trainable.adapters.items()}


def mean(trees, shares=None):
    shares = world_shares() if shares is None else shares
    return jax.tree.map(lambda *x: sum(p * y for p, y in zip(shares, x, strict=True)), *trees)


def world_shares():
    counts = np.array(COUNTS)[np.asarray(COHORT)]
    return counts / counts.sum()


@pytest.mark.parametrize("combination", COMBINE)
@pytest.mark.parametrize("name", ALL)
def test_every_method_combines_or_says_why_not(world, name, combination):
    """Also where promotion of axes is forbidden, and that of types, which optax's Adam needs."""
    method = methods.get(name)()
    reason = method.refuses.get(combination)
    if reason:
        with pytest.raises(ValueError, match=reason[:30]):
            COMBINE[combination](method)
        return
    method = COMBINE[combination](method)
    federation = world.federation(method)
    step = functools.partial(run_round, Recipe(world.task, method, world.training))
    arguments = (federation, world.data, COHORT, world.seed, jnp.float32(0.1))
    promotion = "standard" if combination == "server_optimizer" else "strict"
    with jax.numpy_dtype_promotion(promotion), jax.numpy_rank_promotion("raise"):
        after, _, _ = jax.eval_shape(step, *arguments)
    same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), federation, after)
    assert all(jax.tree.leaves(same))


def test_refusals_are_of_known_combinations():
    for name in ALL:
        assert set(methods.get(name)().refuses) <= set(methods.COMBINATIONS)


def test_fedprox_pulls_towards_the_start(world):
    (_, result, _, _), *_ = run(world, transforms.fedprox(methods.fedit(), mu=0.7))
    start = jax.device_get(world.server.trainable)

    def correct(gradient, trainable):
        return jax.tree.map(lambda g, x, y: g + 0.7 * (x - y), gradient, trainable, start)

    for position, client in enumerate(COHORT):
        got = jax.tree.map(lambda x, k=position: x[k], result.trained)
        assert_close(got, train_by_hand(world, client, start, correct=correct))


def test_fedprox_of_mu_zero_is_the_method(world):
    one = run(world, transforms.fedprox(methods.fedit(), mu=0.0))[0]
    _, after, _, _ = world.run("fedit", [COHORT])
    assert_close(one[-1].server.trainable, after.server.trainable)


@pytest.fixture(scope="module")
def scaffolded(world):
    """Two rounds with plain SGD, where the mean gradient is the paper's option II."""
    training = LocalTraining(optax.sgd(1.0), batch_size=6, steps=3)
    method = transforms.scaffold(methods.fedit())
    return training, run(world, method, rounds=2, training=training)


def test_scaffold_is_algorithm_1(world, scaffolded):
    training, history = scaffolded
    zero = jax.tree.map(np.zeros_like, world.server.trainable)
    server_control, own = zero, {int(client): zero for client in COHORT}
    reached = jax.device_get(world.server.trainable)
    for index, (_, _, _, after) in enumerate(history):
        rate, trained = 0.2 / (1 + index), []
        changes = []
        for client in COHORT.tolist():
            shift = jax.tree.map(np.subtract, server_control, own[client])
            end = train_by_hand(
                world,
                client,
                reached,
                index,
                training=training,
                correct=lambda g, _, shift=shift: jax.tree.map(np.add, g, shift),
            )
            moved = jax.tree.map(lambda x, y, r=rate: (x - y) / (3 * r), reached, end)
            new = jax.tree.map(lambda m, s: m - s, moved, shift)  # option II
            changes.append(jax.tree.map(np.subtract, new, own[client]))
            own[client] = new
            trained.append(end)
        reached = mean(trained)
        added = mean(changes, np.array(COUNTS)[np.asarray(COHORT)] / sum(COUNTS))
        server_control = jax.tree.map(np.add, server_control, added)
        assert_close(after.server.trainable, reached, rtol=1e-3, atol=1e-5)
        assert_close(after.server.memory.own, server_control, rtol=1e-3, atol=1e-4)
        for client in COHORT.tolist():
            kept = jax.tree.map(lambda x, c=client: x[c], after.clients.control)
            assert_close(kept, own[client], rtol=1e-3, atol=1e-4)


def test_scaffold_leaves_absent_clients_and_resting_factors(world):
    method = transforms.scaffold(methods.rolora())
    (_, _, _, first), (_, _, _, second) = run(world, method, rounds=2)
    for path, control in first.clients.control.adapters.items():
        other = second.clients.control.adapters[path]
        assert not control.a.any() and control.b[COHORT].any()
        np.testing.assert_array_equal(control.b, other.b)
        assert other.a[COHORT].any() and not other.a[1].any()


def test_scaffold_sends_the_control_variates_of_what_is_trained(world):
    from fedlora_jax.federated import communication

    plain, method = (
        methods.ffa_lora(),
        transforms.scaffold(methods.ffa_lora()),
    )
    sizes = []
    for each in (plain, method):
        federation = world.federation(each)
        made = communication.messages(each, federation.server, any_client(federation), 4)
        sizes.append(communication.count(each, federation.server, made, 0))
    assert sizes[1].up == 2 * sizes[0].up and sizes[1].down == 2 * sizes[0].down


def test_catching_up_with_scaffold_is_of_factors_and_control_variates(world):
    """Rank 2, kernels 6 x 10 and 10 x 7, in bytes of float32; a residual has no control variate."""
    from fedlora_jax.federated import communication

    def counted(name, round_index, absent):
        method = transforms.scaffold(methods.get(name)())
        federation = world.federation(method)
        made = communication.messages(method, federation.server, any_client(federation), 4)
        return communication.count(
            method, federation.server, made, round_index, absent=absent
        ).catch_up

    a, b = 2 * (6 + 10), 2 * (10 + 7)
    for absent in (0, 1, 3):
        once = min(absent, 1)
        assert counted("rolora", 0, absent) == 4 * 2 * a * once
        assert counted("rolora", 1, absent) == 4 * 2 * b * once
        assert counted("ffa_lora", 0, absent) == counted("fedit", 0, absent) == 0
    assert counted("fedex_lora", 0, 1) == 4 * min(3 * (a + b), 6 * 10 + 10 * 7)


@pytest.mark.parametrize(
    "name", [n for n in ALL if "server_optimizer" not in methods.get(n)().refuses]
)
def test_plain_sgd_at_the_server_is_the_method(world, name):
    method = transforms.server_optimizer(method_of(name), optax.sgd(1.0))
    _, plain, _, result = world.run(name, [COHORT])
    weights = world.data.counts[COHORT].astype(jnp.float32)
    server = world.federation(method).server
    after, _ = jax.jit(method.aggregate)(server, result.uploads, weights)
    assert_close(after.trainable, plain.server.trainable, atol=1e-6)


@pytest.mark.parametrize("name", sorted(transforms.SERVER_OPTIMIZERS))
def test_server_optimizers_are_those_of_the_paper(world, name):
    """Against algorithm 2 of Reddi et al. in float64 NumPy; FedAvgM as in Hsu et al."""
    rate, beta, second, tau = 0.5, 0.9, 0.99, 3e-3
    optimizer = transforms.SERVER_OPTIMIZERS[name](rate, beta, second, tau)
    history = run(world, transforms.server_optimizer(methods.fedit(), optimizer), rounds=3)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    moment = np.zeros_like(flat(world.server.trainable), np.float64)
    size = np.full_like(moment, tau**2)
    for before, result, _, after in history:
        weighted = jax.tree.map(
            lambda x: np.tensordot(world_shares(), np.float64(x), 1), result.trained
        )
        change = flat(weighted) - flat(before.server.trainable)
        if name == "fedavgm":
            moment = beta * moment + change
            step = rate * moment
        else:
            kept = 0.0 if name == "fedadagrad" else beta
            moment = kept * moment + (1 - kept) * change
            size = {
                "fedadagrad": size + change**2,
                "fedadam": second * size + (1 - second) * change**2,
                "fedyogi": size - (1 - second) * change**2 * np.sign(size - change**2),
            }[name]
            step = rate * moment / (np.sqrt(size) + tau)
        got = flat(after.server.trainable) - flat(before.server.trainable)
        assert np.abs(step).max() > 0.01
        np.testing.assert_allclose(got, step, rtol=1e-4, atol=2e-6)


def privately(world, name, clip, noise):
    method = transforms.private(method_of(name), clip=clip, noise_multiplier=noise)
    return run(world, method)[0]


@pytest.mark.parametrize("name", ["fedit", "ffa_lora"])
def test_privacy_without_clip_or_noise_is_the_round_by_equal_weights(world, name):
    """And is measured by them."""
    _, _, metrics, after = privately(world, name, clip=1e6, noise=0.0)
    _, plain, measured, _ = world.run(name, [COHORT], equal_weights=True)
    assert_close(after.server.trainable.head, plain.server.trainable.head)
    assert_close(products(after.server), products(plain.server))
    assert_close(metrics, measured, atol=1e-6)


def test_clients_are_clipped_over_all_that_they_send(world):
    before, result, _, after = privately(world, "fedit", clip=0.05, noise=0.0)
    total = jax.tree.map(np.zeros_like, world.server.trainable)
    for position in range(len(COHORT)):
        change = jax.tree.map(
            lambda x, y, k=position: x[k] - y, result.uploads, before.server.trainable
        )
        norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(change)))
        assert norm > 0.05
        total = jax.tree.map(lambda x, y, n=norm: x + y * 0.05 / n / len(COHORT), total, change)
    assert_close(
        after.server.trainable, jax.tree.map(np.add, before.server.trainable, total), atol=1e-6
    )


@pytest.mark.parametrize("name", ["ffa_lora", "rolora"])
def test_noise_has_the_stated_size_and_leaves_what_is_not_sent(world, name):
    clip, noise = 0.5, 40.0
    before, _, _, after = privately(world, name, clip, noise)
    difference = jax.tree.map(np.subtract, after.server.trainable, before.server.trainable)
    sent = [difference.head, [f.b for f in difference.adapters.values()]]
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(sent)])
    deviation = clip * noise / len(COHORT)
    # Of so many normal values the sample deviation is within 5 of its own standard errors.
    assert abs(values.std() / deviation - 1) < 5 / np.sqrt(2 * len(values))
    assert not any(f.a.any() for f in difference.adapters.values())


def test_noise_differs_from_round_to_round_and_is_drawn_again_after_a_restart(world):
    method = transforms.private(methods.ffa_lora(), clip=1e-6, noise_multiplier=1e6)
    one, two = run(world, method, rounds=2), run(world, method, rounds=2)
    moves = [
        np.ravel(next(iter(after.server.trainable.adapters.values())).b)
        - np.ravel(next(iter(before.server.trainable.adapters.values())).b)
        for before, _, _, after in one
    ]
    assert abs(np.corrcoef(moves)[0, 1]) < 0.9 and np.abs(moves[0] - moves[1]).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, one[-1][-1], two[-1][-1])


def test_a_diverged_client_counts_as_no_change(world):
    poisoned = int(positions(world.data, 2)[0])
    x = world.data.examples["x"].at[poisoned].set(jnp.nan)
    bad = world._replace(data=world.data._replace(examples={**world.data.examples, "x": x}))
    before, result, metrics, after = privately(bad, "fedit", clip=1e6, noise=0.0)
    assert int(metrics.excluded) == 1
    head = np.float64(result.uploads.head["head"]["bias"])[[0, 2, 3]]
    start = np.float64(before.server.trainable.head["head"]["bias"])
    np.testing.assert_allclose(
        after.server.trainable.head["head"]["bias"] - start, (head - start).sum(0) / 4, atol=1e-6
    )


def test_epsilon_is_that_of_the_library_and_behaves():
    dp_accounting = pytest.importorskip("dp_accounting")
    known = {"num_clients": 1000, "cohort_size": 20, "delta": 1e-5}
    one = transforms.epsilon(noise_multiplier=4.0, rounds=10, **known)
    accountant = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
    )
    event = dp_accounting.SampledWithoutReplacementDpEvent(
        1000, 20, dp_accounting.GaussianDpEvent(2.0)
    )
    accountant.compose(event, 10)
    assert one == pytest.approx(accountant.get_epsilon(1e-5))
    assert one < transforms.epsilon(noise_multiplier=4.0, rounds=20, **known)
    assert one < transforms.epsilon(noise_multiplier=2.0, rounds=10, **known)
    assert transforms.epsilon(noise_multiplier=0, rounds=1, **known) == np.inf
    # Everybody in every round: the Gaussian mechanism, by its closed form over orders.
    whole = {"num_clients": 20, "cohort_size": 20, "delta": 1e-5}
    got = transforms.epsilon(noise_multiplier=4.0, rounds=5, **whole)
    orders = np.linspace(1.01, 200, 20000)
    rough = np.min(5 * orders / (2 * 2.0**2) + np.log(1 / 1e-5) / (orders - 1))
    assert 0.8 * rough < got < rough


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transforms.fedprox(methods.fedit(), mu=-1.0), "fedprox: mu must be at least 0"),
        (
            lambda: transforms.private(methods.fedit(), clip=0, noise_multiplier=1),
            "private: clip must be above 0",
        ),
        (
            lambda: transforms.private(methods.fedit(), clip=1, noise_multiplier=-1),
            "at least 0, got -1",
        ),
        (
            lambda: transforms.scaffold(COMBINE["privacy"](methods.fedit())),
            "unprotected",
        ),
        (
            lambda: COMBINE["privacy"](COMBINE["scaffold"](methods.fedit())),
            "unprotected",
        ),
    ],
)
def test_senseless_values_and_chains_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_transforms_chain(world):
    method = COMBINE["scaffold"](COMBINE["server_optimizer"](COMBINE["fedprox"](methods.fedit())))
    _, _, metrics, after = run(world, method)[0]
    assert np.isfinite(metrics.loss)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    assert method_of("fedit").penalty is None
