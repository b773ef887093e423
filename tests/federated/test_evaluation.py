"""Metrics per domain and per client, against counting by hand, scikit-learn and SciPy."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from sklearn.metrics import f1_score, matthews_corrcoef

from fedlora_jax.experiment.measure import in_words
from fedlora_jax.federated import evaluation, metrics
from fedlora_jax.federated.task import metrics_of, outputs
from tests.world import method_of

DOMAINS = np.repeat([0, 1, 2], 8)
LABELS = np.tile([0, 1, 2, 0, 1, 2, 0, 1], 3)
# Domains and labels of the training examples of seven clients.
CLIENTS = [
    (np.array([0, 0, 0]), np.array([0, 0, 1])),
    (np.array([1, 1]), np.array([2, 2])),
    (np.array([0, 1, 2]), np.array([0, 1, 2])),
    *[(DOMAINS, LABELS)] * 4,
]


@pytest.fixture(scope="module")
def held_out():
    examples = {
        "x": np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32),
        "label": LABELS.astype(np.int32),
    }
    return evaluation.held_out(examples, DOMAINS, LABELS, CLIENTS)


def hits(world, federation, trainable, held_out):
    server = federation.server
    logits = outputs(world.task, server.backbone, trainable, held_out.examples, scale=server.scale)
    return np.asarray(logits).argmax(-1) == LABELS


def by_hand(hits, domains, labels):
    """Accuracy where a kind of example counts as often as the client has it."""
    kinds = [(DOMAINS == d) & (LABELS == y) for d, y in zip(domains, labels, strict=True)]
    return np.mean([hits[kind].mean() for kind in kinds])


def test_shares_are_the_distribution_of_the_clients_data(held_out):
    shares = np.asarray(held_out.shares)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(shares[3], 1 / 24, rtol=1e-5)
    first = (DOMAINS == 0) & (LABELS == 0)
    assert shares[0, first].sum() == pytest.approx(2 / 3)
    assert shares[1, (DOMAINS == 1) & (LABELS == 2)].sum() == pytest.approx(1)


def test_global_model(world, held_out):
    federation = world.federation(method_of("fedit"))
    found = evaluation.make_evaluate(world.task, method_of("fedit"), 3)(federation, held_out)
    right = hits(world, federation, federation.server.trainable, held_out)
    np.testing.assert_allclose(
        found.domains["accuracy"], [right[DOMAINS == d].mean() for d in range(3)]
    )
    expected = [by_hand(right, *client) for client in CLIENTS]
    np.testing.assert_allclose(found.clients["accuracy"], expected, rtol=1e-5)


def test_personal_models(world, held_out):
    """Seven clients with heads of their own, as `local` has them."""
    federation = world.federation(method_of("local"))
    keys = jax.random.split(jax.random.key(0), 7)
    heads = jax.tree.map(
        lambda x: x + jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys),
        federation.clients.head,
    )
    federation = federation._replace(clients=federation.clients._replace(head=heads))
    found = evaluation.make_evaluate(world.task, method_of("local"), 3)(federation, held_out)
    right = [
        hits(world, federation, jax.tree.map(lambda x, k=k: x[k], federation.clients), held_out)
        for k in range(7)
    ]
    expected = [by_hand(mine, *client) for mine, client in zip(right, CLIENTS, strict=True)]
    np.testing.assert_allclose(found.clients["accuracy"], expected, rtol=1e-5)
    for domain in range(3):
        members = [k for k, (domains, _) in enumerate(CLIENTS) if domain in domains]
        mean = np.mean([right[k][DOMAINS == domain].mean() for k in members])
        np.testing.assert_allclose(found.domains["accuracy"][domain], mean, rtol=1e-5)
    assert len(set(found.clients["accuracy"].round(4))) > 2


def test_kinds_that_are_not_held_out_are_left_out():
    examples = {"x": jnp.zeros((4, 6))}
    clients = [(np.array([0, 0, 5]), np.array([0, 1, 9]))]
    found = evaluation.held_out(examples, np.zeros(4, int), np.array([0, 0, 1, 2]), clients)
    np.testing.assert_allclose(found.shares[0], [0.25, 0.25, 0.5, 0], rtol=1e-6)


def test_metrics_of_sets_are_those_of_scikit_learn(world, held_out):
    """Of the global model, and of seven personal ones, by domain and by client."""
    names = ("f1", "matthews", "accuracy", "cross_entropy")
    task = world.task._replace(metrics=metrics_of("classification", names))
    for name in ("fedit", "local"):
        federation = world.federation(method_of(name))
        found = evaluation.make_evaluate(task, method_of(name), 3, batch_size=5)(
            federation, held_out
        )
        trainable = federation.server.trainable
        server = federation.server
        logits = np.asarray(
            outputs(task, server.backbone, trainable, held_out.examples, scale=server.scale)
        )
        guess = logits.argmax(-1)
        for domain in range(3):
            here = DOMAINS == domain
            f1 = f1_score(LABELS[here], guess[here], average="macro")
            matthews = matthews_corrcoef(LABELS[here], guess[here])
            assert found.domains["f1"][domain] == pytest.approx(f1)
            assert found.domains["matthews"][domain] == pytest.approx(matthews)
        for client in range(7):
            weights = np.asarray(held_out.shares[client], np.float64)
            kept = weights > 0
            f1 = f1_score(LABELS[kept], guess[kept], average="macro", sample_weight=weights[kept])
            assert found.clients["f1"][client] == pytest.approx(f1, rel=1e-6)
        chance = special.log_softmax(logits.astype(np.float64), -1)[np.arange(24), LABELS]
        by_domain = [-chance[DOMAINS == d].mean() for d in range(3)]
        np.testing.assert_allclose(found.domains["cross_entropy"], by_domain, rtol=1e-5)


def test_correlations_are_those_of_scipy():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 40) / 2.0  # with ties
    guess = labels + rng.normal(size=40)
    even = np.full(40, 0.7)
    pearson, spearman = (metrics.get(name).score for name in ("pearson", "spearman"))
    assert pearson(labels, guess, even) == pytest.approx(stats.pearsonr(labels, guess).statistic)
    assert spearman(labels, guess, even) == pytest.approx(stats.spearmanr(labels, guess).statistic)
    # A weight of two is an example twice.
    twice = np.concatenate([np.arange(40), np.arange(20)])
    weights = np.where(np.arange(40) < 20, 2.0, 1.0)
    expected = stats.pearsonr(labels[twice], guess[twice]).statistic
    assert pearson(labels, guess, weights) == pytest.approx(expected)
    assert np.isnan(pearson(np.ones(40), guess, even))


class Scores(NamedTuple):
    nll: jax.Array
    correct: jax.Array


def test_tokens_count_equally_however_they_lie_in_rows():
    rng = np.random.default_rng(1)
    answer = rng.random((6, 9)) < np.linspace(0, 1, 6)[:, None]
    scores = Scores(jnp.asarray(rng.random((6, 8))), jnp.asarray(rng.random((6, 8)) < 0.5))
    batch = {"answer": jnp.asarray(answer)}
    counted = answer[:, 1:]
    for name, values in (("nll", scores.nll), ("token_accuracy", scores.correct)):
        value, weight = metrics.get(name).measure(scores, batch)
        np.testing.assert_array_equal(weight, counted.sum(1))
        mean = np.sum(value * weight) / np.sum(weight)
        assert mean == pytest.approx(np.asarray(values)[counted].mean(), rel=1e-6)
    assert metrics.get("perplexity").finish(np.float64(2.0)) == pytest.approx(np.exp(2.0))


def test_metrics_that_do_not_fit_are_refused(world):
    with pytest.raises(ValueError, match="unknown metric of a classification task 'acuracy'.*'acc"):
        metrics_of("classification", ("acuracy",))
    with pytest.raises(ValueError, match="metric of a causal_lm task 'accuracy'"):
        metrics_of("causal_lm", ("accuracy",))
    with pytest.raises(ValueError, match="unknown task 'causal'. Did you mean 'causal_lm'"):
        metrics_of("causal", ("nll",))
    with pytest.raises(ValueError, match="expected one metric or more"):
        metrics_of("regression", ())
    task = world.task._replace(metrics=(metrics.get("f1"),), predict=None)
    with pytest.raises(ValueError, match="f1 needs predictions"):
        evaluation.make_evaluate(task, method_of("fedit"), 3)


def test_numbers_in_words():
    found = evaluation.Evaluation(
        {"perplexity": np.array([1.0, np.nan, 3.0])}, {"perplexity": np.array([np.nan, 2.0])}
    )
    row = in_words([metrics.get("perplexity")], found, ["a", "b", "c"])
    assert json.loads(json.dumps(row)) == {
        "perplexity": pytest.approx(np.exp(2.0)),  # Of the mean, 2 nats.
        "domain_perplexity": {"a": pytest.approx(np.e), "b": None, "c": pytest.approx(np.exp(3.0))},
        "personal_perplexity": pytest.approx(np.exp(2.0)),
        "client_perplexity": [None, pytest.approx(np.exp(2.0))],
    }


def test_own_examples_are_those_of_the_clients_kinds():
    examples = {"x": jnp.zeros((4, 6))}
    clients = [(np.array([0, 0]), np.array([7, 7])), (np.array([0]), np.array([8]))]
    kinds = np.array([7, 8, 8, 9])
    found = evaluation.held_out(examples, np.zeros(4, int), kinds, clients, kinds_are_own=True)
    np.testing.assert_array_equal(found.own, [[0, -1], [1, 2]])
    np.testing.assert_allclose(found.shares, [[1, 0, 0, 0], [0, 0.5, 0.5, 0]])
