"""The round that ours is timed beside computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from experiments.benchmarks import peft_rounds, rounds
from fedlora_jax.interop import peft
from fedlora_jax.models import Llama, ViT, pretrained
from tests.parity import originals

CLIENTS = 2
all_examples = rounds.examples
SMALL = {
    "vit_s16": dict(
        model=ViT(num_classes=5, patch_size=8, width=32, depth=1, num_heads=4, mlp_dim=48),
        shape=(16, 16, 3),
    ),
    "smollm2_135m": dict(
        model=Llama(50, width=32, depth=1, num_heads=4, num_kv_heads=2, mlp_dim=48, tied=True),
        shape=(12,),
    ),
}


def repeated(case, clients):
    """One example a client, many times, so that the order of a client's batches is no matter."""
    arrays = all_examples(case, clients)
    own = np.arange(clients).repeat(case.examples_per_client) * case.examples_per_client
    return {name: values[own] for name, values in arrays.items()}


@pytest.mark.parametrize("name", SMALL)
def test_both_sides_compute_the_same_round(name, tmp_path, monkeypatch):
    case = rounds.CASES[name]._replace(**SMALL[name], batch_size=2, steps=2, rank=3)
    for module in (rounds, peft_rounds):
        monkeypatch.setattr(module, "examples", repeated)
    base = originals.randomised(peft_rounds.backbone(case))
    base.save_pretrained(tmp_path / "base")
    kind = jnp.float32 if isinstance(case.model, ViT) else jnp.int32
    example = jax.ShapeDtypeStruct((1, *case.shape), kind)
    params = pretrained.load(case.model, tmp_path / "base", example)

    wrapped = peft_rounds.wrapped(case, base)
    torch.manual_seed(1)
    start = {
        key: value + 0.1 * torch.randn_like(value)
        for key, value in peft_rounds.copied(wrapped).items()
    }

    def in_our_terms(state, directory):
        peft_rounds.peft.set_peft_model_state_dict(wrapped, state)
        wrapped.save_pretrained(directory)
        checkpoint = peft.load(directory, case.model)
        return rounds.Trainable(checkpoint.adapters, checkpoint.saved)

    first = in_our_terms(start, tmp_path / "first")
    theirs, compute_theirs = peft_rounds.side(case, CLIENTS, wrapped)
    state, loss = compute_theirs("round")
    wanted = in_our_terms(state, tmp_path / "wanted")

    initial = rounds.server(case, params, first.adapters)
    initial = initial._replace(trainable=first)
    ours, compute, _ = rounds.ours(case, CLIENTS, ["1"], initial)
    federation, metrics = compute("1")

    assert ours.facts["parameters"] == theirs.facts["parameters"]
    assert float(metrics.loss) == pytest.approx(loss, rel=1e-4)
    found = federation.server.trainable
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for before, mine, other in zip(*map(jax.tree.leaves, (first, found, wanted)), strict=True):
        moved = np.abs(other - before).max()
        assert moved > 1.5 * rounds.LEARNING_RATE
        assert np.abs(mine - other).max() < 2e-3 * moved
