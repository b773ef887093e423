"""Accuracy per domain and per client, against counting by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax.federated import evaluation
from fedlora_jax.federated.task import outputs
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
    np.testing.assert_allclose(found.domains, [right[DOMAINS == d].mean() for d in range(3)])
    expected = [by_hand(right, *client) for client in CLIENTS]
    np.testing.assert_allclose(found.clients, expected, rtol=1e-5)


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
    np.testing.assert_allclose(found.clients, expected, rtol=1e-5)
    for domain in range(3):
        members = [k for k, (domains, _) in enumerate(CLIENTS) if domain in domains]
        mean = np.mean([right[k][DOMAINS == domain].mean() for k in members])
        np.testing.assert_allclose(found.domains[domain], mean, rtol=1e-5)
    assert len(set(np.asarray(found.clients).round(4))) > 2


def test_kinds_that_are_not_held_out_are_left_out():
    examples = {"x": jnp.zeros((4, 6))}
    clients = [(np.array([0, 0, 5]), np.array([0, 1, 9]))]
    found = evaluation.held_out(examples, np.zeros(4, int), np.array([0, 0, 1, 2]), clients)
    np.testing.assert_allclose(found.shares[0], [0.25, 0.25, 0.5, 0], rtol=1e-6)
