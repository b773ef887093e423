"""What holds for all backbones, without their originals (tests/parity has those)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax import lora, models
from fedlora_jax.models import Bert, Llama, Mixer, RopeScaling, ViT
from fedlora_jax.models.llama import causal_attention, rotary_frequencies

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 20, size=(2, 7)))
SMALL = dict(width=16, depth=1)
TEXT = dict(vocab_size=20, num_heads=4, **SMALL)
MODELS = {
    "vit": (ViT(num_classes=3, patch_size=8, num_heads=2, **SMALL), IMAGES),
    "mixer": (Mixer(num_classes=3, patch_size=8, **SMALL), IMAGES),
    "bert": (Bert(num_classes=3, num_positions=9, **TEXT), TOKENS),
    "roberta": (
        Bert(num_classes=3, num_positions=9, variant="roberta", pad_token=1, **TEXT),
        TOKENS,
    ),
    "minilm": (Bert(num_classes=3, pooling="mean", num_positions=9, **TEXT), TOKENS),
    "llama": (Llama(num_kv_heads=2, mlp_dim=24, **TEXT), TOKENS),
    "llama_tied": (
        Llama(num_kv_heads=1, mlp_dim=24, tied=True, rope_scaling=RopeScaling(8, 1, 4, 4), **TEXT),
        TOKENS,
    ),
}


ONE_OF_A_KIND = ("vit", "mixer", "bert", "llama")


def parameters(model, inputs):
    """Random ones, in the shapes of `model.init`, of which nothing is compiled."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.3), x.dtype), shapes)


def case(name):
    model, inputs = MODELS[name]
    return model, parameters(model, inputs), inputs


def apply(model, params, *inputs):
    return jax.jit(model.apply)({"params": params}, *inputs)


@pytest.mark.parametrize("name", MODELS)
def test_default_adapters_change_the_output_and_merging_changes_it_alike(name):
    model, params, inputs = case(name)
    adapters = lora.init(jax.random.key(1), params, targets=models.lora_targets(model), rank=2)
    adapters = jax.tree.map(lambda x: 5 * x + 0.3, adapters)
    adapted = jax.jit(lambda a: lora.apply(model, params, a, inputs, scale=2.0))(adapters)
    merged = apply(model, lora.merge(params, adapters, scale=2.0), inputs)
    np.testing.assert_allclose(adapted, merged, rtol=1e-3, atol=1e-4)
    assert not np.allclose(adapted, apply(model, params, inputs), rtol=0, atol=1e-3)


def layer_types(model, params, adapters, inputs):
    """What each Dense layer returns, by path."""
    found = {}

    def record(run, arguments, options, context):
        outputs = run(*arguments, **options)
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            found["/".join(context.module.path)] = outputs.dtype
        return outputs

    with nn.intercept_methods(record):
        jax.eval_shape(lambda: lora.apply(model, params, adapters, inputs, scale=jnp.float32(2)))
    return found


def in_bfloat16(name, targets):
    """A case with adapters of float32 on some layers, and all else in bfloat16."""
    model, params, inputs = case(name)
    adapters = lora.init(jax.random.key(1), params, targets=targets, rank=2)
    adapters = jax.tree.map(lambda x: 0.3 * x + 0.05, adapters)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return model.clone(dtype=jnp.bfloat16), half, adapters, inputs


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
@pytest.mark.parametrize("targets", ["default", "block_0.*/(query|fc1)$", ""])
def test_adapted_layers_return_what_types_they_do_without_adapters(name, targets):
    chosen = models.lora_targets(MODELS[name][0]) if targets == "default" else targets
    model, params, adapters, inputs = in_bfloat16(name, chosen)
    types = layer_types(model, params, adapters, inputs)
    assert types == layer_types(model, params, {}, inputs)
    assert np.dtype(jnp.bfloat16) in [types[path] for path in adapters]


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_adapters_in_bfloat16_do_what_they_do_in_float32(name):
    """Outputs and gradients, which are of the type of the adapters."""
    low, half, adapters, inputs = in_bfloat16(name, "")

    def value_and_gradient(model, params):
        def loss(adapters):
            outputs = lora.apply(model, params, adapters, inputs, scale=jnp.float32(2))
            return jnp.mean(outputs**2), outputs

        (_, outputs), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters)
        return outputs, gradient

    exact = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    wanted = value_and_gradient(low.clone(dtype=jnp.float32), exact)
    got = value_and_gradient(low, half)
    assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(jnp.float32)}
    for x, y in zip(map(joined, got), map(joined, wanted), strict=True):
        assert np.linalg.norm(x - y) < 0.02 * np.linalg.norm(y)


def joined(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_remat_changes_nothing(name):
    model, params, inputs = case(name)

    def gradient(model):
        def loss(params):
            return jnp.mean(model.apply({"params": params}, inputs) ** 2)

        return jax.jit(jax.grad(loss))(params)

    plain, remat = gradient(model), gradient(model.clone(remat=True))
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_bfloat16_is_close_and_comes_out_as_float32(name):
    model, params, inputs = case(name)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    output = apply(model.clone(dtype=jnp.bfloat16), half, inputs)
    expected = apply(model, params, inputs)
    assert output.dtype == jnp.float32
    assert jnp.abs(output - expected).max() < 0.05 * jnp.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_kernels_are_plain_matrices(name):
    _, params, _ = case(name)
    shapes = lora.kernel_shapes(params)
    assert all(len(s.inputs) == len(s.outputs) == 1 for s in shapes.values())


def test_registry():
    assert {"vit_b16", "mixer_b16", "bert_base", "roberta_large", "llama2_7b"} <= set(
        models.names()
    )
    sizes = {
        "vit_b16": ((1, 224, 224, 3), 86_567_656),
        "mixer_b16": ((1, 224, 224, 3), 59_880_472),
        "mixer_s16": ((1, 224, 224, 3), 18_528_264),
        "bert_base": ((1, 2), 109_482_240),
        "roberta_base": ((1, 2), 124_645_632),
        "llama3_1b": ((1, 2), 1_235_814_400),
        "llama2_7b": ((1, 2), 6_738_415_616),
    }
    for name, (shape, count) in sizes.items():
        model = models.get(name)
        inputs = jax.ShapeDtypeStruct(shape, jnp.float32 if len(shape) == 4 else jnp.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
        assert lora.count_parameters(shapes) == count, name
    with pytest.raises(ValueError, match="Did you mean 'mixer_b16'"):
        models.get("mixerb16")


@pytest.mark.parametrize("name", ["bert", "roberta", "minilm"])
def test_padding_does_not_matter(name):
    model, params, _ = case(name)
    padded = jnp.pad(TOKENS[:, :5], [(0, 0), (0, 2)], constant_values=model.pad_token)
    short = apply(model, params, TOKENS[:, :5])
    np.testing.assert_allclose(apply(model, params, padded), short, rtol=1e-4, atol=1e-4)
    mask = jnp.broadcast_to(jnp.arange(7) < 5, TOKENS.shape)
    np.testing.assert_allclose(apply(model, params, TOKENS, mask), short, rtol=1e-4, atol=1e-4)


def test_bert_says_what_is_wrong():
    model, _ = MODELS["roberta"]
    with pytest.raises(ValueError, match="texts of 8 tokens are too long: there are 7 positions"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), int))
    with pytest.raises(ValueError, match="unknown pooling 'cls'"):
        jax.eval_shape(model.clone(pooling="cls").init, jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        jax.eval_shape(model.init, jax.random.key(0), TOKENS[0])


def test_images_must_be_tiled():
    for name in ("vit", "mixer"):
        model, _ = MODELS[name]
        with pytest.raises(ValueError, match="do not tile images of 15 x 16"):
            jax.eval_shape(model.init, jax.random.key(0), IMAGES[:, :15])


def test_llama_is_causal_and_relative():
    model, params, _ = case("llama")
    positions = jnp.broadcast_to(jnp.arange(7), TOKENS.shape)
    logits = apply(model, params, TOKENS, None, positions)
    changed = apply(model, params, TOKENS.at[:, 4:].set(0), None, positions)
    np.testing.assert_allclose(logits[:, :4], changed[:, :4], rtol=1e-5, atol=1e-5)
    shifted = apply(model, params, TOKENS, None, positions + 11)
    np.testing.assert_allclose(logits, shifted, rtol=1e-3, atol=1e-3)


def test_rope_scaling_keeps_short_wavelengths_and_stretches_long_ones():
    plain = rotary_frequencies(16, 10_000.0, None)
    scaled = rotary_frequencies(16, 10_000.0, RopeScaling(8.0, 1.0, 4.0, 128))
    turns = np.asarray(128 * plain / (2 * np.pi))
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    assert (np.diff(scaled) < 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_causal_attention_under_vmap_is_attention_to_what_came_before(dtype):
    """In bfloat16 on a GPU it is another library's; the gradient too."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(3, 2, 10, heads, 8)), dtype) for heads in (4, 2, 2)
    )

    def masked(query, key, value):
        key, value = (jnp.repeat(x.astype(jnp.float32), 2, axis=2) for x in (key, value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query.astype(jnp.float32), key) / 8**0.5
        weights = jax.nn.softmax(jnp.where(np.tril(np.ones((10, 10))), scores, -jnp.inf))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)

    def value_and_gradients(attention):
        def total(*inputs):
            result = attention(*inputs).astype(jnp.float32)
            return jnp.sum(result * jnp.cos(jnp.arange(8.0))), result

        return jax.jit(jax.vmap(jax.grad(total, (0, 1, 2), has_aux=True)))(query, key, value)

    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            np.float32(x), np.float32(y), atol=tolerance * np.max(np.abs(y.astype(jnp.float32)))
        ),
        value_and_gradients(causal_attention),
        value_and_gradients(masked),
    )


def test_positions_in_order_are_those_that_are_not_given():
    model, params, tokens = case("llama")
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    np.testing.assert_allclose(
        apply(model, params, tokens), apply(model, params, tokens, None, at), atol=1e-5
    )


@pytest.mark.parametrize("name", MODELS)
def test_all_is_float32_where_numbers_are_float64_by_default(name):
    model, inputs = MODELS[name]
    with jax.enable_x64(True):
        outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), inputs)
    assert {x.dtype for x in jax.tree.leaves((outputs, variables))} == {np.dtype(np.float32)}
