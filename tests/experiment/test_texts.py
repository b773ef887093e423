"""Text by configuration: tokenizer, template and model have to fit."""

import json

import ml_collections
import numpy as np
import pytest

from configs import jsonl as jsonl_config
from configs import python_stdlib_smollm2
from fedlora_jax.data import python_stdlib
from fedlora_jax.experiment import setting, texts
from tests import letters

pytest.importorskip("tokenizers", reason="needs the extra `text`")

CHAT = "{% for m in messages %}<|user|>{{ m.content }}{{ eos_token }}{% endfor %}"
BEGUN = CHAT + "{% if add_generation_prompt %}<|user|>{% endif %}"


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A checkpoint's directory with a tokenizer, and a file of examples."""
    monkeypatch.setenv("FEDLORA_DATA_DIR", str(tmp_path / "data"))
    letters.tokenizer().save(str(tmp_path / "tokenizer.json"))
    known = {"eos_token": {"content": "<|end|>"}, "pad_token": None, "chat_template": BEGUN}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(known))
    lines = [{"prompt": f"p{i}", "response": f"r{i}", "client": "ab"[i % 2]} for i in range(20)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def of_jsonl(directory, **changes):
    config = jsonl_config.get_config(f"file={directory / 'x.jsonl'}")
    config.data.update(tokenizer=str(directory), length=24)
    config.model.name = "tiny"
    config.data.update(changes)
    return config


def of_stdlib(directory, **changes):
    config = python_stdlib_smollm2.get_config("runlocal")
    config.data.update(tokenizer=str(directory / "tokenizer.json"), end_token="<|end|>")
    config.data.update(changes)
    return config


def llama(**changes):
    from fedlora_jax.models import Llama

    sizes = dict(width=16, depth=1, num_heads=2, num_kv_heads=1, mlp_dim=24, tied=True)
    return Llama(**{"vocab_size": 260, "context": 64, **sizes, **changes})


def rows(config, split="federated"):
    found = texts.load(config, split)
    decode = texts.encoder(config).tokenizer.decode
    pairs = zip(found.arrays["tokens"], found.arrays["answer"])
    return found, {decode(t.tolist(), skip_special_tokens=False): decode(t[a]) for t, a in pairs}


def test_a_chat_of_a_local_file(directory):
    pytest.importorskip("jinja2")
    found, text = rows(of_jsonl(directory))
    assert found.clients == ("a", "b") and found.domains == ("all",)
    assert 8 < len(text) < 20
    for whole, answer in text.items():
        number = answer.removeprefix("r")
        assert whole.rstrip("<|end>") == f"<|user|>p{number}<|end|><|user|>r{number}"
    (directory / "chat_template.jinja").write_text(BEGUN.replace("<|user|>", "<|user|>!"))
    assert all(whole.startswith("<|user|>!p") for whole in rows(of_jsonl(directory))[1])


def test_other_templates(directory):
    _, text = rows(of_jsonl(directory, template="Q {prompt} A {response}", end_token="<|user|>"))
    assert all(whole.startswith("Q p") and "<|user|>" in whole for whole in text)
    assert all(answer.startswith(" r") for answer in text.values())
    found, _ = rows(of_jsonl(directory, template="{prompt}{response}", packing=True))
    whole = sum(len(f"p{i}r{i}") + 1 for i in range(20))  # of all splits
    assert 0.5 * whole < found.arrays["answer"].sum() < whole


def test_the_library_is_read_as_configured(directory):
    config = of_stdlib(directory)
    setting_of = texts.load(config, "test")
    assert setting_of.arrays["tokens"].shape == (len(setting_of.clients), 16)
    assert setting_of.domains == tuple(python_stdlib.domain_names())
    config.data.windows_per_client.test = 0
    config.data.windows_per_file.test = 1
    of_files = texts.load(config, "test").arrays["client"]
    files = python_stdlib.files("test")
    assert np.bincount(of_files).tolist() == [len(files[name]) for name in setting_of.clients]


@pytest.mark.parametrize(
    ("changes", "model", "problem"),
    [
        ({"length": 65}, {}, "data.length is 65, but the context of the model .* 64 tokens"),
        ({}, {"vocab_size": 257}, "tokenizer .* has 258 tokens, but the model .* of 257"),
        ({}, {"vocab_size": 300}, "do not belong together"),
        ({"end_token": "<|endoftext|>"}, {}, r"no token '<\|endoftext\|>'. Did you mean"),
        ({"edition": "3.0.0-0"}, {}, "data.edition is 3.0.0-0, but the library of this Python is"),
    ],
)
def test_what_does_not_fit(directory, changes, model, problem):
    texts.check(of_stdlib(directory), llama())
    with pytest.raises(ValueError, match=problem):
        texts.check(of_stdlib(directory, **changes), llama(**model))


def test_what_a_tokenizer_does_not_say(directory):
    (directory / "tokenizer_config.json").unlink()
    config = of_jsonl(directory)
    with pytest.raises(ValueError, match="no chat template: set config.data.template"):
        texts.template(config)
    with pytest.raises(ValueError, match="which token ends a text: set config.data.end_token"):
        texts.encoder(config)
    config.data.tokenizer = str(directory / "none.json")
    with pytest.raises(FileNotFoundError, match="none.json"):
        texts.encoder(config)


def test_what_is_learned_of_a_source(directory):
    config = of_stdlib(directory)
    config.task = "classification"
    with pytest.raises(ValueError, match="unknown task for the source 'python_stdlib'.*causal_lm"):
        texts.check(config, llama())


def test_a_bad_record_says_how_it_is_left_out(directory):
    with (directory / "x.jsonl").open("a") as file:
        file.write('\n{"prompt": "p"}')
    config = of_jsonl(directory)
    with pytest.raises(ValueError, match="x.jsonl:21: .*\n.*config.data.on_bad_record='skip'"):
        texts.load(config, "federated")
    config.data.on_bad_record = "skip"
    for _ in range(2):
        with pytest.warns(UserWarning, match="skipped 1 bad record"):
            assert len(texts.load(config, "federated").arrays["tokens"]) > 8


def test_ids_are_kept_until_something_changes(directory, monkeypatch):
    made = []
    load = texts.jsonl.load
    monkeypatch.setattr(texts.jsonl, "load", lambda *x, **y: made.append(x[0]) or load(*x, **y))

    def makes(split="test", **changes):
        made.clear()
        texts.load(of_jsonl(directory, **changes), split)
        return made == [split]

    alike = [{}, {"length": 25}, {"template": "{prompt}{response}"}, {"template": "alpaca"}]
    alike = [{**x, "length": 300} if x.get("template") == "alpaca" else x for x in alike]
    alike += [{"end_token": "<|user|>"}, {"packing": True}, {"rows": {"test": 2}}]
    assert [makes(**changes) for changes in alike] == [True] * len(alike)
    assert makes("federated") and not makes("federated")
    assert not any(makes(**changes) for changes in alike)
    other = {"files": {"federated": str(directory / "y.jsonl"), "test": ""}}
    content = (directory / "x.jsonl").read_text()
    (directory / "y.jsonl").write_text(content)
    assert not makes(**other)
    (directory / "x.jsonl").write_text(content.replace("p1", "q1"))
    assert makes() and not makes(**other)
    changed = BEGUN.replace("<|user|>", "<|user|>!")
    (directory / "chat_template.jinja").write_text(changed)
    assert makes() and not makes(template="{prompt}{response}", **other)


def test_a_model_that_its_file_describes(tmp_path):
    pytest.importorskip("gguf")
    from tests.models import test_gguf as files

    files.write_random(tmp_path / "m.gguf")
    config = of_jsonl(tmp_path, tokenizer=str(tmp_path), end_token="<|end|>")
    config.model.name = "pretrained"
    config.pretrained.source = str(tmp_path / "m.gguf")
    model = setting._model(config)
    assert (model.vocab_size, model.context, model.width) == (261, 128, 64)
    texts.check(config, model)
    assert texts.encoder(config).end == 0


def test_the_configurations():
    config = python_stdlib_smollm2.get_config("method=lora_fair")
    assert config.method == "lora_fair" and config.data.edition == python_stdlib.edition()
    mine = jsonl_config.get_config("file=a.jsonl,clients=3")
    assert mine.data.partition == "iid" and mine.data.partition_options.num_clients == 3
    assert isinstance(mine.copy_and_resolve_references().to_dict(), dict)
    assert isinstance(mine, ml_collections.ConfigDict)
