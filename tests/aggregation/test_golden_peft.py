"""What the real PEFT library also does: weighted merges by SVD and by concatenation."""

from pathlib import Path

import numpy as np
import pytest

from fedlora_jax import Factors, aggregation

GOLDEN = Path(__file__).parents[1] / "golden" / "peft_merges.npz"
LAYERS, ADAPTERS = ("query", "up"), ("one", "two", "three")


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def factors(golden, layer, name):
    """An adapter in our layout, PEFT's scale folded into `b`."""
    a, b = (golden[f"{layer}/{name}/lora_{side}"].T for side in "AB")
    return Factors(a, golden[f"{layer}/{name}/scaling"].astype(np.float32) * b)


@pytest.mark.parametrize("merge, name", [("svd", "flexlora"), ("cat", "flora")])
def test_weighted_merges_agree(golden, merge, name):
    clients = [{layer: factors(golden, layer, c) for layer in LAYERS} for c in ADAPTERS]
    result = aggregation.get(name)(aggregation.stack(clients), golden["weights"])
    tree = result.adapters if merge == "svd" else result.residual
    for layer in LAYERS:
        want = factors(golden, layer, f"by_{merge}")
        product = want.a @ want.b
        np.testing.assert_allclose(
            tree[layer].a @ tree[layer].b, product, atol=2e-6 * np.linalg.norm(product)
        )
