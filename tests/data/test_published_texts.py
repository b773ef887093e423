"""Published text data sets, from files as they are published to token ids, without TensorFlow."""

import sys

import numpy as np
import pytest

from fedlora_jax.data import instructions, labelled_texts, sources, text
from fedlora_jax.data.builders import (
    alpaca,
    banking77,
    code_feedback,
    metamathqa,
    newsgroups20,
)
from tests import letters
from tests.preparation import published_texts as published
from tests.preparation.published_texts import HELD_OUT, TRAIN, sentence

pytest.importorskip("tokenizers", reason="needs the extra `text`")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return published.write(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def data_dir(files, tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    for name in (*(f"glue/{task}" for task in published.TASKS), *published.INSTRUCTIONS):
        published.prepare(name, files, directory)
    for name in ("newsgroups20", "banking77"):
        published.prepare(name, files, directory)
    return directory


def test_tensorflow_is_not_needed(data_dir):
    assert "tensorflow" not in sys.modules


def texts_of(dataset, number):
    """What the texts of an example for training are, as they were written."""
    if dataset == "glue/mrpc":
        return [sentence("train", number, column) for column in "12"]
    columns = {"premise": "sentence1", "hypothesis": "sentence2"}
    if dataset in ("glue/cola", "newsgroups20", "banking77"):
        columns = {"sentence": "", "text": ""}
    fields = labelled_texts.DATASETS[dataset]
    return [sentence("train", number, columns.get(field, field)) for field in fields]


@pytest.mark.parametrize("dataset", [x for x in labelled_texts.DATASETS if "atched" not in x])
def test_labelled_texts(dataset, data_dir):
    reader = labelled_texts.Reader(letters.roberta(), 1, 200)
    found = labelled_texts.load(dataset, "train", reader, data_dir=data_dir)
    assert found.arrays.keys() == {"tokens", "label", "domain"} and found.domains == ("all",)
    tokens, labels = found.arrays["tokens"], found.arrays["label"]
    assert tokens.shape == (TRAIN, 200) and tokens.dtype == np.int32
    classes = labelled_texts.class_names(dataset, data_dir)
    assert labels.dtype == (np.int32 if classes else np.float32)

    decode = reader.tokenizer.decode
    read = [decode(row[row != 1].tolist(), skip_special_tokens=False) for row in tokens]
    wanted = {}
    for number in range(TRAIN):
        texts = texts_of(dataset, number)
        if dataset == "newsgroups20":
            texts = [f"From: a@b\nSubject: x\n\n{texts[0]}\n"]
        wanted[f"<s>{'</s></s>'.join(texts)}</s>"] = label_of(dataset, number, classes)
    assert dict(zip(read, labels.tolist())) == wanted


def label_of(dataset, number, classes):
    if dataset == "newsgroups20":
        return number % 20
    if dataset == "banking77":
        return (7 * number) % 77
    if dataset in ("glue/cola", "glue/mrpc"):
        return number % 2
    label = published._TABLES[dataset.removeprefix("glue/")][-1].split()
    value = label[number % len(label)]
    if not classes:
        return pytest.approx(float(value))
    return classes.index(value) if value in classes else int(value)


@pytest.mark.parametrize("dataset", ["glue/sst2", "glue/rte", "glue/mnli", "glue/stsb"])
def test_unpublished_labels(dataset, data_dir):
    reader = labelled_texts.Reader(letters.bert(), 0, 60)
    suffix = "_matched" if dataset == "glue/mnli" else ""
    held_out = labelled_texts.load(dataset, f"validation{suffix}", reader, data_dir=data_dir)
    assert len(held_out.arrays["label"]) == HELD_OUT
    problem = "glue-?.*test.*0.*: label -1 .* not published: use a split of validation"
    with pytest.raises(ValueError, match=problem):
        labelled_texts.load(dataset, f"test{suffix}", reader, data_dir=data_dir)


def test_pairs_of_bert(data_dir):
    reader = labelled_texts.Reader(letters.bert(), 0, 90)
    found = labelled_texts.load("glue/rte", "train", reader, data_dir=data_dir, most=4).arrays
    assert len(found["label"]) == 4
    for row, types in zip(found["tokens"], found["token_types"]):
        ends = np.flatnonzero(row == 3)
        assert row[0] == 2 and len(ends) == 2
        assert types.tolist() == [0] * (ends[0] + 1) + [1] * (ends[1] - ends[0]) + [0] * (
            89 - ends[1]
        )
    single = labelled_texts.load("glue/sst2", "train", reader, data_dir=data_dir).arrays
    assert "token_types" not in single
    swapped = labelled_texts.load(
        "glue/rte", "train", reader, data_dir=data_dir, fields=("sentence2",)
    ).arrays
    decode = reader.tokenizer.decode
    assert all("sentence2" in decode(row.tolist()) for row in swapped["tokens"])


@pytest.mark.parametrize("dataset", published.INSTRUCTIONS)
def test_instructions(dataset, data_dir):
    encoder = text.Encoder(letters.tokenizer(), letters.END)
    template = text.format_template("<{prompt}>{response}")
    splits = {
        split: instructions.load(
            dataset, split, encoder, template, 300, held_out={"test": 0.4}, data_dir=data_dir
        )
        for split in ("federated", "test")
    }
    rows = {}
    for found in splits.values():
        for tokens, mask, domain in zip(*(found.arrays[x] for x in ("tokens", "answer", "domain"))):
            decode = encoder.tokenizer.decode
            rows[decode(tokens[: mask.argmax()].tolist())] = (
                decode(tokens[mask].tolist()),
                found.domains[domain],
            )
    wanted = {}
    held_out = [("test", n) for n in range(HELD_OUT)] if dataset == "gsm8k" else []
    for split, number in [("train", n) for n in range(TRAIN)] + held_out:
        example = published.instruction(dataset, number, split)
        prompt, answer, kind = parts(example)
        wanted[f"<{prompt}>"] = (answer, kind)
    assert rows == wanted
    assert splits["federated"].domains == splits["test"].domains
    if dataset == "metamathqa":  # the variants of a question are on one side
        sides = [
            {int(p.split()[1]) // 2 for p in side}
            for side in (
                [encoder.tokenizer.decode(t.tolist()) for t in found.arrays["tokens"]]
                for found in splits.values()
            )
        ]
        assert not sides[0] & sides[1] and sides[0] | sides[1] == set(range(TRAIN // 2))


def parts(example):
    """Prompt, answer and kind of a published example, by its own names."""
    if "messages" in example:
        return example["messages"][0]["content"], example["messages"][1]["content"], "all"
    names = {
        "question": ("answer", "", ""),
        "query": ("response", "", "type"),
        "instruction": (
            "output" if "output" in example else "response",
            "input" if "input" in example else "context",
            "category",
        ),
    }
    (first,) = names.keys() & example.keys()
    answer, context, kind = names[first]
    more = example.get(context) or ""
    prompt = example[first] + ("\n\n" + more if more else "")
    return prompt, example[answer], example.get(kind, "all")


def test_alpacas_template(data_dir):
    encoder = text.Encoder(letters.tokenizer(), letters.END)
    found = instructions.load(
        "alpaca", "train", encoder, text.alpaca_template(), 500, data_dir=data_dir
    )
    whole = [encoder.tokenizer.decode(row.tolist()) for row in found.arrays["tokens"]]
    assert sum("### Input:\ninput" in x for x in whole) == 4
    for row in whole:
        assert ("paired with an input" in row) == ("### Input:" in row)
        assert row.startswith("Below is an instruction") and "\n\n### Response:train" in row


def test_splits_and_names_that_do_not_exist(data_dir):
    encoder = text.Encoder(letters.tokenizer(), letters.END)
    template = text.format_template("{prompt}{response}")
    with pytest.raises(ValueError, match="Did you mean 'gsm8k'"):
        instructions.load("gsm8", "train", encoder, template, 99, data_dir=data_dir)
    with pytest.raises(ValueError, match="'validation'"):
        instructions.load("gsm8k", "validation", encoder, template, 99, data_dir=data_dir)
    reader = labelled_texts.Reader(letters.bert(), 0, 60)
    with pytest.raises(ValueError, match="Did you mean 'glue/sst2'"):
        labelled_texts.load("glue/sst", "train", reader, data_dir=data_dir)
    for name in ("glue/sst", "glue"):  # which `prepare_data` would refuse
        with pytest.raises(ValueError, match=f"unknown part of glue '{name}/?'.*glue/sst2"):
            labelled_texts.class_names(name, data_dir / "nowhere")
    with pytest.raises(FileNotFoundError, match="prepare_data --dataset=glue/sst2"):
        sources.info("glue/sst2", data_dir / "nowhere")


def test_what_is_wrong_in_a_published_file(files, tmp_path, monkeypatch):
    bank = tmp_path / "train.csv"
    bank.write_text("text,category\nWhere is it?,card_arival\n")
    broken = {**files, f"{banking77._FILES}/train.csv": bank}
    with pytest.raises(Exception, match="train.csv:2: unknown class 'card_arival'. Did you mean"):
        published.prepare("banking77", broken, tmp_path / "data")

    for name, url, content, problem in (
        ("metamathqa", metamathqa._URL, '[{"query": "q"}]', r"x.json\[1\]: no text in a field"),
        ("alpaca", alpaca._URL, '[{"instruction": "a"', "x.json:1: not JSON"),
        ("code_feedback", code_feedback._URL, '{"messages": "hi"}', "x.json:1: expected a list"),
    ):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(Exception, match=problem):
            published.prepare(name, {**files, url: tmp_path / "x.json"}, tmp_path / "data")

    builder = newsgroups20.Newsgroups20(data_dir=tmp_path / "data", file_format="array_record")
    with published.downloads(files):
        monkeypatch.setattr(newsgroups20, "SHA256", "0" * 64)
        with pytest.raises(ValueError, match="is not the archive that was published"):
            builder.download_and_prepare()
    assert not list((tmp_path / "data").rglob("dataset_info.json"))
