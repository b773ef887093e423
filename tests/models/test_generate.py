"""Generation against the plain forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax import blocks, lora
from fedlora_jax.models import Llama
from fedlora_jax.models.generate import _keep_top, generate

MODEL = Llama(vocab_size=11, width=16, depth=1, num_heads=4, num_kv_heads=2, mlp_dim=24)
APPLY = jax.jit(MODEL.apply)
LENGTHS = jnp.array([3, 5])
PROMPTS = jnp.asarray(np.random.default_rng(0).integers(0, 11, size=(2, 5)))


@pytest.fixture(scope="module")
def params():
    params = jax.jit(MODEL.init)(jax.random.key(0), PROMPTS)["params"]
    return jax.tree.map(lambda x: 3 * x, params)  # Sharper logits: no near ties.


def greedy_without_cache(params, row, steps):
    length = int(LENGTHS[row])
    tokens = np.zeros((1, length + steps), int)
    tokens[0, :length] = PROMPTS[row, :length]
    for place in range(length, length + steps):
        logits = APPLY({"params": params}, tokens)
        tokens[0, place] = np.argmax(logits[0, place - 1])
    return tokens[0, length:].tolist()


def test_cached_generation_is_the_plain_forward_pass(params):
    output = generate(MODEL, params, PROMPTS, LENGTHS, max_new_tokens=6)
    for row in range(2):
        assert output[row].tolist() == greedy_without_cache(params, row, 6)


def test_padding_of_prompts_does_not_matter(params):
    other = PROMPTS.at[0, 3:].set(7)
    output = generate(MODEL, params, other, LENGTHS, max_new_tokens=6)
    np.testing.assert_array_equal(
        output, generate(MODEL, params, PROMPTS, LENGTHS, max_new_tokens=6)
    )


def test_adapters_are_as_good_as_merged(params):
    adapters = lora.init(jax.random.key(1), params, targets="attention", rank=2)
    adapters = jax.tree.map(lambda x: x + 0.3, adapters)
    adapted = generate(
        MODEL, params, PROMPTS, LENGTHS, max_new_tokens=6, adapters=adapters, scale=0.5
    )
    merged = lora.merge(params, adapters, scale=0.5)
    np.testing.assert_array_equal(
        adapted, generate(MODEL, merged, PROMPTS, LENGTHS, max_new_tokens=6)
    )


def test_a_text_stays_ended(params):
    free = np.asarray(generate(MODEL, params, PROMPTS, LENGTHS, max_new_tokens=6))
    end = int(free[0, 2])
    output = np.asarray(generate(MODEL, params, PROMPTS, LENGTHS, max_new_tokens=6, end_token=end))
    for row in range(2):
        stop = np.flatnonzero(free[row] == end)[:1].tolist() or [6]
        np.testing.assert_array_equal(output[row, : stop[0]], free[row, : stop[0]])
        assert (output[row, stop[0] :] == end).all()


def test_any_of_several_tokens_ends_a_text(params):
    free = np.asarray(generate(MODEL, params, PROMPTS, LENGTHS, max_new_tokens=6))
    unwritten = next(token for token in range(11) if token not in free)
    ends = (unwritten, int(free[0, 1]), int(free[1, 3]))
    options = {"max_new_tokens": 6, "end_token": ends}
    output = np.asarray(generate(MODEL, params, PROMPTS, LENGTHS, **options))
    for row in range(2):
        stop = np.flatnonzero(np.isin(free[row], ends))[0] + 1
        np.testing.assert_array_equal(output[row, :stop], free[row, :stop])
        assert (output[row, stop:] == unwritten).all()


def test_stacked_blocks_have_no_cache(params):
    with pytest.raises(ValueError, match="no cache with stacked blocks"):
        generate(MODEL, blocks.stack(params), PROMPTS, LENGTHS, max_new_tokens=6)


def test_sampling_follows_the_key_and_the_distribution(params):
    def sample(key, prompts=PROMPTS, temperature=3.0, **options):
        options |= {"key": key, "temperature": temperature, "max_new_tokens": 1}
        return generate(MODEL, params, prompts, LENGTHS, **options)

    np.testing.assert_array_equal(sample(jax.random.key(0)), sample(jax.random.key(0)))
    draws = np.concatenate([sample(jax.random.key(i)) for i in range(300)], axis=1)[1]
    logits = APPLY({"params": params}, PROMPTS)[1, -1] / 3.0
    frequency = np.bincount(np.asarray(draws), minlength=11) / 300
    np.testing.assert_allclose(frequency, jax.nn.softmax(logits), atol=0.12)
    greedy = generate(MODEL, params, PROMPTS, LENGTHS, max_new_tokens=1)
    np.testing.assert_array_equal(sample(jax.random.key(5), top_p=1e-6), greedy)
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[:, ::-1]):
        greedy = generate(MODEL, params, prompts, LENGTHS, max_new_tokens=1)
        cold = sample(jax.random.key(5), prompts, temperature=0.0)
        np.testing.assert_array_equal(cold, greedy)


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = jnp.log(jnp.array([[0.5, 0.1, 0.3, 0.1]]))
    for top_p, kept in ((0.4, [0]), (0.6, [0, 2]), (1.0, [0, 1, 2, 3])):
        finite = np.isfinite(jax.jit(_keep_top)(logits, top_p)[0])
        assert np.flatnonzero(finite).tolist() == kept
