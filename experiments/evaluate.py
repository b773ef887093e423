"""Scores a finished run, an adapter, or a model as it is, and keeps what it wrote.

    python -m experiments.evaluate --workdir=runs/lora_fair --tasks=metrics
    python -m experiments.evaluate --workdir=runs/lora_fair --tasks=humaneval --allow_code_execution
    python -m experiments.evaluate --model=DIR --adapter=DIR --tasks=gsm8k=test.jsonl --chat \\
        --out=runs/gsm8k

What is scored is the last state of a run (`--workdir`: server, adapters, and what its method merged
into the backbone); a model on disk (`--model`); or the model and data of a configuration
(`--config`); the latter two with an `--adapter` or without. Tasks are `metrics`, on any split of
its data those of the run or configuration, or any of its task that `--metrics` names; and
`humaneval`, `mbpp=FILE`, `gsm8k=FILE`, `text=FILE`, for which the model writes. Leaves
`evaluation.json` and `generations.jsonl` in `--out`; called again after a kill it goes on, and
other tasks are added. `docs/evaluate.md` has the conventions.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments.shared import targets
from experiments.shared.apps import run
from experiments.shared.judging import (
    METRICS,
    Asking,
    Record,
    check_metrics,
    measure,
    parse_tasks,
    score,
)
from experiments.shared.targets import Adapter, Target
from fedlora_jax import locks
from fedlora_jax.experiment import finished
from fedlora_jax.scoring import benchmarks
from fedlora_jax.scoring.completions import Sampling

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a run to be scored.")
_MODEL = flags.DEFINE_string(
    "model", None, "A pretrained model: a directory, a GGUF file, or a name on the hub."
)
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file whose model and data are taken, without training."
)
_ADAPTER = flags.DEFINE_string(
    "adapter",
    None,
    "Adapter for --model or --config: a checkpoint of PEFT, or an adapters.npz of a run.",
)
_SCALE = flags.DEFINE_float(
    "scale", None, "The factor of an adapters.npz, config.lora.scale of its run."
)
_CLIENT = flags.DEFINE_integer(
    "client", None, "Let this client's own model write, of a run whose method keeps such."
)
_TASKS = flags.DEFINE_list(
    "tasks", None, f"metrics, {', '.join(benchmarks.names())}; a file as NAME=PATH.", required=True
)
_SPLIT = flags.DEFINE_string("split", "test", "For metrics: a name in config.data.splits.")
_METRICS = flags.DEFINE_list(
    "metrics", [], "Measure these metrics, instead of those of the run or configuration."
)
_OUT = flags.DEFINE_string(
    "out", None, "Directory for what is written; by default WORKDIR/evaluation."
)
_ALLOW = flags.DEFINE_bool(
    "allow_code_execution",
    False,
    "Run the programs that the model writes. They are kept from endless loops, memory, network and "
    "other files, but this is no security sandbox.",
)
_CHAT = flags.DEFINE_bool(
    "chat", False, "Ask through the model's chat template, instead of letting it continue a text."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 256, "Most tokens of a text.", lower_bound=1
)
_SAMPLES = flags.DEFINE_integer("samples", 1, "Texts for each problem.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Of sampling; 0 takes the likeliest token.", lower_bound=0.0
)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample from the likeliest tokens of this probability.", 0.0, 1.0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
_LIMIT = flags.DEFINE_integer("limit", 0, "The first so many problems; 0 for all.", lower_bound=0)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Texts at the same time.", lower_bound=1)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "A tokenizer.json or GGUF file, or a directory; by default the model's."
)
_PRECISION = flags.DEFINE_enum(
    "precision", "float32", ["float32", "bfloat16"], "Storage and arithmetic of --model."
)


def main() -> None:
    """Checks what is asked for, then does it."""
    tasks = parse_tasks(_TASKS.value)
    # All that can be wrong, before any weights are read.
    check_metrics(tasks, _METRICS.value, _CLIENT.value)
    asked = {
        name: benchmarks.get(name, path, _CHAT.value)
        for name, path in tasks.items()
        if name != METRICS
    }
    sampling = Sampling(_MAX_NEW_TOKENS.value, _TEMPERATURE.value, _TOP_P.value, _SEED.value)
    asking = Asking(
        sampling,
        _CHAT.value,
        _SAMPLES.value,
        _LIMIT.value,
        _BATCH_SIZE.value,
        _TOKENIZER.value,
        _ALLOW.value,
    )
    for name, benchmark in asked.items():
        asking.check(name, benchmark)
    check_target(tasks)
    out = _OUT.value or (_WORKDIR.value and Path(_WORKDIR.value, "evaluation"))
    if out is None:
        raise ValueError("--out must name a directory for what is written")
    with locks.held(Path(out), Path(out, ".lock")):
        evaluate(tasks, asked, asking, Path(out))


def evaluate(
    tasks: Mapping[str, str | None],
    asked: Mapping[str, benchmarks.Benchmark],
    asking: Asking,
    out: Path,
) -> None:
    """Scores the tasks, records and prints."""
    target = read_target()
    record, names = Record(out), list(tasks)
    for place, name in enumerate(names):
        if name == METRICS:
            names[place] = measure(target, _SPLIT.value, _METRICS.value, record)
            continue
        began = time.perf_counter()
        settings = {**target.name, "file": tasks[name], **asking.settings()}
        found = score(name, asked[name], target, asking, record, settings)
        record.finish(name, settings, {**found, "seconds": round(time.perf_counter() - began, 1)})
    print(f"{record.table(names)}\n\nNumbers: {record.path}")


def check_target(tasks: Mapping[str, str | None]) -> None:
    """Checks what the flags say is to be scored, before anything is read or written.

    Raises:
      ValueError: If they contradict each other, or the tasks.
      FileNotFoundError: If there is no run in --workdir.
    """
    given = [name for name in ("workdir", "model", "config") if flags.FLAGS[name].value]
    if len(given) != 1:
        named = " and ".join(f"--{name}" for name in given) or "none of them"
        raise ValueError(f"give one of --workdir, --model and --config; there is {named}")
    if _CLIENT.value is not None and not _WORKDIR.value:
        raise ValueError("--client is of a run: give --workdir")
    if METRICS in tasks and _MODEL.value:
        raise ValueError("metrics need data: give --workdir or --config")
    if _WORKDIR.value:
        if Adapter(_ADAPTER.value, _SCALE.value) != Adapter():
            raise ValueError("--adapter and --scale go with --model or --config; a run has its own")
        finished.read_config(Path(_WORKDIR.value))


def read_target() -> Target:
    """What the flags say is to be scored, which `check_target` has checked."""
    adapter = Adapter(_ADAPTER.value, _SCALE.value)
    if _WORKDIR.value:
        return targets.of_run(Path(_WORKDIR.value), _SPLIT.value, _CLIENT.value, _METRICS.value)
    if _MODEL.value:
        return targets.of_model(_MODEL.value, _PRECISION.value, adapter)
    return targets.of_config(_CONFIG.value, _SPLIT.value, adapter, _METRICS.value)


if __name__ == "__main__":
    run(main)
