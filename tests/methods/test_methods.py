"""Properties of every method, on one round of unequal clients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax import lora, methods
from fedlora_jax.federated import communication, records
from fedlora_jax.methods import change
from tests.world import COHORT, method_of

ALL = sorted(methods.REGISTRY)
EXACT = ["fedex_lora", "fedsvd", "ffa_lora", "flora", "oracle", "rolora"]
MERGING = ["fedex_lora", "fedsmooth_lora", "flora", "frlora", "oracle"]
PERSONAL = ["fedsa_lora", "local"]
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


def ideal(world, before, result):
    """`W + s sum_k p_k (a_k b_k + offset_k)` from what the clients arrived at."""
    counts = np.float64(world.data.counts[COHORT])
    changes = jax.vmap(change)(result.start, result.trained)
    total = None
    for index, share in enumerate(counts / counts.sum()):
        mine = kernels(before.server, jax.tree.map(lambda x, i=index: x[i], changes))
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


@pytest.mark.parametrize("name", ALL)
def test_state_of_absent_clients_stays(world, cohort_of, name):
    before, _, after = cohort_of(name)
    absent = [i for i in range(len(world.data.counts)) if i not in COHORT.tolist()]
    for x, y in zip(jax.tree.leaves(before.clients), jax.tree.leaves(after.clients), strict=True):
        np.testing.assert_array_equal(x[jnp.array(absent)], y[jnp.array(absent)])


@pytest.mark.parametrize("name", ALL)
def test_a_restored_state_goes_on_to_the_bit(world, cohort_of, name, tmp_path):
    _, _, after = cohort_of(name)
    checkpoints = records.Checkpoints(tmp_path)
    checkpoints.save(1, after)
    checkpoints.close()
    checkpoints = records.Checkpoints(tmp_path)
    restored, rounds = checkpoints.restore(world.federation(method_of(name)))
    checkpoints.close()
    assert rounds == 1
    _, _, second = cohort_of(name, rounds=2)
    # By way of NumPy, or the program would be compiled again for arrays tied to a device.
    resumed = world.go_on(name, jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), restored))
    jax.tree.map(np.testing.assert_array_equal, resumed, second)


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
    "rolora": (RANK * D_OUT + HEAD, RANK * D_OUT + HEAD),
    "spectral": (WHOLE, WHOLE),
}


def counted(world, method, round_index):
    """Bytes up and down of one client of a cohort of four, before anything is trained."""
    federation = world.federation(method)
    made = communication.messages(method, federation, 4)
    # Shapes alone: `spectral` counts by the values, which are all zero here.
    federation = jax.eval_shape(lambda x: x, federation)
    return communication.count(method, federation, made, round_index)[:2]


@pytest.mark.parametrize("name", ALL)
def test_bytes_are_those_of_the_formulas(world, name):
    method = method_of(name)
    assert counted(world, method, 0) == tuple(4 * scalars for scalars in SCALARS[name])


def test_rolora_sends_the_other_factor_in_odd_rounds(world):
    method = method_of("rolora")
    found = counted(world, method, 1)
    assert found == (4 * (RANK * D_IN + HEAD),) * 2


@pytest.mark.parametrize("name", PERSONAL)
def test_personal_model_is_the_clients_own(world, cohort_of, name):
    _, result, after = cohort_of(name)
    for position, client in enumerate(COHORT.tolist()):
        own = method_of(name).personal(
            after.server, jax.tree.map(lambda x, c=client: x[c], after.clients)
        )
        for path, factors in own.adapters.items():
            trained = jax.tree.map(lambda x, k=position: x[k], result.trained.adapters[path])
            np.testing.assert_array_equal(factors.b, trained.b)
            if name == "local":
                np.testing.assert_array_equal(factors.a, trained.a)
            else:
                np.testing.assert_array_equal(factors.a, after.server.trainable.adapters[path].a)


def test_defaults_of_every_method_make_it():
    for name in ALL:
        methods.get(name)(**methods.defaults(name))


def test_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="'lora_fair'"):
        methods.get("lorafair")
