"""Adapters in order: the same products, and the first columns are the best of each rank."""

import jax
import numpy as np
import pytest

from fedlora_jax import Factors, aggregation
from tests.aggregation import cases
from tests.aggregation.test_never_dense import assert_never_dense

KERNELS = {"wide": (13, 29), "tall": (31, 11)}


def adapters(rank, power=1.0):
    """Columns of sizes `i^-power`, in no order."""
    tree = cases.extra(seed=rank, rank=rank, kernels=KERNELS)
    sizes = np.roll(np.arange(1, rank + 1.0) ** -power, rank // 2).astype(np.float32)
    return {path: Factors(f.a, f.b * sizes[:, None]) for path, f in tree.items()}


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_first_columns_are_the_best_approximation(rank):
    old = adapters(rank, power=2.0)
    new = aggregation.ordered(old)
    together = aggregation.cut(new, np.arange(1, rank + 1))
    for path, before in old.items():
        product = np.float64(before.a) @ np.float64(before.b)
        u, s, v = np.linalg.svd(product)
        for index, q in enumerate(range(1, rank + 1)):
            best = u[:, :q] * s[:q] @ v[:q]
            got = np.float64(together[path].a[index]) @ np.float64(together[path].b[index])
            np.testing.assert_allclose(got, best, atol=1e-5 * s[0])
        lengths = np.linalg.norm(new[path].a, axis=0)
        np.testing.assert_allclose(lengths, np.linalg.norm(before.a, axis=0).max(), rtol=1e-5)


def test_rounds_of_clients_of_unequal_ranks_do_not_make_a_smaller_and_b_larger():
    """Nothing is trained: what is left after zero-padded means is what all have, as it was."""
    ranks, rank = np.array([1, 1, 1, 2, 4, 8]), 8
    first = tree = aggregation.ordered(adapters(rank))
    for _ in range(12):
        stacked = aggregation.cut(tree, ranks)
        tree = aggregation.ordered(aggregation.fedit(stacked, np.ones(len(ranks))).adapters)
    for path, f in tree.items():
        for x, want in ((f.a[:, 0], first[path].a[:, 0]), (f.b[0], first[path].b[0])):
            np.testing.assert_allclose(np.abs(x), np.abs(want), rtol=1e-3, atol=1e-4)


def test_what_has_no_order_stays_and_empty_directions_can_train():
    tree = adapters(3)
    zero = {path: f._replace(b=np.zeros_like(f.b)) for path, f in tree.items()}
    jax.tree.map(np.testing.assert_array_equal, aggregation.ordered(zero), zero)
    for f in tree.values():
        f.b[1:] = 0
    for path, f in aggregation.ordered(tree).items():
        np.testing.assert_allclose(f.a @ f.b, tree[path].a @ tree[path].b, atol=1e-6)
        assert np.linalg.norm(f.a, axis=0).min() > 0.5 * np.linalg.norm(tree[path].a) / 3**0.5


def test_it_is_never_dense():
    assert_never_dense(aggregation.ordered, cases.extra(kernels={"one": (101, 127)}))
