"""FedSmoothLoRA on language: Llama-3.2-1B on mathematics, code and chat, three clients.

    python -m experiments.prepare_data --dataset=metamathqa
    python -m experiments.compare --methods=fedit,flora,frlora,fedsmooth_lora --seeds=1 \\
        --config=configs/papers/fedsmooth_lora_language.py:task=mathematics --workdir=runs/math
    python -m experiments.evaluate --workdir=runs/math/fedsmooth_lora/seed_0 \\
        --tasks=gsm8k=test.jsonl

Wang et al., "FedSmoothLoRA: Toward Smoother and Faster Convergence in Federated Low-Rank
Adaptation" (arXiv:2605.29460). Its table is not repeated here: it could not be read where this was
written.

Stated by the paper or the authors' code: MetaMathQA (mathematics), Code-Feedback (code) and Dolly
(chat), at most 100,000 examples, IID over three clients that all take part; 10 rounds of 200
steps, AdamW 2e-5, batches of 32, 1024 tokens, cosine over rounds; adapters of rank 32 on all linear
layers, alpha 64, scale alpha / sqrt(rank); gamma 64, zeta 1, 32 calibration samples, singular
values on the paper's B.

Ours: all of MetaMathQA, of which the authors keep what comes from GSM8K and cut the last line; the
first question and answer of a conversation in Code-Feedback, of whose answers they keep the first
block of code; arithmetic in bfloat16. One per cent is held out to be judged by nats a token;
`experiments.evaluate` scores GSM8K and HumanEval, asking for GSM8K `Question: ...`, `Answer:` where
training has `Q: ...`, `A: ...`.

`source` is where weights and tokenizer are, by default on the hub, behind Meta's licence. Expected
on one H200: 20 GB, an hour a method (`docs/papers.md` says how that is reckoned). `runlocal` makes
it a matter of a minute, with SmolLM2, or seconds with a small model as `source`.
"""

import ml_collections

from configs import instructions
from configs.common import parse_arg
from fedlora_jax.names import lookup

# The data set, and how an example becomes text.
_TASKS = {
    "mathematics": ("metamathqa", "Q: {prompt}\nA: {response}"),
    "code": ("code_feedback", "alpaca"),
    "chat": ("databricks_dolly", "alpaca"),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `task=NAME,method=NAME,source=DIR,runlocal`."""
    args = parse_arg(arg, task="mathematics", method="fedsmooth_lora", source="", runlocal=False)
    small = args["runlocal"]
    dataset, template = lookup(_TASKS, args["task"], "task of the paper")
    source = args["source"] or ("" if small else "meta-llama/Llama-3.2-1B")
    config = instructions.of_model(dataset, source, args["method"], small)
    config.rounds = 2 if small else 10
    config.clients_per_round = 3
    config.data.template = template
    config.data.length = 64 if small else 1024
    config.data.partition = "iid"
    config.data.partition_options = {"num_clients": 3}
    if not small:
        config.data.rows.federated = 100_000

    config.lora.rank = 4 if small else 32
    config.lora.scale = 2 * config.lora.rank**0.5
    config.local.update(
        steps=1 if small else 200,
        batch_size=2 if small else 32,
        optimizer="adamw",
        learning_rate=2e-5,
        weight_decay=0.0,
        clip_norm=0.0,
        schedule="cosine",
    )
    smooth = config.options.fedsmooth_lora
    smooth.gamma = 64.0
    smooth.calibration_batches = 1
    smooth.split = "right"
    return config
