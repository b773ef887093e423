"""Published text data sets and tables, from files to a round of federated training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import instructions as instructions_config
from configs import labelled_texts as labelled_config
from configs import table as table_config
from fedlora_jax import experiment
from fedlora_jax.experiment import texts
from fedlora_jax.models import Bert
from fedlora_jax.models.pretrained.files import write_safetensors
from tests import letters
from tests.models.test_pretrained import as_torch
from tests.preparation import published_texts as published

pytest.importorskip("tokenizers", reason="needs the extra `text`")

SIZES = {"vocab_size": 260, "width": 16, "depth": 1, "num_heads": 2, "num_positions": 132}
DATASETS = ("glue/rte", "glue/stsb", "banking77", "databricks_dolly")


def write_encoder(directory, kind):
    """A directory as the hub has it: weights, what they are of, and a tokenizer."""
    roberta = kind == "roberta"
    own = {"pad_token": 1, "num_token_types": 1} if roberta else {}
    model = Bert(**SIZES, variant=kind, **own)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    directory.mkdir()
    tensors = as_torch(model, params)
    write_safetensors(directory / "model.safetensors", tensors)
    config = {
        "model_type": kind,
        "vocab_size": 260,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 132,
        "pad_token_id": model.pad_token,
        "type_vocab_size": model.num_token_types,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    }
    (directory / "config.json").write_text(json.dumps(config))
    getattr(letters, kind)().save(str(directory / "tokenizer.json"))
    known = {"pad_token": {"content": "<pad>"} if roberta else "[PAD]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(known))
    return directory


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sets")
    files = published.write(directory / "published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_DATA_DIR", str(directory / "data"))
        for name in DATASETS:
            published.prepare(name, files, directory / "data")
        for kind in ("bert", "roberta"):
            write_encoder(directory / kind, kind)
        yield directory


def one_round(config, workdir):
    config.lora.rank = 2
    setting = experiment.prepare(config)
    program = experiment.compile_program(config, setting)
    (row,) = experiment.run(config, setting, program, workdir)
    assert all(np.isfinite(row[name]) for name in config.metrics), row
    return setting


def test_pairs_with_classes(here, tmp_path, monkeypatch):
    """BERT is told which text of a pair a token is of; the second time nothing is encoded."""
    arg = f"dataset=glue/rte,clients=2,source={here / 'bert'},runlocal"
    config = labelled_config.get_config(arg)
    assert config.lora.head == "^head$"
    config.data.length = 100
    config.metrics = ("accuracy", "f1", "matthews", "cross_entropy")
    setting = one_round(config, tmp_path)
    assert setting.train["label"].dtype == np.int32 and set(setting.train["label"]) == {0, 1}

    batch = {name: jnp.asarray(x[:4]) for name, x in setting.test.items()}
    logits = setting.task.model.apply({"params": setting.params}, *setting.task.inputs(batch))
    plain = setting.task.model.apply({"params": setting.params}, batch["tokens"])
    assert jnp.abs(logits - plain).max() > 1e-3

    def encode(*_, **__):
        raise AssertionError("the ids were kept")

    monkeypatch.setattr(texts.labelled_texts, "load", encode)
    again = experiment.prepare(config)
    for name, array in setting.train.items():
        np.testing.assert_array_equal(again.train[name], array)


def test_numbers(here, tmp_path):
    arg = f"dataset=glue/stsb,clients=2,source={here / 'roberta'},runlocal"
    config = labelled_config.get_config(arg)
    assert config.lora.head == config.pretrained.new == "^(pooler|head)$"
    config.data.length = 100
    setting = one_round(config, tmp_path)
    assert setting.train["label"].dtype == np.float32 and "token_types" not in setting.train
    assert config.task == "regression" and config.data.partition == "iid"


def test_instructions_by_their_kind(here, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="needs the extra `gguf`")
    from tests.models import test_gguf as llama

    llama.write_random(tmp_path / "model.gguf")
    config = instructions_config.get_config("dataset=databricks_dolly,runlocal")
    source = str(tmp_path / "model.gguf")
    config.data.update(tokenizer=source, end_token="<|end|>", template="{prompt}={response}")
    config.data.length = 100
    config.data.held_out.update(validation=0.0, test=0.6)
    config.model.name = "pretrained"
    config.pretrained.source = source
    setting = one_round(config, tmp_path)
    assert setting.domains == ("closed_qa", "open_qa", "summarization")


def test_a_table(here):
    rows = [f'"text {i}","other, {i}",{"cab"[i % 3]},c{i % 2}' for i in range(30)]
    path = here / "mine.csv"
    path.write_text("\n".join(["one,two,kind,client", *rows]))
    arg = f"file={path},text=one,second=two,label=kind,source={here / 'bert'},runlocal"
    config = table_config.get_config(arg)
    assert config.model.options.num_classes == 3 and config.data.partition == "natural"
    config.data.length = 40
    setting = experiment.prepare(config)
    assert set(setting.train["client"]) == {0, 1}
    known = [(x.tolist(), y) for x, y in zip(setting.train["tokens"], setting.train["label"])]
    decode = letters.bert().decode
    for tokens, label in known:
        number = int("".join(x for x in decode(tokens).partition("other")[0] if x.isdigit()))
        assert label == (2, 0, 1)[number % 3]
    path.write_text(path.read_text() + '\n"a","b",d')
    with pytest.raises(ValueError, match="mine.csv:32: 3 fields, but the header names 4\n.*skip"):
        experiment.prepare(config)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"model.options.num_classes": 76},
            "num_classes is 76, but classification .* takes 77: act",
        ),
        ({"task": "regression"}, "banking77 is learned by classification"),
        ({"task": "causal_lm"}, "unknown task for the source 'labelled_texts'"),
        ({"data.pad_token": "<s>"}, r"pads with token 0, but the model .* masks 1"),
        ({"data.pad_token": "<padding>"}, "no token '<padding>'. Did you mean '<pad>'"),
        ({"data.length": 2}, "a row of 2 tokens holds no text: use 3 or more"),
    ],
)
def test_what_does_not_fit(here, changes, problem):
    config = labelled_config.get_config(f"dataset=banking77,source={here / 'roberta'}")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=problem):
        experiment.prepare(config)


def test_a_tokenizer_of_the_other_family(here):
    config = labelled_config.get_config(f"dataset=glue/rte,source={here / 'roberta'}")
    config.data.tokenizer = str(here / "bert")
    model = Bert(**SIZES, num_classes=2, num_token_types=1)
    with pytest.raises(ValueError, match="tells two texts apart by token types"):
        texts.check(config, model)
    texts.check(config, model.clone(num_token_types=2))


def test_what_pads_is_found_or_asked_for(here, tmp_path):
    config = labelled_config.get_config(f"dataset=banking77,source={here / 'roberta'}")
    for name, wanted in (("roberta", 1), ("bert", 0), ("tokenizer", None)):
        path = tmp_path / name / "tokenizer.json"
        path.parent.mkdir()
        getattr(letters, name)().save(str(path))
        config.data.tokenizer = str(path)
        if wanted is not None:
            assert texts.reader(config).pad == wanted
    with pytest.raises(ValueError, match="which token pads a text: set config.data.pad_token"):
        texts.reader(config)


def test_padding_is_masked(here):
    config = labelled_config.get_config(f"dataset=banking77,source={here / 'roberta'},runlocal")
    config.data.length = 100
    setting = experiment.prepare(config)
    tokens = jnp.asarray(setting.test["tokens"])
    most = int((tokens != 1).sum(axis=1).max())
    assert most < 100

    def logits(tokens):
        return setting.task.model.apply({"params": setting.params}, tokens)

    np.testing.assert_allclose(logits(tokens), logits(tokens[:, :most]), atol=1e-5)
