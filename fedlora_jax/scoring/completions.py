"""Text in and out of a Llama: prompts to tokens, in batches of similar length, and back."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax.data.text import chat_template
from fedlora_jax.lora import Adapters, Params
from fedlora_jax.models.generate import generate
from fedlora_jax.models.llama import Llama
from fedlora_jax.models.pretrained import Language

# Texts are padded to a power of two from here on, so that few programs are compiled.
_SHORTEST = 64
# Tokens that are written before it is looked at which texts are done.
_PIECE = 64
_NO_BOUND = 1 << 30


class Sampling(NamedTuple):
    """How tokens are chosen.

    Attributes:
      max_new_tokens: Most tokens of a text.
      temperature: Logits are divided by it; 0 for the likeliest token at each step.
      top_p: Of the likeliest tokens, those whose probabilities sum up to this.
      seed: Of the random choices.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def encode(language: Language, prompt: str, chat: bool = False) -> list[int]:
    """The tokens of a text to be continued, or of a message to be answered.

    Raises:
      ValueError: If a chat is wanted and the model has no template.
    """
    if not chat:
        return language.tokenizer.encode(prompt).ids
    if language.template is None:
        raise ValueError("the model has no chat template: let it continue plain text")
    written, source = language.template
    template = chat_template(written, language.special, source)
    text, _ = template.render({"prompt": prompt})
    # What begins a text is in the template.
    return language.tokenizer.encode(text, add_special_tokens=False).ids


def decode(language: Language, prompt: Sequence[int], new: Sequence[int]) -> tuple[str, bool]:
    """The text of new tokens up to the first that is special or ends it, and if there was one."""
    added = language.tokenizer.get_added_tokens_decoder()
    last = {index for index, token in added.items() if token.special}.union(language.end_tokens)
    ends = [i for i, token in enumerate(new) if token in last]
    new = list(new[: ends[0]]) if ends else list(new)
    # Some tokenizers drop a space at the beginning of what they decode.
    before, whole = (language.tokenizer.decode(ids) for ids in (list(prompt), [*prompt, *new]))
    text = whole[len(before) :] if whole.startswith(before) else language.tokenizer.decode(new)
    return text, bool(ends)


def check_lengths(
    model: Llama, prompts: Sequence[Sequence[int]], names: Sequence[str], sampling: Sampling
) -> None:
    """Checks that texts will end within the model's context.

    Args:
      model: The language model.
      prompts: The tokens of each.
      names: What to call them.
      sampling: How much is written.

    Raises:
      ValueError: If a prompt is empty or too long, by name.
    """
    most = _context(model) - sampling.max_new_tokens
    for name, prompt in zip(names, prompts, strict=True):
        if not 0 < len(prompt) <= most:
            problem = f"has {len(prompt)} tokens" if prompt else "is empty"
            raise ValueError(
                f"the prompt of {name} {problem}; with {sampling.max_new_tokens} new tokens the "
                f"model's context has room for 1 to {most}"
            )


def write(
    model: Llama,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    adapters: Adapters,
    scale: float | jax.Array,
    end_token: int | tuple[int, ...] | None,
    done: Callable[[int, list[int]], bool],
    rows: int,
    skip: Collection[int] = (),
) -> Iterator[dict[int, list[int]]]:
    """Continues prompts, and gives the texts that are done, batch by batch.

    Texts of similar length are written together, a piece of 64 tokens at a time; those that are
    not done then go on together, their beginnings read again. So a few long texts do not keep the
    others waiting, and there is one program for each padded length. The random choices for a text
    depend on what it is written with, and differ from call to call with what is skipped.

    Args:
      model: The language model.
      params: Its parameters.
      prompts: The tokens of each.
      sampling: How tokens are chosen.
      adapters: LoRA adapters, or an empty dict.
      scale: Their factor s.
      end_token: As for `generate`.
      done: `(position of the prompt, new tokens) -> bool`, whether no more are wanted.
      rows: Texts at the same time.
      skip: Positions of prompts that are left out.

    Yields:
      New tokens by position of the prompt, at most `sampling.max_new_tokens` of each.
    """
    new: dict[int, list[int]] = {i: [] for i in range(len(prompts)) if i not in skip}
    rows = min(rows, max(1, len(new)))

    def go_on(texts: Sequence[Sequence[int]], piece: int, key: jax.Array | None) -> list[list[int]]:
        length = min(_padded(len(texts[-1])), _context(model) - piece)
        padded = np.zeros((rows, length), np.int32)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = text
        lengths = np.ones(rows, np.int32)
        lengths[: len(texts)] = [len(text) for text in texts]
        found = generate(
            model,
            params,
            jnp.asarray(padded),
            jnp.asarray(lengths),
            max_new_tokens=piece,
            adapters=adapters,
            scale=scale,
            key=key,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            end_token=end_token,
        )
        return np.asarray(found)[: len(texts)].tolist()

    for begun in range(0, sampling.max_new_tokens, _PIECE):
        piece = min(_PIECE, sampling.max_new_tokens - begun)
        texts = {i: [*prompts[i], *written] for i, written in new.items()}
        order = sorted(texts, key=lambda i: len(texts[i]))
        for batch in (order[start : start + rows] for start in range(0, len(order), rows)):
            finished = {}
            tokens = go_on([texts[i] for i in batch], piece, _key(sampling, begun, batch[0]))
            for i, more in zip(batch, tokens, strict=True):
                new[i] = new[i] + more
                if len(new[i]) == sampling.max_new_tokens or done(i, new[i]):
                    finished[i] = new.pop(i)
            yield finished


def _context(model: Llama) -> int:
    return model.context or _NO_BOUND


def _padded(length: int) -> int:
    return max(_SHORTEST, 1 << math.ceil(math.log2(length)))


def _key(sampling: Sampling, begun: int, first: int) -> jax.Array | None:
    """Of a batch, told apart from all others by how far its texts are and its first prompt."""
    if not sampling.temperature:
        return None
    key = jax.random.fold_in(jax.random.key(sampling.seed), begun)
    return jax.random.fold_in(key, first)
