"""Text generation with a Llama: a pure function, one compiled program, adapters included."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedlora_jax import lora
from fedlora_jax.lora import Adapters, Params
from fedlora_jax.models.llama import Cache, Llama


class _Progress(NamedTuple):
    step: jax.Array
    tokens: jax.Array
    logits: jax.Array
    ended: jax.Array
    cache: Cache


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "end_token"))
def generate(
    model: Llama,
    params: Params,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    max_new_tokens: int,
    adapters: Adapters | None = None,
    scale: float | jax.Array = 1.0,
    key: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    top_p: float | jax.Array = 1.0,
    end_token: int | tuple[int, ...] | None = None,
) -> jax.Array:
    """Continues prompts, greedily or by sampling.

    The prompts are read in one pass that fills a cache; each new token then costs one token's
    work. It stops early when every text has ended.

    Args:
      model: The language model.
      params: Its parameters.
      prompts: Token ids `[B, T]`, padded on the right with anything.
      lengths: `[B]`, from 1 to T, tokens of each prompt.
      max_new_tokens: Tokens to generate.
      adapters: LoRA adapters, from module path to `Factors`.
      scale: The factor s of the adapters.
      key: A random key to sample with; None for the most likely token at each step.
      temperature: Logits are divided by it before sampling; at 0 the most likely token is taken.
      top_p: Sample from the likeliest tokens whose probabilities sum up to this.
      end_token: Token id that ends a text, or several, each of which does.

    Returns:
      New tokens `[B, max_new_tokens]`; after the end of a text, `end_token`, or the first of
      several, again and again.

    Raises:
      ValueError: If prompts and new tokens together are longer than the model's context.
    """
    several = end_token if isinstance(end_token, tuple) else (end_token,)
    ends = [token for token in several if token is not None]

    def forward(
        tokens: jax.Array, positions: jax.Array, cache: Cache, last: jax.Array
    ) -> tuple[jax.Array, Cache]:
        inputs = (tokens, None, positions, cache, last)
        logits, cache = lora.apply(model, params, adapters or {}, *inputs, scale=scale)
        return logits[:, 0], cache

    def pick(logits: jax.Array, step: jax.Array) -> jax.Array:
        likeliest = jnp.argmax(logits, axis=-1)
        if key is None:
            return likeliest
        warm = jnp.asarray(temperature) > 0
        kept = _keep_top(logits / jnp.where(warm, temperature, 1), top_p)
        drawn = jax.random.categorical(jax.random.fold_in(key, step), kept)
        return jnp.where(warm, drawn, likeliest)

    def unfinished(now: _Progress) -> jax.Array:
        return (now.step < max_new_tokens) & ~jnp.all(now.ended)

    def advance(now: _Progress) -> _Progress:
        token = pick(now.logits, now.step).astype(prompts.dtype)
        ended = now.ended
        if ends:
            token = jnp.where(ended, ends[0], token)
            ended = ended | jnp.isin(token, jnp.array(ends, token.dtype))
        tokens = now.tokens.at[:, now.step].set(token)
        position = (lengths + now.step)[:, None]
        logits, cache = forward(token[:, None], position, now.cache, jnp.zeros_like(lengths))
        return _Progress(now.step + 1, tokens, logits, ended, cache)

    batch, length = prompts.shape
    model.check_length(length + max_new_tokens)
    cache = model.empty_cache(batch, length + max_new_tokens)
    positions = jnp.broadcast_to(jnp.arange(length), prompts.shape)
    logits, cache = forward(prompts, positions, cache, lengths - 1)
    tokens = jnp.full((batch, max_new_tokens), ends[0] if ends else 0, prompts.dtype)
    start = _Progress(jnp.int32(0), tokens, logits, jnp.zeros(batch, bool), cache)
    return jax.lax.while_loop(unfinished, advance, start).tokens


def _keep_top(logits: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Logits `[B, V]`, minus infinity outside the smallest set that holds probability `top_p`."""
    order = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probability = jax.nn.softmax(order, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = (before < top_p).at[:, 0].set(True)
    threshold = jnp.min(jnp.where(kept, order, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)
