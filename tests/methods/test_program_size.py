"""The round's program grows with a model's layers about as `fedit`'s does, for every method."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from fedlora_jax import lora, methods
from fedlora_jax.federated.round import Recipe, create, make_round
from fedlora_jax.federated.task import classification
from fedlora_jax.methods import Server, Trainable
from tests.world import COHORT, COUNTS, method_of

# Of fedit's lines a layer. On top come a second gradient (fedsmooth_lora), a second product in the
# model, and what is written of each kernel where layers of a kind are stacked or taken apart.
LIMIT = 1.5


class Deep(nn.Module):
    """Layers of one shape."""

    depth: int

    @nn.compact
    def __call__(self, x):
        for index in range(self.depth):
            x = nn.tanh(nn.Dense(6, name=f"layer_{index}")(x))
        return x


@pytest.fixture(scope="module")
def a_layer(world):
    """The lines of StableHLO that a method has for a layer."""

    @functools.cache
    def growth(name):
        return (lines(world, name, 4) - lines(world, name, 2)) / 2

    return growth


def lines(world, name, depth):
    model = Deep(depth)
    params = jax.eval_shape(model.init, jax.random.key(0), world.data.examples["x"])["params"]
    backbone = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    adapters = lora.init(jax.random.key(1), backbone, targets="layer", rank=2)
    server = Server(backbone, Trainable(adapters, {}), jnp.float32(2), (), jnp.int32(0))
    method = method_of(name)
    federation = jax.eval_shape(
        lambda key: create(key, method, server, len(COUNTS)), jax.random.key(0)
    )
    task = classification(model, lambda batch: (batch["x"],))
    function = make_round(Recipe(task, method, world.training))
    lowered = function.lower(federation, world.data, COHORT, world.seed, jnp.float32(0.1))
    return lowered.as_text().count("\n")


@pytest.mark.parametrize("name", sorted(methods.REGISTRY))
def test_a_layer_more_costs_about_what_it_costs_fedit(a_layer, name):
    assert a_layer(name) < LIMIT * a_layer("fedit")
