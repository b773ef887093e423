"""Passages of Python's documentation."""

import json
import sys

import numpy as np
import pytest

from fedlora_jax.data import python_docs

# The share of each, and the fewest passages of a class that it has.
SPLITS = {"federated": (5 / 8, 15), "validation": (1 / 8, 10), "test": (1 / 4, 15)}


@pytest.fixture(scope="module")
def splits():
    return {split: python_docs.passages(split) for split in SPLITS}


def test_passages(splits):
    texts = [text for each, _ in splits.values() for text in each]
    assert len(texts) == len(set(texts)) > 1000
    classes = len(python_docs.class_names())
    for split, (each, labels) in splits.items():
        share, fewest = SPLITS[split]
        # Where a passage goes is as good as drawn, and differs with the version of Python.
        deviation = (share * (1 - share) / len(texts)) ** 0.5
        assert abs(len(each) / len(texts) - share) < 3 * deviation
        assert labels.dtype == np.int32 and np.bincount(labels, minlength=classes).min() >= fewest
    assert max(len(text.split()) for text in texts) <= 80
    again = python_docs.passages("test")
    assert again[0] == splits["test"][0]


def test_tokens(tmp_path, splits):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra `text`")
    words = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "the", "is", "of"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = python_docs.load("test", tmp_path / "tokenizer.json", length=12)
    texts, labels = splits["test"]
    assert data["tokens"].shape == (len(texts), 12) and data["tokens"].dtype == np.int32
    np.testing.assert_array_equal(data["label"], labels)
    shortest = min(range(len(texts)), key=lambda i: len(texts[i]))
    expected = tokenizer.encode(texts[shortest]).ids[:12]
    assert data["tokens"][shortest].tolist() == expected + [0] * (12 - len(expected))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["padding"] is None


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="unknown split 'train'"):
        python_docs.passages("train")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[text\]'"):
        python_docs.load("test", "tokenizer.json")
