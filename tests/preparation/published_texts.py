"""Small files in the form in which text data sets are published, and what TFDS prepares of them.

    python -m tests.preparation.published_texts DIRECTORY

writes the files. Names, headers and quirks are the real ones: GLUE's TSV without quotes, CoLA
without a header, the Microsoft Research Paraphrase Corpus with a byte order mark, BANKING77's
quoted CSV, 20 Newsgroups in Latin-1 in one archive. Texts are made up.
"""

import contextlib
import hashlib
import json
import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path
from unittest import mock

import promise
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.text import glue
from tensorflow_datasets.text.gsm8k import gsm8k

from fedlora_jax.data import builders
from fedlora_jax.data.builders import alpaca, banking77, code_feedback, metamathqa, newsgroups20

TRAIN, HELD_OUT = 12, 6
_DOLLY = "https://github.com/databrickslabs/dolly/raw/master/data/databricks-dolly-15k.jsonl"
_PARSES = "sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"

# Of each task: its archive, its folder, the columns of labelled and of unlabelled files, which of
# them is the label, and what the labels are called.
_TABLES = {
    "sst2": ("SST-2", "sentence label", "index sentence", "label", "0 1"),
    "qqp": (
        "QQP",
        "id qid1 qid2 question1 question2 is_duplicate",
        "id question1 question2",
        "is_duplicate",
        "0 1",
    ),
    "stsb": (
        "STS-B",
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        "index genre filename year old_index source1 source2 sentence1 sentence2",
        "score",
        "5.000 0.000 2.600",
    ),
    "mnli": (
        "MNLI",
        f"index promptID pairID genre {_PARSES} sentence1 sentence2 label1 gold_label",
        f"index promptID pairID genre {_PARSES} sentence1 sentence2",
        "gold_label",
        "neutral entailment contradiction",
    ),
    "qnli": (
        "QNLIv2",
        "index question sentence label",
        "index question sentence",
        "label",
        "entailment not_entailment",
    ),
    "rte": (
        "RTE",
        "index sentence1 sentence2 label",
        "index sentence1 sentence2",
        "label",
        "not_entailment entailment",
    ),
    "wnli": (
        "WNLI",
        "index sentence1 sentence2 label",
        "index sentence1 sentence2",
        "label",
        "0 1",
    ),
}
TASKS = ("cola", "mrpc", *_TABLES)
INSTRUCTIONS = ("gsm8k", "metamathqa", "code_feedback", "alpaca", "databricks_dolly")


def sentence(split: str, number: int, column: str = "") -> str:
    """A text that no other place has, with what breaks a careless reader of tables."""
    return f"{split} {number} \"the {column} caf\u00e9, 5' tall"


def _rows(split: str) -> range:
    return range(TRAIN if split == "train" else HELD_OUT)


def _table(name: str, split: str) -> str:
    _, labelled, unlabelled, label, classes = _TABLES[name]
    columns = (unlabelled if split.startswith("test") else labelled).split()
    names = classes.split()

    def value(column: str, number: int) -> str:
        if column == label:
            return names[number % len(names)]
        if column.startswith(("sentence", "question")) and "parse" not in column:
            return sentence(split, number, column)
        return str(number)

    rows = ["\t".join(value(column, number) for column in columns) for number in _rows(split)]
    return "\n".join(["\t".join(columns), *rows]) + "\n"


def _zip(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _glue(directory: Path) -> dict[str, Path]:
    prefix = "https://dl.fbaipublicfiles.com/glue/data/"
    found = {}
    for name, (archive, *_) in _TABLES.items():
        splits = ["train", "dev", "test"]
        if name == "mnli":
            splits = ["train", *(f"{s}_{k}matched" for s in splits[1:] for k in ("", "mis"))]
        folder = archive.removesuffix("v2")
        files = {f"{folder}/{split}.tsv": _table(name, split) for split in splits}
        found[f"{prefix}{archive}.zip"] = _zip(directory / f"{archive}.zip", files)
    without_header = {
        f"CoLA/{split}.tsv": "".join(
            f"gj04\t{number % 2}\t{'' if number % 2 else '*'}\t{sentence(split, number)}\n"
            for number in _rows(split)
        )
        for split in ("train", "dev")
    }
    test = "".join(f"{number}\t{sentence('test', number)}\n" for number in _rows("test"))
    files = {**without_header, "CoLA/test.tsv": f"index\tsentence\n{test}"}
    found[f"{prefix}CoLA.zip"] = _zip(directory / "CoLA.zip", files)
    return found | _paraphrases(directory)


def _paraphrases(directory: Path) -> dict[str, Path]:
    """MRPC: one file for training, of which another lists pairs for validation."""
    columns = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]

    def lines(split: str, count: int) -> bytes:
        rows = [
            [
                str(i % 2),
                str(100 + i),
                str(200 + i),
                sentence(split, i, "1"),
                sentence(split, i, "2"),
            ]
            for i in range(count)
        ]
        return ("\ufeff" + "".join("\t".join(row) + "\r\n" for row in [columns, *rows])).encode()

    contents = {
        glue._MRPC_TRAIN: ("msr_paraphrase_train.txt", lines("train", TRAIN + HELD_OUT)),
        glue._MRPC_TEST: ("msr_paraphrase_test.txt", lines("test", HELD_OUT)),
        glue._MRPC_DEV_IDS: (
            "mrpc_dev_ids.tsv",
            "".join(f"{100 + i}\t{200 + i}\n" for i in range(TRAIN, TRAIN + HELD_OUT)).encode(),
        ),
    }
    for name, content in contents.values():
        (directory / name).write_bytes(content)
    return {url: directory / name for url, (name, _) in contents.items()}


def _newsgroups(directory: Path) -> Path:
    path = directory / "20news-bydate.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for split in ("train", "test"):
            for number in _rows(split):
                group = newsgroups20.CLASSES[number % 20]
                entry = tarfile.TarInfo(f"20news-bydate-{split}/{group}/{1000 + number}")
                content = f"From: a@b\nSubject: x\n\n{sentence(split, number)}\n".encode("latin-1")
                entry.size = len(content)
                archive.addfile(entry, BytesIO(content))
    return path


def _banking(path: Path, split: str) -> Path:
    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    rows = [
        f"{quoted(sentence(split, number))},{banking77.CLASSES[(7 * number) % 77]}"
        for number in _rows(split)
    ]
    path.write_text("\n".join(["text,category", *rows]) + "\n", encoding="utf-8")
    return path


def instruction(dataset: str, number: int, split: str = "train") -> dict:
    """An example as a data set publishes it."""
    question, answer = sentence(split, number, "question"), f"{split} {number} caf\u00e9"
    return {
        "gsm8k": {"question": question, "answer": f"{answer} <<1+1=2>>2\n#### {number}"},
        "metamathqa": {
            "type": ("GSM_Rephrased", "MATH_AnsAug")[number % 2],
            "query": question,
            "original_question": sentence(split, number // 2, "original"),
            "response": f"{answer} The answer is: {number}",
        },
        "code_feedback": {
            "id": number,
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": "and now?"},
                {"role": "assistant", "content": "later"},
            ][: 2 + 2 * (number % 2)],
        },
        "alpaca": {
            "instruction": question,
            "input": f"input {number}" if number % 3 == 0 else "",
            "output": answer,
        },
        "databricks_dolly": {
            "instruction": question,
            "context": f"context {number}" if number % 3 == 0 else "",
            "response": answer,
            "category": ("open_qa", "closed_qa", "summarization")[number % 3],
        },
    }[dataset]


def _instructions(directory: Path) -> dict[str, Path]:
    def examples(dataset: str, split: str = "train") -> list[dict]:
        return [instruction(dataset, number, split) for number in _rows(split)]

    def lines(values: list[dict]) -> str:
        return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)

    contents = {
        gsm8k._URLS["train"]: ("train.jsonl", lines(examples("gsm8k"))),
        gsm8k._URLS["test"]: ("test.jsonl", lines(examples("gsm8k", "test"))),
        gsm8k._URLS["train_socratic"]: ("train_socratic.jsonl", lines(examples("gsm8k"))),
        gsm8k._URLS["test_socratic"]: ("test_socratic.jsonl", lines(examples("gsm8k", "test"))),
        metamathqa._URL: ("MetaMathQA-395K.json", json.dumps(examples("metamathqa"))),
        code_feedback._URL: ("Code-Feedback.jsonl", lines(examples("code_feedback"))),
        alpaca._URL: ("alpaca_data.json", json.dumps(examples("alpaca"), indent=4)),
        _DOLLY: ("databricks-dolly-15k.jsonl", lines(examples("databricks_dolly"))),
    }
    for name, content in contents.values():
        (directory / name).write_text(content, encoding="utf-8")
    return {url: directory / name for url, (name, _) in contents.items()}


def write(directory: Path) -> dict[str, Path]:
    """Writes all files; from the address that each is published at to where it is."""
    directory.mkdir(parents=True, exist_ok=True)
    return {
        **_glue(directory),
        **_instructions(directory),
        newsgroups20._URL: _newsgroups(directory),
        **{
            f"{banking77._FILES}/{split}.csv": _banking(directory / f"banking_{split}.csv", split)
            for split in ("train", "test")
        },
    }


@contextlib.contextmanager
def downloads(files: dict[str, Path]):
    """What would be downloaded is taken from local files; zip archives are opened by Python.

    The latter because TFDS takes TensorFlow to; all else is its own.
    """

    def found(self, resource):
        url = resource if isinstance(resource, str) else resource.url
        return promise.Promise.resolve(epath.Path(files[url]))

    def extracted(self, resource):
        path = Path(resource.path)
        if path.suffix != ".zip":
            return promise.Promise.resolve(resource.path)
        folder = Path(self._extract_dir) / path.name
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        return promise.Promise.resolve(epath.Path(folder))

    archive = files[newsgroups20._URL].read_bytes()
    with (
        mock.patch.object(tfds.download.DownloadManager, "_download_or_get_cache", found),
        mock.patch.object(tfds.download.DownloadManager, "_extract", extracted),
        mock.patch.object(newsgroups20, "SHA256", hashlib.sha256(archive).hexdigest()),
    ):
        yield


def prepare(name: str, files: dict[str, Path], data_dir: Path) -> None:
    """Prepares a data set of these files."""
    base, _, config = name.partition("/")
    builder = builders.get(base)(
        config=config or None, data_dir=data_dir, file_format="array_record"
    )
    with downloads(files):
        builder.download_and_prepare()


if __name__ == "__main__":
    for address, path in write(Path(sys.argv[1])).items():
        print(path, address)
