"""GLUE as FFA-LoRA, FedEx-LoRA and FLoRA-NA have it: RoBERTa, three clients that all take part.

    python -m experiments.prepare_data --dataset=glue/qnli
    python -m experiments.compare --config=configs/papers/glue.py:paper=flora_na,task=qnli \\
        --methods=fedit,ffa_lora,fedsa_lora,fedex_lora,flora_na --seeds=3 --workdir=runs/qnli

`paper` is one of

* `ffa_lora`: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning" (ICLR 2024,
  arXiv:2403.12313). Stated: RoBERTa-large, and labels at the clients in the proportions 10:90,
  90:10 and 50:50. The rest as for `flora_na`.
* `fedex_lora`: Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient
  Fine-Tuning of Foundation Models" (arXiv:2410.09432). In the authors' code: RoBERTa-base, IID, 50
  rounds of three epochs, AdamW 1e-3, batches of 128, 128 tokens, rank 4, alpha 8.
* `flora_na`: Nguyen et al., "Communication-Efficient and Accurate Approach for Aggregation in
  Federated Low-Rank Adaptation" (arXiv:2509.26399). Stated: RoBERTa. The rest is from the code of
  FedSA-LoRA (Guo et al., ICLR 2025), beside which it puts itself: RoBERTa-large, Dirichlet(0.5),
  1000 rounds of 10 steps, SGD 0.02, batches of 128, 128 tokens, rank 8, alpha 16.

Their tables are not repeated here: they could not be read where this was written.

Ours: adapters on query and value, the head trained and averaged, no dropout (the codes have 0.05
to 0.1), no warming up of the learning rate, the proportions for the three labels of MNLI, and IID
clients for STS-B, which has numbers for labels. Judged on GLUE's validation split, whose labels are
published.

`source` is where weights and tokenizer are, by default on the hub. Expected on one H200: 35 GB,
one to three hours a method for 1000 rounds, seven for QQP, whose validation split is large; for
`fedex_lora` 15 GB and between minutes and five hours (`docs/papers.md` says how that is reckoned).
`runlocal` makes it a matter of seconds, with MiniLM or a small model as `source`.
"""

from typing import Any, NamedTuple

import ml_collections

from configs import labelled_texts
from configs.common import parse_arg
from fedlora_jax.names import lookup

TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")


class _Paper(NamedTuple):
    source: str
    partition: str
    options: dict[str, Any]
    rounds: int
    rank: int
    alpha: float
    local: dict[str, Any]


_STEPS = {"steps": 10, "optimizer": "sgd", "learning_rate": 2e-2, "momentum": 0.0}
_PAPERS = {
    "ffa_lora": _Paper(
        "FacebookAI/roberta-large",
        "label_proportions",
        {},  # by the number of labels
        1000,
        8,
        16,
        {**_STEPS, "batch_size": 128},
    ),
    "fedex_lora": _Paper(
        "FacebookAI/roberta-base",
        "iid",
        {"num_clients": 3},
        50,
        4,
        8,
        {"steps": 0, "epochs": 3, "batch_size": 128, "optimizer": "adamw", "learning_rate": 1e-3},
    ),
    "flora_na": _Paper(
        "FacebookAI/roberta-large",
        "dirichlet",
        {"num_clients": 3, "alpha": 0.5},
        1000,
        8,
        16,
        {**_STEPS, "batch_size": 128},
    ),
}
# Of three clients, by the number of labels.
_PROPORTIONS = {
    2: ((0.1, 0.9), (0.9, 0.1), (0.5, 0.5)),
    3: ((0.9, 0.05, 0.05), (0.05, 0.9, 0.05), (0.05, 0.05, 0.9)),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `paper=NAME,task=NAME,method=NAME,source=DIR,runlocal`."""
    args = parse_arg(arg, paper="flora_na", task="qnli", method="", source="", runlocal=False)
    small = args["runlocal"]
    paper = lookup(_PAPERS, args["paper"], "paper")
    lookup(dict.fromkeys(TASKS), args["task"], "task of GLUE")
    source = args["source"] or ("" if small else paper.source)
    config = labelled_texts.get_config(
        f"dataset=glue/{args['task']},clients=3,source={source},"
        f"method={args['method'] or args['paper']}{',runlocal' * small}"
    )
    config.rounds = 2 if small else paper.rounds
    config.clients_per_round = 3
    labels = config.model.options.num_classes
    if config.task == "classification":
        config.data.partition = paper.partition
        config.data.partition_options = dict(paper.options)
    if config.data.partition == "label_proportions":
        config.data.partition_options = {"proportions": _PROPORTIONS[labels]}

    config.lora.rank = paper.rank
    config.lora.scale = paper.alpha / paper.rank
    config.local.update(weight_decay=0.0, clip_norm=0.0, schedule="constant", **paper.local)
    if small:
        config.local.update(steps=1, epochs=0, batch_size=4)
    else:
        config.clients_per_chunk = "1"
    return config
