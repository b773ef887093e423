"""Tokens scored in chunks against plain logits and optax's cross-entropy."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlora_jax import lora
from fedlora_jax.models import Llama
from fedlora_jax.models.generate import generate
from tests.jaxprs import equations

SIZES = dict(vocab_size=37, width=16, depth=1, num_heads=4, num_kv_heads=2, mlp_dim=24)
MODELS = {"tied": Llama(**SIZES, tied=True), "untied": Llama(**SIZES)}
RNG = np.random.default_rng(0)
# Three chunks of 128 tokens, the last one with padding.
TOKENS = jnp.asarray(RNG.integers(0, 37, (3, 101)))
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]
WEIGHTS = jnp.asarray(RNG.random(TARGETS.shape), jnp.float32)


def parameters(model):
    """In the shapes of an initialisation that scores."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), INPUTS, TARGETS)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def adapters_of(model, params, targets=("",)):
    made = lora.init(jax.random.key(2), params, targets=targets, rank=2)
    return jax.tree.map(lambda x: 0.3 * x + 0.1, made)


def plain(model, params, adapters, scale=2.0):
    logits = lora.apply(model, params, adapters, INPUTS, scale=scale)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS)
    return nll, jnp.argmax(logits, axis=-1) == TARGETS


def chunked(model, params, adapters, scale=2.0):
    return lora.apply(model, params, adapters, INPUTS, TARGETS, scale=scale)


def value_and_gradients(score, model):
    def loss(params, adapters):
        nll, correct = score(model, params, adapters)
        return jnp.sum(WEIGHTS * nll), (nll, correct)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def close(got, wanted, tolerance=1e-5):
    """The difference of two trees beside their norm."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True))
    assert all(x.dtype == y.dtype for x, y in pairs)
    got, wanted = (np.concatenate([np.ravel(pair[i]) for pair in pairs]) for i in (0, 1))
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("changes", [{}, {"remat": True}, {"dtype": jnp.bfloat16}])
def test_scores_are_those_of_plain_logits(name, changes):
    """Values, and gradients for all parameters and for adapters on all layers, the head's too."""
    model = MODELS[name].clone(**changes)
    params = parameters(model)
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.eval_shape(model.init, jax.random.key(0), INPUTS)["params"]
    )
    adapters = adapters_of(model, params)
    assert ("head" in adapters) == (name == "untied")
    (got, (nll, correct)), slopes = value_and_gradients(chunked, model)(params, adapters)
    (wanted, expected), expected_slopes = value_and_gradients(plain, model)(params, adapters)
    assert nll.dtype == jnp.float32 and nll.shape == TARGETS.shape
    # In bfloat16 the two programs round at other places.
    tolerance, differing = (2e-2, 0.02) if "dtype" in changes else (1e-5, 0)
    close((got, nll), (wanted, expected[0]), tolerance)
    assert jnp.mean(correct != expected[1]) <= differing
    for slope, expected in zip(slopes, expected_slopes):
        close(slope, expected, tolerance)
    if name == "untied":
        assert all(jnp.any(x != 0) for x in slopes[1]["head"])


@pytest.mark.parametrize("name", MODELS)
def test_types_are_the_same_where_numbers_are_float64_by_default(name):
    model = MODELS[name]

    def loss(params):
        return jnp.sum(model.apply({"params": params}, INPUTS, TARGETS).nll)

    with jax.enable_x64(True):
        params = jax.eval_shape(model.init, jax.random.key(0), INPUTS)["params"]
        value, slopes = jax.eval_shape(jax.value_and_grad(loss), params)
    assert {x.dtype for x in jax.tree.leaves((params, value, slopes))} == {np.dtype(np.float32)}


def test_clients_under_vmap():
    model = MODELS["untied"]
    params = parameters(model)
    one = adapters_of(model, params)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), one)

    def loss(adapters):
        return jnp.sum(WEIGHTS * chunked(model, params, adapters).nll)

    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(loss)))(stacked)
    each = jax.jit(lambda stacked: jax.lax.map(jax.value_and_grad(loss), stacked))
    close((values, slopes), each(stacked))


def test_padding_on_the_right_moves_nothing():
    model = MODELS["tied"]
    params = parameters(model)
    adapters = adapters_of(model, params)
    real = jnp.arange(TARGETS.shape[1]) < 60

    def loss(adapters, filler):
        inputs, targets = (jnp.where(real, x, filler) for x in (INPUTS, TARGETS))
        nll = lora.apply(model, params, adapters, inputs, targets, scale=2.0).nll
        return jnp.sum(jnp.where(real, nll, 0.0))

    gradient = jax.jit(jax.value_and_grad(loss))
    first, other = gradient(adapters, 0), gradient(adapters, 31)
    jax.tree.map(np.testing.assert_array_equal, first, other)


def arrays(jaxpr):
    """The sizes of all arrays in a jaxpr and those inside it."""
    return (math.prod(x.aval.shape) for each in equations(jaxpr) for x in each.outvars)


@pytest.mark.parametrize("name", MODELS)
def test_no_array_holds_the_logits_of_all_tokens(name):
    """Nor anything else of their number, forward or backward; two batches tell what grows."""
    model = MODELS[name].clone(vocab_size=5000, remat=True)
    params = jax.eval_shape(model.init, jax.random.key(0), INPUTS)["params"]
    adapters = jax.eval_shape(lambda p: adapters_of(model, p), params)

    def largest(batch, targets):
        tokens = jax.ShapeDtypeStruct((batch, 128), jnp.int32)

        def loss(adapters, params, tokens):
            inputs = (tokens, tokens) if targets else (tokens,)
            scored = lora.apply(model, params, adapters, *inputs, scale=2.0)
            return jnp.sum(scored.nll) if targets else jnp.sum(jax.nn.log_softmax(scored))

        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(adapters, params, tokens)
        return max(arrays(jaxpr.jaxpr))

    chunk = 128 * model.vocab_size
    assert largest(2, True) == largest(6, True) == chunk
    assert largest(6, False) == 6 * chunk


def test_memory_is_that_of_one_chunk():
    """As the compiler plans it, for a vocabulary that is large beside the width."""
    model = MODELS["tied"].clone(vocab_size=20_000)
    params = jax.eval_shape(model.init, jax.random.key(0), INPUTS)["params"]
    adapters = jax.eval_shape(lambda p: adapters_of(model, p), params)
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)

    def working(score):
        def loss(adapters, params, tokens):
            return jnp.sum(score(adapters, params, tokens))

        compiled = jax.jit(jax.grad(loss)).lower(adapters, params, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def from_logits(adapters, params, tokens):
        logits = lora.apply(model, params, adapters, tokens, scale=2.0)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens)

    def in_chunks(adapters, params, tokens):
        return lora.apply(model, params, adapters, tokens, tokens, scale=2.0).nll

    whole = 8 * 128 * model.vocab_size * 4
    assert working(from_logits) > whole > 2 * working(in_chunks)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_made_once_unless_the_head_is_trained(name):
    """By the products written in the compiled program, which has the loop's step once."""
    model = MODELS[name]
    params = jax.eval_shape(model.init, jax.random.key(0), INPUTS)["params"]
    adapters = jax.eval_shape(lambda p: adapters_of(model, p, "attention|mlp"), params)

    def products(function):
        text = jax.jit(function).lower(adapters, params).compile().as_text()
        return len(re.findall(r"= \S+ dot\(", text))

    def total(score):
        return lambda adapters, params: jnp.sum(score(model, params, adapters)[0])

    for function in (lambda f: f, jax.grad):
        assert products(function(total(chunked))) == products(function(total(plain)))
    trained = functools.partial(jax.grad, argnums=(0, 1))
    assert products(trained(total(chunked))) == products(trained(total(plain))) + 1


def test_second_derivatives_are_refused():
    model = MODELS["tied"]
    params = parameters(model)

    def loss(adapters):
        return jnp.sum(chunked(model, params, adapters).nll)

    def slope(adapters):
        return sum(jnp.sum(x) for x in jax.tree.leaves(jax.grad(loss)(adapters)))

    with pytest.raises(NotImplementedError, match="take the logits"):
        jax.eval_shape(jax.grad(slope), adapters_of(model, params))


def test_what_cannot_be_scored():
    model = MODELS["tied"].clone(context=100)
    params = parameters(model)

    def call(*inputs):
        return jax.eval_shape(model.apply, {"params": params}, *inputs)

    call(INPUTS, TARGETS)
    with pytest.raises(ValueError, match="101 tokens is longer than the model's context of 100"):
        call(TOKENS)
    with pytest.raises(ValueError, match="longer than the model's context"):
        generate(model, params, TOKENS[:, :90], jnp.array([90] * 3), max_new_tokens=11)
    with pytest.raises(ValueError, match=r"targets are \(3, 99\), but tokens \(3, 100\)"):
        call(INPUTS, TARGETS[:, 1:])
    with pytest.raises(ValueError, match="no cache"):
        call(INPUTS, TARGETS, None, model.empty_cache(3, 100))
