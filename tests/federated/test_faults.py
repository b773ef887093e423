"""Clients that fail or attack: who they are, what arrives of them, and what they keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from fedlora_jax import experiment, methods, transforms
from fedlora_jax.experiment import program
from fedlora_jax.federated import faults
from fedlora_jax.federated.round import Recipe, run_round
from fedlora_jax.methods import trained_mask
from tests.world import COHORT, method_of

# Resting factors, a state of the client's own, control variates.
METHODS = {
    "ffa_lora": method_of("ffa_lora"),
    "fedsa_lora": method_of("fedsa_lora"),
    "scaffold": transforms.scaffold(methods.fedit()),
}
SHARE, FACTOR = 0.3, 3.0
GAINS = {"huge": faults.HUGE * FACTOR, "sign_flip": -FACTOR}


def assert_close(got, want, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), got, want)


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def of(tree, clients):
    return jax.tree.map(lambda x: np.asarray(x)[clients], tree)


@pytest.fixture(scope="module")
def rounds(world):
    """A round by method and kind of fault; one program a method for all kinds."""

    @functools.cache
    def compiled(name):
        def step(kind, federation, cohort):
            training = world.training._replace(faults=kind)
            recipe = Recipe(world.task, METHODS[name], training)
            state = (federation, world.data, cohort, world.seed, jnp.float32(0.2))
            return run_round(recipe, *state)

        return jax.jit(step)

    @functools.cache
    def run(name, kind, share=SHARE):
        federation = world.federation(METHODS[name])
        chosen = faults.make("zeros" if kind == "none" else kind, share=share, factor=FACTOR)
        return federation, compiled(name)(chosen, federation, COHORT)

    return run


def faulty_of(world):
    kind = faults.make("zeros", share=SHARE)
    return np.asarray(faults.drawn(kind, world.seed, jnp.int32(0), COHORT))


@pytest.mark.parametrize("kind", faults.KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_what_arrives_and_what_is_kept(world, rounds, name, kind):
    before, (honest, _, truth) = rounds(name, "none", 0.0)
    _, (after, metrics, result) = rounds(name, kind)
    faulty = faulty_of(world)
    assert faulty.sum() == 1  # of 4 at a share of 0.3
    assert_close(of(result.uploads, ~faulty), of(truth.uploads, ~faulty))
    start, claimed, trained = (
        of(x, faulty) for x in (truth.start.trainable, result.trained, truth.trained)
    )
    moves = of(jax.vmap(trained_mask)(truth.start), faulty)

    def check(moves, first, last, got):
        wanted = {
            "nan": np.full_like(last, np.nan),
            "zeros": np.zeros_like(last),
        }.get(kind, first + GAINS.get(kind, 1.0) * (last - first))
        wanted = np.where(np.broadcast_to(moves, last.shape), wanted, last)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)

    jax.tree.map(check, moves, start, trained, claimed)
    silent = kind in ("dropout", "crash")
    assert int(metrics.absent) == silent and int(metrics.excluded) == (kind == "nan")
    who = np.asarray(COHORT)[faulty]
    kept = before if silent or kind == "nan" else honest
    assert_close(of(after.clients, who), of(kept.clients, who))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


def test_whoever_does_not_answer_is_as_if_not_drawn(world, rounds, name="ffa_lora"):
    federation = world.federation(METHODS[name])
    present = jnp.asarray(np.asarray(COHORT)[~faulty_of(world)])
    recipe = Recipe(world.task, METHODS[name], world.training)
    step = jax.jit(lambda *state: run_round(recipe, *state)[0].server)
    without = step(federation, world.data, present, world.seed, jnp.float32(0.2))
    for kind in ("dropout", "crash", "nan"):
        assert_close(rounds(name, kind)[1][0].server, without, rtol=1e-4, atol=1e-5)


def test_without_faults_a_round_is_what_it_was(world, rounds):
    _, (after, _, _) = rounds("ffa_lora", "none", 0.0)
    assert_close(after.server.trainable, world.run("ffa_lora", [COHORT])[1].server.trainable)


def test_if_nobody_answers_the_server_keeps_its_state(rounds):
    federation, (after, metrics, _) = rounds("ffa_lora", "crash", 1.0)
    assert int(metrics.absent) == len(COHORT) and int(metrics.excluded) == 0
    assert_equal(after.server.trainable, federation.server.trainable)
    # Of nobody there is no loss, which is not one of zero.
    assert np.isnan(metrics.loss) and np.isnan(metrics.aggregation_error)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_draw_is_a_share_of_those_present_whatever_their_order(world, share):
    kind = faults.make("nan", share=share)
    cohort, seen = np.array([4, -1, 11, 7, 2, -1, 30, 9, 5, 1]), []
    for index in range(20):
        drawn = np.asarray(faults.drawn(kind, world.seed, jnp.int32(index), jnp.array(cohort)))
        assert drawn.sum() == round(share * 8) and not drawn[cohort < 0].any()
        order = np.random.default_rng(index).permutation(len(cohort))
        shuffled = jnp.array(cohort[order])
        again = np.asarray(faults.drawn(kind, world.seed, jnp.int32(index), shuffled))
        assert set(cohort[order][again]) == set(cohort[drawn])
        seen.extend(cohort[drawn])
    assert set(seen) <= set(cohort[cohort >= 0]) and len(set(seen)) >= 8 * (share >= 0.5)


def test_configurations():
    config = digits.get_config()
    assert program.faults_of(config) is None
    config.faults.update(kind="sign_flip", factor=2.0)
    assert program.faults_of(config) == faults.Faults(0.2, 1.0, -2.0, True)
    for values, message in (
        ({"kind": "sign_flop"}, "unknown kind of faults 'sign_flop'. Did you mean 'sign_flip'"),
        ({"share": 1.5}, "config.faults.share must be from 0 to 1, got 1.5"),
        ({"factor": 0.0}, "config.faults.factor must be above 0"),
    ):
        wrong = config.copy_and_resolve_references()
        wrong.faults.update(values)
        with pytest.raises(ValueError, match=message):
            experiment.check(wrong)
