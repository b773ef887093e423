"""A loop over blocks computes what the blocks compute one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlora_jax import blocks, lora, methods, models
from fedlora_jax.data.clients import client_data
from fedlora_jax.federated import local
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.round import Recipe, create, make_round
from fedlora_jax.federated.task import classification
from fedlora_jax.lowrank import Factors
from fedlora_jax.methods import Server, Trainable
from fedlora_jax.models import Bert, Llama, Mixer, ViT

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(2, 16, 16, 3)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(3, 20, size=(2, 7)))
SMALL = dict(width=16, depth=3)
TEXT = dict(vocab_size=20, num_heads=4, **SMALL)
VIT = ViT(num_classes=3, patch_size=8, num_heads=2, **SMALL)
MODELS = {
    "vit": (VIT, IMAGES),
    "mixer": (Mixer(num_classes=3, patch_size=8, **SMALL), IMAGES),
    "bert": (Bert(num_classes=3, num_positions=9, **TEXT), TOKENS),
    "llama": (Llama(num_kv_heads=2, mlp_dim=24, **TEXT), TOKENS),
}


def parameters(model, inputs):
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.3), x.dtype), shapes)


def adapters_of(model, params, targets=None):
    targets = targets or models.lora_targets(model)
    fresh = lora.init(jax.random.key(1), params, targets=targets, rank=2)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape), x.dtype), fresh)


def assert_close(found, expected, rtol=1e-4):
    """Relative to an array, or to rounding of the largest: a gradient may vanish but for that."""
    largest = max(np.abs(y).max() for y in jax.tree.leaves(expected))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        atol = rtol * np.abs(y).max() + 1e-6 * largest
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_without_a_loop(name, remat):
    model, inputs = MODELS[name]
    model = model.clone(remat=remat)
    params = parameters(model, inputs)
    adapters = adapters_of(model, params)
    offset = jax.tree.map(lambda x: 0.5 * x[::-1], adapters)

    def loss(adapters, params, offset):
        out = lora.apply(model, params, adapters, inputs, scale=0.5, offset=offset)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.grad(loss, has_aux=True))
    expected, out = run(adapters, params, offset)
    stacked = blocks.stack(params)
    apart, looped = run(adapters, stacked, offset)
    assert_close((apart, looped), (expected, out))
    together, looped = run(blocks.stack_adapters(adapters), stacked, blocks.stack_adapters(offset))
    assert_close((blocks.unstack_adapters(together), looped), (expected, out))


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_a_program_in_a_loop_does_not_grow_with_the_depth(name):
    model, inputs = MODELS[name]

    def lines(depth):
        deep = model.clone(depth=depth)
        params = blocks.stack(parameters(deep, inputs))
        adapters = blocks.stack_adapters(adapters_of(deep, parameters(deep, inputs)))

        def loss(adapters, params):
            return jnp.sum(lora.apply(deep, params, adapters, inputs, scale=0.5))

        return jax.jit(jax.grad(loss)).lower(adapters, params).as_text().count("\n")

    assert lines(2) == lines(9)


def test_adapters_elsewhere_than_in_blocks_take_part():
    model, inputs = MODELS["llama"]
    params = parameters(model, inputs)
    adapters = adapters_of(model, params, ["mlp/up", "head"])
    assert "head" in adapters
    run = jax.jit(lambda params: lora.apply(model, params, adapters, inputs, scale=0.5))
    assert_close(run(blocks.stack(params)), run(params))


def test_what_is_stacked_is_found_again():
    adapters = adapters_of(VIT, parameters(VIT, IMAGES), ["query", "head"])
    stacked = blocks.stack_adapters(adapters)
    assert stacked["block_*/attention/query"].a.shape == (3, 16, 2)
    again = blocks.unstack_adapters(stacked)
    assert again.keys() == adapters.keys()
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_more_than_ten_blocks_keep_their_order():
    factors = [Factors(jnp.full((2, 1), i), jnp.full((1, 2), -i)) for i in range(12)]
    adapters = {f"block_{i}/fc": f for i, f in enumerate(factors)}
    stacked = blocks.stack_adapters(dict(sorted(adapters.items())))
    np.testing.assert_array_equal(stacked["block_*/fc"].a[:, 0, 0], np.arange(12))


def test_blocks_that_are_not_alike_are_named():
    params = parameters(VIT, IMAGES)
    wider = {**params, "block_1": params["block_1"] | {"mlp": {"fc1": params["head"]}}}
    with pytest.raises(ValueError, match="parameters of block_1 are not of the layers and shapes"):
        blocks.stack(wider)
    with pytest.raises(ValueError, match="there are parameters of none"):
        blocks.stack({"head": params["head"]})
    some = adapters_of(VIT, params, ["block_[02]/attention/query"])
    with pytest.raises(ValueError, match="there are adapters of block_0, block_2"):
        blocks.check(params, some)
    with pytest.raises(ValueError, match="adapters of block_1 are not"):
        blocks.check(params, adapters_of(VIT, params, ["query", "block_[02]/mlp/fc1"]))


def test_adapters_of_the_first_blocks_alone_are_refused():
    """A stack of two does not go through a loop over three."""
    params = parameters(VIT, IMAGES)
    first = adapters_of(VIT, params, ["block_[01]/attention/query"])
    with pytest.raises(ValueError, match="adapters are of 2 blocks, the parameters of 3"):
        blocks.check(params, first)
    with pytest.raises(ValueError, match="adapters are of 2 blocks, the parameters of 3"):
        lora.apply(VIT, blocks.stack(params), first, IMAGES, scale=1.0)


def test_a_gradient_before_a_start_is_that_without_a_loop():
    params = parameters(VIT, IMAGES)
    backbone, head = lora.split_head(params, "head")
    adapters = adapters_of(VIT, backbone)
    offset = jax.tree.map(lambda x: -x, adapters)
    task = classification(VIT, lambda batch: (batch["image"],))

    def batch_of(step):
        return {"image": IMAGES + 0.1 * step, "label": jnp.array([0, 2])}, jnp.ones(2)

    @jax.jit
    def gradient(frozen):
        at = Trainable(adapters, head)
        return local.gradient(task, frozen, jnp.float32(0.5), at, offset, batch_of, jnp.int32(3))

    assert_close(gradient(task._replace(loop=True).frozen(backbone)), gradient(backbone))


def test_a_round_in_a_loop_is_a_round():
    """With a penalty, unequal ranks and a trained head."""
    counts, method = (3, 5, 4), methods.get("hetlora")()
    rng = np.random.default_rng(3)
    examples = {
        "image": rng.normal(size=(sum(counts), 16, 16, 3)).astype(np.float32),
        "label": rng.integers(0, 3, sum(counts)).astype(np.int32),
    }
    data = client_data(examples, np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1]))
    params = parameters(VIT, IMAGES)
    backbone, head = lora.split_head(params, "head")
    server = Server(
        backbone, Trainable(adapters_of(VIT, backbone), head), jnp.float32(0.5), (), jnp.int32(0)
    )
    federation = create(jax.random.key(5), method, server, len(counts), (1, 2, 2))
    task = classification(VIT, lambda batch: (batch["image"],))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0, weight_decay=1e-3))
    training = LocalTraining(optimizer, batch_size=2, steps=2)

    def after(loop):
        run = make_round(Recipe(task._replace(loop=loop), method, training))
        return run(federation, data, jnp.arange(3), jax.random.key(7), jnp.float32(1e-2))

    def kernels(federation):
        server = federation.server
        merged = lora.merge(server.backbone, server.trainable.adapters, scale=server.scale)
        return lora.kernels({**merged, **server.trainable.head})

    (one, metrics), (other, others) = after(False), after(True)
    assert_close(others.client_loss, metrics.client_loss)
    assert_close(kernels(other), kernels(one), rtol=1e-3)
    moved = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), kernels(one), kernels(federation))
    assert all(moved[path] > 1e-3 for path in federation.server.trainable.adapters)
