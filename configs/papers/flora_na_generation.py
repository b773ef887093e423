"""FLoRA-NA on generation: Llama-2-7B on GSM8K and on code, three clients.

    python -m experiments.prepare_data --dataset=gsm8k
    python -m experiments.compare --config=configs/papers/flora_na_generation.py:task=mathematics \\
        --methods=fedit,ffa_lora,fedsa_lora,fedex_lora,flora_na --seeds=1 --workdir=runs/gsm8k
    python -m experiments.evaluate --workdir=runs/gsm8k/flora_na/seed_0 \\
        --tasks=gsm8k=test.jsonl

Nguyen et al., "Communication-Efficient and Accurate Approach for Aggregation in Federated Low-Rank
Adaptation" (arXiv:2509.26399): exact match on GSM8K's test questions, in percent, after training
Llama-2-7B (from summaries of the paper; the table itself could not be read).

    | FedIT | FedSA-LoRA | FLoRA-NA |
    | 35.68 | 28.82      | 42.89    |

Stated: the model, GSM8K for mathematics, MBPP and HumanEval as the judges of code. Ours, because it
is not stated: what FedSA-LoRA's code (Guo et al., ICLR 2025) has for GSM8K, beside which the paper
puts itself: IID, 100 rounds of 30 steps, SGD 0.005, batches of one, 1000 tokens, rank 8, alpha 16;
adapters on query and value; Code-Feedback to learn code from; arithmetic and storage in bfloat16.

`source` is where weights and tokenizer are, by default on the hub, behind Meta's licence. Expected
on one H200: 45 GB, half an hour a method (`docs/papers.md` says how that is reckoned). `runlocal`
makes it a matter of a minute, with SmolLM2, or seconds with a small model as `source`.
"""

import ml_collections

from configs import instructions
from configs.common import parse_arg
from fedlora_jax.names import lookup

_TASKS = {
    "mathematics": ("gsm8k", "Question: {prompt}\nAnswer: {response}"),
    "code": ("code_feedback", "alpaca"),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `task=NAME,method=NAME,source=DIR,runlocal`."""
    args = parse_arg(arg, task="mathematics", method="flora_na", source="", runlocal=False)
    small = args["runlocal"]
    dataset, template = lookup(_TASKS, args["task"], "task of the paper")
    source = args["source"] or ("" if small else "meta-llama/Llama-2-7b-hf")
    config = instructions.of_model(dataset, source, args["method"], small)
    config.rounds = 2 if small else 100
    config.clients_per_round = 3
    config.data.template = template
    config.data.length = 64 if small else 1000
    config.data.partition = "iid"
    config.data.partition_options = {"num_clients": 3}

    config.lora.rank = 4 if small else 8
    config.lora.scale = 2.0
    config.lora.targets = ("attention/(query|value)$",)
    config.local.update(
        steps=1 if small else 30,
        batch_size=2 if small else 1,
        optimizer="sgd",
        learning_rate=5e-3,
        momentum=0.0,
        weight_decay=0.0,
        clip_norm=0.0,
        schedule="constant",
    )
    return config
