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
from fedlora_jax.federated import evaluation, metrics, placement
from fedlora_jax.federated.task import Weighted, equally, metrics_of, outputs
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


def hold_out(examples, domains, kinds, clients, judged_clients=128, **options):
    """Held-out examples, from the domains and kinds of each client's own."""
    counts = np.array([len(mine) for mine, _ in clients])
    owned = evaluation.Owned(counts, *map(np.concatenate, zip(*clients, strict=True)))
    known = {"seed": jax.random.key(0), "judged_clients": judged_clients, **options}
    return evaluation.held_out(examples, domains, kinds, owned, **known)


def evaluate(task, method, federation, held_out, **options):
    def read(who):
        return jax.tree.map(lambda x: x[who], federation.clients)

    states = evaluation.panel_states(method, read, held_out)
    judge = evaluation.make_evaluate(task, method, 3, **options)
    return judge(federation.server, states, held_out)


def dense(held_out):
    """How much each example counts for each client, `[N, M]`."""
    return held_out.shares.toarray()[:, held_out.cells]


@pytest.fixture(scope="module")
def examples():
    return {
        "x": np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32),
        "label": LABELS.astype(np.int32),
    }


@pytest.fixture(scope="module")
def held_out(examples):
    return hold_out(examples, DOMAINS, LABELS, CLIENTS)


def hits(world, federation, trainable, held_out):
    server = federation.server
    logits = outputs(world.task, server.backbone, trainable, held_out.examples, scale=server.scale)
    return np.asarray(logits).argmax(-1) == LABELS


def by_hand(hits, domains, labels):
    """Accuracy where a kind of example counts as often as the client has it."""
    kinds = [(DOMAINS == d) & (LABELS == y) for d, y in zip(domains, labels, strict=True)]
    return np.mean([hits[kind].mean() for kind in kinds])


def test_shares_are_the_distribution_of_the_clients_data(held_out):
    shares = dense(held_out)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(shares[3], 1 / 24, rtol=1e-5)
    first = (DOMAINS == 0) & (LABELS == 0)
    assert shares[0, first].sum() == pytest.approx(2 / 3)
    assert shares[1, (DOMAINS == 1) & (LABELS == 2)].sum() == pytest.approx(1)


def test_global_model(world, held_out):
    federation = world.federation(method_of("fedit"))
    found = evaluate(world.task, method_of("fedit"), federation, held_out)
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
    found = evaluate(world.task, method_of("local"), federation, held_out)
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
    found = hold_out(examples, np.zeros(4, int), np.array([0, 0, 1, 2]), clients)
    np.testing.assert_allclose(dense(found)[0], [0.25, 0.25, 0.5, 0], rtol=1e-6)


def test_metrics_of_sets_are_those_of_scikit_learn(world, held_out):
    """Of the global model, and of seven personal ones, by domain and by client."""
    names = ("f1", "matthews", "accuracy", "cross_entropy")
    task = world.task._replace(metrics=metrics_of("classification", names))
    for name in ("fedit", "local"):
        federation = world.federation(method_of(name))
        found = evaluate(task, method_of(name), federation, held_out, batch_size=5)
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
            weights = dense(held_out)[client]
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
    for score, own in ((pearson, stats.pearsonr), (spearman, stats.spearmanr)):
        assert score(labels, guess, even, labels) == pytest.approx(own(labels, guess).statistic)
    # A weight of two is an example twice.
    twice = np.concatenate([np.arange(40), np.arange(20)])
    weights = np.where(np.arange(40) < 20, 2.0, 1.0)
    expected = stats.pearsonr(labels[twice], guess[twice]).statistic
    assert pearson(labels, guess, weights, labels) == pytest.approx(expected)
    for score in (pearson, spearman):
        for weights in (even, np.full(40, 1 / 7)):
            assert np.isnan(score(np.full(40, 2.0), guess, weights, labels))
            assert np.isnan(score(labels, np.full(40, 0.1), weights, labels))
            assert np.isnan(score(np.full(40, 2.0), np.full(40, 0.1), weights, labels))


def test_f1_is_of_one_kind_for_all_clients():
    """Whichever classes a client has, and whatever is predicted by mistake."""
    score = metrics.get("f1").score
    two, three, even = np.array([0, 1]), np.array([2, 0, 1]), np.ones(4)
    for label in range(3):
        alone = np.full(4, label)
        assert score(alone, alone, even, three) == 1
    labels, guess = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    plain = f1_score(labels, guess, average="macro")
    assert score(labels, guess, even, three) == pytest.approx(plain)
    assert score(labels, guess, even, two) == pytest.approx(f1_score(labels, guess))
    stray = np.array([0, 1, 1, 2])
    assert score(labels, stray, even, two) == pytest.approx(0.5)
    assert score(np.zeros(4, int), np.zeros(4, int), even, two) == 0


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
    with pytest.raises(ValueError, match=r"are written as \('accuracy', 'f1'\)"):
        metrics_of("classification", ("accuracy,f1",))
    with pytest.raises(ValueError, match="metric of a causal_lm task 'accuracy'"):
        metrics_of("causal_lm", ("accuracy",))
    with pytest.raises(ValueError, match="unknown task 'causal'. Did you mean 'causal_lm'"):
        metrics_of("causal", ("nll",))
    with pytest.raises(ValueError, match="expected one metric or more"):
        metrics_of("regression", ())
    task = world.task._replace(metrics=(metrics.get("f1"),), predict=None)
    with pytest.raises(ValueError, match="f1 needs predictions"):
        evaluation.make_evaluate(task, method_of("fedit"), 3)


def test_a_metric_not_by_example_is_refused(world, held_out):
    mean = metrics.Metric("mean", "", True, lambda given, batch: jnp.mean(given))
    method, task = method_of("fedit"), world.task._replace(metrics=(mean,))
    with pytest.raises(ValueError, match=r"mean must give.*Weighted.*got \(\)"):
        evaluate(task, method, world.federation(method), held_out)


@pytest.mark.parametrize("name", ["fedit", "local"])
@pytest.mark.parametrize("kind", ["bfloat16", "bool", "int8"])
def test_a_measure_of_any_type_is_summed_in_full(world, name, kind):
    """Over more examples than these types count to, a fifth of which count 0 and have NaN."""
    count, method = 1000, method_of(name)
    kept, hit = np.arange(count) % 5 > 0, np.arange(count) % 3 == 0
    value = np.where(kept, hit, np.nan) if kind == "bfloat16" else hit
    examples = {
        "x": np.zeros((count, 6), np.float32),
        "value": jnp.asarray(value).astype(kind),
        "weight": jnp.asarray(kept).astype(kind),
    }
    measure = lambda given, batch: Weighted(batch["value"], batch["weight"])  # noqa: E731
    task = world.task._replace(metrics=(metrics.Metric("own", "", True, measure),))
    zero = np.zeros(count, int)
    found = evaluate(
        task,
        method,
        world.federation(method),
        hold_out(examples, zero, zero, [(np.zeros(1, int),) * 2] * 7),
    )
    mean = hit[kept].mean()
    assert found.domains["own"][0] == pytest.approx(mean, rel=1e-5)
    np.testing.assert_allclose(found.clients["own"], mean, rtol=1e-5)


@pytest.mark.parametrize("name", ["fedit", "local"])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_seen_by_those_whom_it_concerns(world, name, broken):
    """Of eight examples in two domains and of two kinds one of the second domain, the last."""
    domains, kinds = np.repeat([0, 1], 4), np.tile([0, 1], 4)
    examples = {"x": np.zeros((8, 6), np.float32), "value": np.r_[np.ones(7), broken]}
    measure = lambda given, batch: equally(batch["value"])  # noqa: E731
    task = world.task._replace(metrics=(metrics.Metric("own", "", False, measure),))
    one = np.ones(1, int)
    # Of the first domain alone; of the second, and of the kind that is broken or not; of both.
    clients = [(0 * one, one), (one, 0 * one), (one, one), *[(domains, kinds)] * 4]
    method = method_of(name)
    test = hold_out(examples, domains, kinds, clients)
    found = evaluate(task, method, world.federation(method), test)
    np.testing.assert_allclose(found.clients["own"], [1, 1, *[np.inf] * 5])
    row = in_words(task.metrics, found, ["a", "b", "c"])
    assert row["domain_own"] == {"a": 1, "b": None, "c": None}
    assert row["own"] is None and row["personal_own"] is None
    assert row["quantiles_own"]["10%"] == 1


def test_correlations_of_predictions_in_bfloat16():
    labels = np.arange(5)
    guess = np.asarray(jnp.array([0.5, 0.0, 2.0, 3.0, 2.5], jnp.bfloat16))
    for name, statistic in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        expected = statistic(labels, guess.astype(float)).statistic
        found = metrics.get(name).score(labels, guess, np.ones(5), labels)
        assert found == pytest.approx(expected)


def test_numbers_in_words():
    clients = {"perplexity": np.array([np.nan, 2.0])}
    found = evaluation.Evaluation(
        {"perplexity": np.array([1.0, np.nan, 3.0])},
        clients,
        {"perplexity": np.array([2.0, np.nan, 1.0, 3.0])},
        np.array([1, 3]),
    )
    row = in_words([metrics.get("perplexity")], found, ["a", "b", "c"])
    assert json.loads(json.dumps(row)) == {
        "panel": [1, 3],
        "perplexity": pytest.approx(np.exp(2.0)),  # Of the mean, 2 nats.
        "domain_perplexity": {"a": pytest.approx(np.e), "b": None, "c": pytest.approx(np.exp(3.0))},
        "personal_perplexity": pytest.approx(np.exp(2.0)),
        "quantiles_perplexity": {
            "10%": pytest.approx(np.exp(1.2)),
            "50%": pytest.approx(np.exp(2.0)),
            "90%": pytest.approx(np.exp(2.8)),
        },
        "client_perplexity": [None, pytest.approx(np.exp(2.0))],
    }
    everybody = found._replace(everyone=clients, panel=None)
    assert "panel" not in in_words([metrics.get("perplexity")], everybody, ["a", "b", "c"])


def test_own_examples_are_those_of_the_clients_kinds():
    examples = {"x": jnp.zeros((4, 6))}
    clients = [(np.array([0, 0]), np.array([7, 7])), (np.array([0]), np.array([8]))]
    kinds = np.array([7, 8, 8, 9])
    found = hold_out(examples, np.zeros(4, int), kinds, clients, kinds_are_own=True)
    np.testing.assert_array_equal(found.panel.examples, [[0, -1], [1, 2]])
    np.testing.assert_array_equal(found.panel.shares, [[1, 0], [0.5, 0.5]])
    np.testing.assert_allclose(dense(found), [[1, 0, 0, 0], [0, 0.5, 0.5, 0]])


def dense_shares(domains, kinds, clients):
    """For each client a weight for each example, as the definition says it: `[N, M]`."""
    rows = []
    for mine in clients:
        row = np.zeros(len(kinds))
        for pair in zip(*mine, strict=True):
            alike = (domains == pair[0]) & (kinds == pair[1])
            row += alike / max(alike.sum(), 1)
        rows.append(row / max(row.sum(), 1e-12))
    return np.array(rows)


def test_clients_of_any_data_are_judged_as_by_a_weight_for_each_example(world):
    """With examples that count differently, as texts of different length do."""
    rng = np.random.default_rng(3)
    domains, kinds = rng.integers(0, 3, 90), rng.integers(0, 5, 90)
    clients = [rng.integers(0, (3, 7), (rng.integers(1, 9), 2)).T for _ in range(60)]
    value, weight = rng.normal(size=90), rng.integers(0, 40, 90) * 1.0
    examples = {"x": np.zeros((90, 6)), "value": value, "weight": weight}
    examples = {name: values.astype(np.float32) for name, values in examples.items()}
    metric = metrics.get("nll")._replace(
        measure=lambda _, batch: Weighted(batch["value"], batch["weight"])
    )
    task, method = world.task._replace(metrics=(metric,)), method_of("fedit")
    held_out = hold_out(examples, domains, kinds, clients, judged_clients=7)
    found = evaluate(task, method, world.federation(method), held_out, batch_size=32)

    shares = dense_shares(domains, kinds, clients)
    np.testing.assert_allclose(dense(held_out), shares, rtol=1e-12, atol=1e-15)
    with np.errstate(invalid="ignore"):
        expected = shares @ (value * weight) / (shares @ weight)
    assert np.isnan(expected).any() and np.isfinite(expected).sum() > 40
    np.testing.assert_allclose(found.everyone["nll"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.clients["nll"], found.everyone["nll"][found.panel])
    by_domain = [
        np.average(value[here], weights=weight[here]) for here in domains == [[0], [1], [2]]
    ]
    np.testing.assert_allclose(found.domains["nll"], by_domain, rtol=1e-5, atol=1e-6)


def test_of_many_clients_a_panel_is_judged_as_it_would_be_among_all(world, examples):
    """Of a personal model's metrics all; of the global model's those of sets."""
    nothing = [(np.array([2]), np.array([9]))]
    clients = [*CLIENTS[:3], *nothing * 3, CLIENTS[3]]
    task = world.task._replace(metrics=metrics_of("classification", ("accuracy", "f1")))
    whole = hold_out(examples, DOMAINS, LABELS, clients)
    some = hold_out(examples, DOMAINS, LABELS, clients, judged_clients=3)
    who = some.panel.clients
    assert len(who) == 3 and set(who) < {0, 1, 2, 6}
    for name in ("fedit", "local"):
        method = method_of(name)
        federation = world.federation(method)
        everybody = evaluate(task, method, federation, whole)
        found = evaluate(task, method, federation, some)
        assert everybody.panel is None and found.panel.tolist() == who.tolist()
        for metric in ("accuracy", "f1"):
            np.testing.assert_allclose(found.clients[metric], everybody.clients[metric][who])
            judged = 7 if (name, metric) == ("fedit", "accuracy") else 3
            assert len(found.everyone[metric]) == judged


def test_a_panel_is_the_seeds_alone(examples):
    def who(seed, **options):
        key = jax.random.key(seed)
        many = CLIENTS * 20
        held_out = hold_out(examples, DOMAINS, LABELS, many, 30, seed=key, **options)
        return held_out.panel.clients.tolist()

    first = who(0)
    assert first == sorted(set(first)) and len(first) == 30
    assert first == who(0, personal_models=False) != who(1)


def test_half_a_million_clients_are_judged():
    """A weight for each of them and each example would be 20 GB."""
    clients, size = 500_000, 10_000
    rng = np.random.default_rng(0)
    kinds = np.arange(size) // 4
    mine = rng.integers(0, size // 4, clients)
    owned = evaluation.Owned(np.ones(clients, int), np.zeros(clients, int), mine)
    found = evaluation.held_out(
        {"x": np.zeros(size)},
        np.zeros(size, int),
        kinds,
        owned,
        seed=jax.random.key(0),
        judged_clients=10,
        kinds_are_own=True,
    )
    sums = rng.normal(size=size // 4)
    np.testing.assert_allclose(found.shares @ sums, sums[mine] / 4)
    expected = 4 * mine[found.panel.clients][:, None] + np.arange(4)
    np.testing.assert_array_equal(found.panel.examples, expected)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("name", ["fedit", "local"])
def test_four_devices_judge_as_one(world, held_out, name):
    """Batches of 5 become such of 8, two a device."""
    federation, method = world.federation(method_of(name)), method_of(name)
    one = evaluate(world.task, method, federation, held_out, batch_size=5)
    mesh = placement.make_mesh(4)
    four = evaluate(world.task, method, federation, held_out, batch_size=5, mesh=mesh)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), one, four)
