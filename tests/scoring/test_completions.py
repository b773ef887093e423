"""Text in and out of a tiny Llama, against generating each text by itself in one go."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax import lora
from fedlora_jax.models import pretrained
from fedlora_jax.models.generate import generate
from fedlora_jax.models.llama import Llama
from fedlora_jax.models.pretrained import Language
from fedlora_jax.scoring import completions
from fedlora_jax.scoring.completions import Sampling

tokenizers = pytest.importorskip("tokenizers")

MODEL = Llama(vocab_size=40, width=16, depth=1, num_heads=2, num_kv_heads=1, mlp_dim=16)
PROMPTS = [list(range(1, 1 + n)) for n in (3, 30, 1, 12, 39)]
SCALE = 2.0


@pytest.fixture(scope="module")
def weights():
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 3 * x, params)
    fresh = lora.init(jax.random.key(1), params, targets="query|down", rank=2)
    return params, jax.tree.map(lambda x: x + 0.3, fresh)


def write(weights, sampling, done=lambda i, new: False, rows=2, skip=(), end=None):
    params, adapters = weights
    return list(
        completions.write(
            MODEL,
            params,
            PROMPTS,
            sampling,
            adapters=adapters,
            scale=SCALE,
            end_token=end,
            done=done,
            rows=rows,
            skip=skip,
        )
    )


def joined(batches):
    found = {}
    for batch in batches:
        assert not batch.keys() & found.keys()
        found |= batch
    return found


@pytest.fixture(scope="module")
def alone(weights):
    """Each text by itself, in one go."""
    params, adapters = weights

    def of(prompt):
        options = {"max_new_tokens": 70, "adapters": adapters, "scale": SCALE}
        return generate(MODEL, params, jnp.array([prompt]), jnp.array([len(prompt)]), **options)[0]

    return [np.asarray(of(prompt)).tolist() for prompt in PROMPTS]


def test_pieces_and_batches_change_nothing(weights, alone):
    assert joined(write(weights, Sampling(70))) == dict(enumerate(alone))


def test_no_program_is_longer_than_the_context(weights, alone, monkeypatch):
    lengths = []

    def watched(model, params, prompts, *arguments, max_new_tokens, **options):
        lengths.append(prompts.shape[1] + max_new_tokens)
        return generate(
            MODEL, params, prompts, *arguments, max_new_tokens=max_new_tokens, **options
        )

    monkeypatch.setattr(completions, "generate", watched)
    longest = max(map(len, PROMPTS))
    monkeypatch.setattr(completions, "_context", lambda model: longest + 70)
    assert joined(write(weights, Sampling(70))) == dict(enumerate(alone))
    assert max(lengths) == longest + 70


def test_done_texts_are_given_at_once_and_others_go_on(weights, alone):
    seen = []

    def done(i, new):
        seen.append((i, len(new)))
        return i != 3

    batches = write(weights, Sampling(70), done, skip={1})
    assert joined(batches) == {0: alone[0][:64], 2: alone[2][:64], 3: alone[3], 4: alone[4][:64]}
    assert [sorted(batch) for batch in batches] == [[0, 2], [4], [3]]
    assert sorted(seen) == [(i, 64) for i in (0, 2, 3, 4)]


def test_the_end_token_ends(weights, alone):
    end = alone[0][5]
    found = joined(write(weights, Sampling(64), end=end))
    stop = alone[0].index(end)
    assert found[0] == alone[0][:stop] + [end] * (64 - stop)


def test_sampling(weights):
    sampling = Sampling(8, temperature=1.5, top_p=0.9)
    first = joined(write(weights, sampling))
    assert first == joined(write(weights, sampling))
    assert first != joined(write(weights, sampling._replace(seed=1)))
    assert first != joined(write(weights, Sampling(8)))


def test_few_programs(weights, caplog):
    with jax.log_compiles():
        for _ in range(2):
            write(weights, Sampling(9), rows=3)
    messages = [record.getMessage() for record in caplog.records]
    compiled = [text for text in messages if "Finished XLA compilation of jit(generate)" in text]
    assert len(compiled) == 1


def test_lengths(weights):
    sampling = Sampling(8)
    for prompts, problem in (
        ([[1], []], "the prompt of b is empty"),
        ([[1], [1] * 5], "the prompt of b has 5 tokens; with 8 new tokens .* room for 1 to 4"),
    ):
        with pytest.raises(ValueError, match=problem):
            completions.check_lengths(Bounded(), prompts, "ab", sampling)
    completions.check_lengths(Bounded(), [[1] * 4], "a", sampling)
    completions.check_lengths(MODEL, [[1] * 9999], "a", sampling)


class Bounded:
    context = 12


@pytest.fixture
def directory(tmp_path):
    """A tokenizer of words, with a special one, as it lies beside weights."""
    words = ["<end>", "<user>", "a", "b", "say", "?"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>", "<user>"])
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_language_of_a_directory(directory):
    language = pretrained.read_language(str(directory))
    assert language[1:] == (None, (), {}) and language.end_token is None
    assert completions.encode(language, "a b a") == [2, 3, 2]
    assert completions.decode(language, [2], [3, 2, 0, 3]) == (" b a", True)
    assert completions.decode(language, [2], [3, 3]) == (" b b", False)
    with pytest.raises(ValueError, match="no chat template"):
        completions.encode(language, "a", chat=True)

    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": [3, 0]}))
    language = pretrained.read_language(str(directory / "tokenizer.json"))
    assert completions.encode(language, "say a", chat=True) == [1, 4, 2]
    assert language.end_token == 3 and language.end_tokens == (3, 0)
    assert completions.decode(language, [2], [2, 3, 2]) == (" a", True)
    # Neither token is special.
    (directory / "config.json").write_text(json.dumps({"eos_token_id": [4, 3]}))
    language = pretrained.read_language(str(directory / "tokenizer.json"))
    assert completions.decode(language, [2], [2, 3, 4, 2]) == (" a", True)
    (directory / "chat_template.jinja").write_text("say {{ messages[0].content }}")
    assert completions.encode(pretrained.read_language(str(directory)), "a", True) == [4, 2]
    (directory / "chat_template.jinja").write_text("{{ messages + 1 }}")
    with pytest.raises(ValueError, match="chat_template.jinja: the chat template refuses"):
        completions.encode(pretrained.read_language(str(directory)), "a", chat=True)


def test_several_templates_and_tokens_by_name(directory):
    named = [
        {"name": "tool_use", "template": "x"},
        {"name": "default", "template": "say {{ eos_token }}"},
    ]
    known = {"chat_template": named, "eos_token": {"content": "<end>"}, "pad_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(known))
    language = pretrained.read_language(directory)
    assert language.special == {"eos_token": "<end>"} and language.end_tokens == (0,)
    assert completions.encode(language, "a", chat=True) == [4, 0]


def test_no_language(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        pretrained.read_language(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        pretrained.read_language(str(tmp_path))


def test_a_space_at_the_beginning_is_kept():
    pieces = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    pieces.decoder = tokenizers.decoders.Metaspace()
    assert pieces.decode([1]) == "b"
    assert completions.decode(Language(pieces, None), [0], [1, 0]) == (" b a", False)
