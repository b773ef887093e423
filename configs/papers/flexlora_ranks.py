"""FlexLoRA's distributions of ranks over clients, on Dolly with Llama-3.2-1B.

    python -m experiments.prepare_data --dataset=databricks_dolly
    python -m experiments.compare --methods=flexlora,hetlora,flora,spectral --seeds=1 \\
        --config=configs/papers/flexlora_ranks.py:ranks=heavy_tail_light --workdir=runs/ranks

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources" (NeurIPS 2024, arXiv:2402.11505). Its table is not repeated here: it is of other data.

Stated: ranks that differ between clients by their resources, in the distributions `uniform`,
`heavy_tail_light` and `heavy_tail_strong` (`fedlora_jax.federated.ranks`). Ours: the data, which in
the paper are 1,600 tasks of Natural Instructions on a model of 1.3 billion parameters; 24 clients,
each with examples of one category, of which six take part; 20 rounds of 20 steps; AdamW 1e-4.

`source` is where weights and tokenizer are, by default on the hub, behind Meta's licence. Expected
on one H200: 20 GB, ten minutes a method (`docs/papers.md` says how that is reckoned). `runlocal`
makes it a matter of a minute, with SmolLM2, or seconds with a small model as `source`.
"""

import ml_collections

from configs import instructions
from configs.common import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `ranks=NAME,method=NAME,source=DIR,runlocal`."""
    args = parse_arg(arg, ranks="uniform", method="flexlora", source="", runlocal=False)
    small = args["runlocal"]
    source = args["source"] or ("" if small else "meta-llama/Llama-3.2-1B")
    config = instructions.of_model("databricks_dolly", source, args["method"], small)
    config.rounds = 2 if small else 20
    config.clients_per_round = 2 if small else 6
    config.data.template = "alpaca"
    config.data.length = 64 if small else 512
    config.data.partition = "by_domain"
    config.data.partition_options = {"clients_per_domain": 1 if small else 3}

    config.lora.rank = 8 if small else 64
    config.lora.ranks = args["ranks"]
    config.local.update(
        steps=1 if small else 20,
        batch_size=2 if small else 16,
        optimizer="adamw",
        learning_rate=1e-4,
        weight_decay=0.0,
        schedule="cosine",
    )
    return config
