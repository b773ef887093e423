"""Scores a finished run, an adapter, or a model as it is, and keeps what it wrote.

    python -m experiments.evaluate --workdir=runs/lora_fair --tasks=metrics
    python -m experiments.evaluate --workdir=runs/lora_fair --tasks=humaneval --allow_code_execution
    python -m experiments.evaluate --model=DIR --adapter=DIR --tasks=gsm8k=test.jsonl --chat \\
        --out=runs/gsm8k

What is scored is the last state of a run (`--workdir`: server, adapters, and what its method merged
into the backbone); a model on disk (`--model`); or the model and data of a configuration
(`--config`); the latter two with an `--adapter` or without. Tasks are `metrics`, those of the run
or configuration on any split of its data, and `humaneval`, `mbpp=FILE`, `gsm8k=FILE`, `text=FILE`,
for which the model writes. Leaves `evaluation.json` and `generations.jsonl` in `--out`; called
again after a kill it goes on, and other tasks are added. `docs/evaluate.md` has the conventions.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags
from tabulate import tabulate

from experiments.shared import targets
from experiments.shared.apps import command, progress_bar, run
from experiments.shared.targets import Adapter, Target
from fedlora_jax.experiment import records
from fedlora_jax.models import Llama
from fedlora_jax.names import lookup
from fedlora_jax.scoring import benchmarks, completions
from fedlora_jax.scoring.answers import pass_at_k
from fedlora_jax.scoring.benchmarks import Benchmark
from fedlora_jax.scoring.completions import Language, Sampling

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

METRICS = "metrics"


def main() -> None:
    """Scores, records, prints."""
    tasks = parse_tasks(_TASKS.value)
    # All that can be wrong, before any weights are read.
    asked = {
        name: benchmarks.get(name, path, _CHAT.value)
        for name, path in tasks.items()
        if name != METRICS
    }
    for name, benchmark in asked.items():
        if benchmark.runs_code and not _ALLOW.value:
            raise ValueError(
                f"{name} runs programs that the model writes: allow it by --allow_code_execution"
            )
    sampling = Sampling(_MAX_NEW_TOKENS.value, _TEMPERATURE.value, _TOP_P.value, _SEED.value)
    if _SAMPLES.value > 1 and not sampling.temperature:
        raise ValueError("--samples of the likeliest tokens are all the same: give --temperature")
    out = _OUT.value or (_WORKDIR.value and Path(_WORKDIR.value, "evaluation"))
    if out is None:
        raise ValueError("--out must name a directory for what is written")
    target = read_target()
    record = Record(Path(out))
    for name in tasks:
        began = time.perf_counter()
        if name == METRICS:
            settings, found = {**target.name, "split": _SPLIT.value}, measured(target)
        else:
            settings = {**target.name, "file": tasks[name], **how_texts_are_made()}
            record.claim(name, settings)
            found = score(name, asked[name], target, sampling, record)
        record.finish(name, settings, {**found, "seconds": round(time.perf_counter() - began, 1)})
    print(f"{record.table(tasks)}\n\nNumbers: {record.path}")


def parse_tasks(texts: Sequence[str]) -> dict[str, str | None]:
    """The file of each task, None for those without.

    Raises:
      ValueError: On an unknown task, with the nearest name, or one that is named twice.
    """
    tasks: dict[str, str | None] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        lookup(dict.fromkeys([METRICS, *benchmarks.names()]), name, "task")
        if name in tasks:
            raise ValueError(f"--tasks names {name} twice")
        tasks[name] = path if equals else None
    if not tasks:
        raise ValueError("--tasks names none")
    return tasks


def read_target() -> Target:
    """What the flags say is to be scored."""
    given = [name for name in ("workdir", "model", "config") if flags.FLAGS[name].value]
    if len(given) != 1:
        named = " and ".join(f"--{name}" for name in given) or "none of them"
        raise ValueError(f"give one of --workdir, --model and --config; there is {named}")
    if _CLIENT.value is not None and not _WORKDIR.value:
        raise ValueError("--client is of a run: give --workdir")
    adapter = Adapter(_ADAPTER.value, _SCALE.value)
    if _WORKDIR.value:
        if adapter != Adapter():
            raise ValueError("--adapter and --scale go with --model or --config; a run has its own")
        return targets.of_run(Path(_WORKDIR.value), _SPLIT.value, _CLIENT.value)
    if _MODEL.value:
        return targets.of_model(_MODEL.value, _PRECISION.value, adapter)
    return targets.of_config(_CONFIG.value, _SPLIT.value, adapter)


def how_texts_are_made() -> dict[str, Any]:
    """All that a text depends on besides the model and the problem."""
    names = ("chat", "max_new_tokens", "samples", "temperature", "top_p", "seed", "tokenizer")
    return {name: flags.FLAGS[name].value for name in names}


def measured(target: Target) -> dict[str, Any]:
    """The metrics of the target on its data."""
    if target.measure is None:
        raise ValueError("metrics need data: give --workdir or --config")
    return target.measure()


def score(
    name: str, benchmark: Benchmark, target: Target, sampling: Sampling, record: "Record"
) -> dict[str, Any]:
    """Lets the model write for each problem, and judges that, batch by batch.

    Raises:
      ValueError: If the model does not write, its tokenizer is unknown or of another vocabulary, or
        a prompt is too long.
    """
    if not isinstance(target.model, Llama):
        raise ValueError(
            "this method has no model for all: choose a client's own by --client"
            if target.model is None
            else f"{name} needs a model that writes, not a {type(target.model).__name__}"
        )
    language = read_language(target)
    problems = benchmark.problems[: _LIMIT.value or None]
    encoded = [completions.encode(language, problem.prompt, _CHAT.value) for problem in problems]
    names = [f"{name} {problem.name}" for problem in problems]
    completions.check_lengths(target.model, encoded, names, sampling)
    items = [(i, sample) for i in range(len(problems)) for sample in range(_SAMPLES.value)]
    prompts = [encoded[i] for i, _ in items]
    known = record.generations(name)
    skip = {at for at, (i, sample) in enumerate(items) if (problems[i].name, sample) in known}

    def text_of(at: int, new: list[int]) -> tuple[str, bool]:
        text, ended = completions.decode(language, prompts[at], new)
        short = benchmarks.cut(text, benchmark.stops)
        return short, ended or short != text

    def judged(written: tuple[int, list[int]]) -> dict[str, Any]:
        at, new = written
        problem, sample = problems[items[at][0]], items[at][1]
        text, ended = text_of(at, new)
        return {
            "task": name,
            "problem": problem.name,
            "sample": sample,
            "prompt": problem.prompt,
            "completion": text,
            "ended": ended,
            **benchmark.verdict(problem, text)._asdict(),
        }

    batches = completions.write(
        target.model,
        target.params,
        prompts,
        sampling,
        adapters=target.adapters,
        scale=target.scale,
        end_token=language.end_token,
        done=lambda at, new: text_of(at, new)[1],
        rows=_BATCH_SIZE.value,
        skip=skip,
    )
    with (
        progress_bar(len(items), name, unit="text") as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        bar.update(len(skip))
        for batch in batches:
            record.append(list(pool.map(judged, batch.items())))
            bar.update(len(batch))
    return summary(benchmark, [problem.name for problem in problems], record.generations(name))


def read_language(target: Target) -> Language:
    """The tokenizer of the target, or the one that `--tokenizer` names.

    Raises:
      ValueError: If there is none, or it has more tokens than the model.
    """
    source = _TOKENIZER.value or target.tokenizer
    if source is None:
        raise ValueError("where the model's tokenizer is, --tokenizer must say")
    language = completions.read_language(source)
    size, known = language.tokenizer.get_vocab_size(), getattr(target.model, "vocab_size", 0)
    if size > known:
        raise ValueError(
            f"the tokenizer of {source} has {size} tokens, the model knows {known}: it is "
            "another model's"
        )
    return language


def summary(
    benchmark: Benchmark, problems: Sequence[str], rows: Mapping[tuple[str, int], dict[str, Any]]
) -> dict[str, Any]:
    """The share of problems solved, with 1, 10 and 100 texts as far as there are so many."""
    samples = _SAMPLES.value
    mine = [[rows[problem, sample] for sample in range(samples)] for problem in problems]
    flat = [row for each in mine for row in each]
    scores = {
        f"pass@{k}" if benchmark.runs_code else f"exact_match@{k}": float(
            np.mean([pass_at_k(samples, sum(row["passed"] for row in each), k) for each in mine])
        )
        for k in (1, 10, 100)
        if k <= samples
    }
    kept = {row["kernel"] for row in flat} - {None}
    isolation = ("kernel" if kept == {True} else "python") if kept else None
    return {
        **scores,
        "problems": len(problems),
        "samples": samples,
        "cut_off": sum(not row["ended"] for row in flat),
        **({"isolation": isolation} if benchmark.runs_code else {}),
    }


class Record:
    """`evaluation.json` and `generations.jsonl` of a directory.

    Args:
      out: The directory, made if it is not there.
    """

    def __init__(self, out: Path):
        out.mkdir(parents=True, exist_ok=True)
        self.path, self._generations = out / "evaluation.json", out / "generations.jsonl"
        self._tasks = json.loads(self.path.read_text()) if self.path.exists() else {}
        # A line cut short by a kill is left out.
        kept = "".join(json.dumps(row) + "\n" for row in self._rows())
        records.write_atomically(self._generations, kept)

    def claim(self, task: str, settings: Mapping[str, Any]) -> None:
        """Says that texts for a task are made with these settings.

        Raises:
          ValueError: If there are some that were made with others.
        """
        settings = json.loads(json.dumps(settings))
        theirs = self._tasks.get(task, {}).get("settings", settings)
        keys = sorted(settings.keys() | theirs.keys())
        changed = [
            f"{key} is {theirs.get(key)!r} there, {settings.get(key)!r} here"
            for key in keys
            if theirs.get(key) != settings.get(key)
        ]
        if changed:
            raise ValueError(
                f"{self.path} is of other texts for {task} ({'; '.join(changed)}). Choose another "
                "--out, or remove that"
            )
        self._tasks.setdefault(task, {"settings": settings})
        self._write()

    def finish(self, task: str, settings: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Writes the numbers of a task."""
        self._tasks[task] = {"command": command(), "settings": settings, **found}
        self._write()

    def _write(self) -> None:
        records.write_atomically(self.path, json.dumps(self._tasks, indent=1) + "\n")

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes texts and verdicts, all of a batch at once."""
        with self._generations.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def generations(self, task: str) -> dict[tuple[str, int], dict[str, Any]]:
        """The texts of a task, by problem and sample."""
        return {(row["problem"], row["sample"]): row for row in self._rows() if row["task"] == task}

    def _rows(self) -> list[dict[str, Any]]:
        return records.read_lines(self._generations)

    def table(self, tasks: Iterable[str]) -> str:
        """The numbers of these tasks."""
        rows = [
            [task, name, value]
            for task in tasks
            for name, value in _flat(self._tasks[task])
            if isinstance(value, int | float) and not name.startswith("settings")
        ]
        return tabulate(rows, ["task", "", "value"], floatfmt=".4f", disable_numparse=False)


def _flat(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


if __name__ == "__main__":
    run(main)
