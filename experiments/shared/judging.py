"""Lets a model write for a benchmark, judges it, and keeps what it wrote."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from experiments.shared.apps import command, progress_bar
from experiments.shared.targets import Target
from fedlora_jax.data.text import check_vocabulary
from fedlora_jax.experiment import records
from fedlora_jax.models import Llama, pretrained
from fedlora_jax.models.pretrained import Language
from fedlora_jax.names import lookup
from fedlora_jax.scoring import benchmarks, completions
from fedlora_jax.scoring.answers import pass_at_k
from fedlora_jax.scoring.benchmarks import Benchmark
from fedlora_jax.scoring.completions import Sampling

METRICS = "metrics"


def parse_tasks(texts: Sequence[str]) -> dict[str, str | None]:
    """The file of each task, None for those without.

    Raises:
      ValueError: On an unknown task, with the nearest name, one that is named twice, or a file of
        metrics.
    """
    tasks: dict[str, str | None] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        lookup(dict.fromkeys([METRICS, *benchmarks.names()]), name, "task")
        if name in tasks:
            raise ValueError(f"--tasks names {name} twice")
        if name == METRICS and equals:
            raise ValueError(
                "metrics are of the data of --workdir or --config, not of a file: --tasks=metrics"
            )
        tasks[name] = path if equals else None
    if not tasks:
        raise ValueError("--tasks names none")
    return tasks


def check_metrics(tasks: Iterable[str], names: Sequence[str], client: int | None) -> None:
    """Checks that what is asked of metrics makes sense.

    Args:
      tasks: What is to be done.
      names: The metrics that were named.
      client: Whose own model is to write.

    Raises:
      ValueError: If metrics of one client are wanted, or some are named and none measured.
    """
    if METRICS in tasks and client is not None:
        raise ValueError(
            "metrics are of all clients, each one's among them: ask for them without --client"
        )
    if names and METRICS not in tasks:
        raise ValueError("--metrics chooses what --tasks=metrics measures, which is not asked for")


class Asking(NamedTuple):
    """How a model is asked.

    Attributes:
      sampling: How tokens are chosen.
      chat: Whether through its chat template.
      samples: Texts for each problem.
      limit: The first so many problems; 0 for all.
      rows: Texts at the same time.
      tokenizer: Where the tokenizer is, if it is not the target's.
      allow_code_execution: Whether programs that the model wrote may be run.
    """

    sampling: Sampling
    chat: bool = False
    samples: int = 1
    limit: int = 0
    rows: int = 16
    tokenizer: str | None = None
    allow_code_execution: bool = False

    def check(self, name: str, benchmark: Benchmark) -> None:
        """Raises ValueError if a benchmark runs code and that is not allowed, or samples agree."""
        if benchmark.runs_code and not self.allow_code_execution:
            raise ValueError(
                f"{name} runs programs that the model writes: allow it by --allow_code_execution"
            )
        if self.samples > 1 and not self.sampling.temperature:
            raise ValueError("several samples of the likeliest tokens agree: give --temperature")

    def settings(self) -> dict[str, Any]:
        """All that a text depends on besides the model and the problem."""
        named = {"chat": self.chat, "samples": self.samples, "tokenizer": self.tokenizer}
        return {**named, **self.sampling._asdict()}


def measure(target: Target, split: str, metrics: Sequence[str], record: "Record") -> str:
    """Measures and records the metrics of a run or a configuration.

    Args:
      target: With data.
      split: On which split of them, that for which the target was made.
      metrics: Which of them, if not all that it has.
      record: Where they go.

    Returns:
      Under which name they are recorded: another for each split, and for metrics that were named.
    """
    assert target.measure is not None
    began = time.perf_counter()
    found = target.measure()
    name = " ".join([METRICS, *([split] if split != "test" else []), ",".join(metrics)]).strip()
    settings = {**target.name, "split": split}
    record.finish(name, settings, {**found, "seconds": round(time.perf_counter() - began, 1)})
    return name


def score(
    name: str,
    benchmark: Benchmark,
    target: Target,
    asking: Asking,
    record: "Record",
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Lets the model write for each problem, and judges that, batch by batch.

    Args:
      name: Of the task.
      benchmark: Its problems.
      target: With the model.
      asking: How it is asked.
      record: Where texts go, and are found from before.
      settings: Of all texts of the task in the record.

    Returns:
      From `summary`.

    Raises:
      ValueError: If the model does not write, its tokenizer is unknown or of another vocabulary, a
        prompt is too long, as `Asking.check`, or else as `Record.claim`.
    """
    asking.check(name, benchmark)
    if not isinstance(target.model, Llama):
        raise ValueError(
            "this method has no model for all: choose a client's own by --client"
            if target.model is None
            else f"{name} needs a model that writes, not a {type(target.model).__name__}"
        )
    language = read_language(target, asking.tokenizer)
    problems = benchmark.problems[: asking.limit or None]
    encoded = [completions.encode(language, problem.prompt, asking.chat) for problem in problems]
    names = [f"{name} {problem.name}" for problem in problems]
    completions.check_lengths(target.model, encoded, names, asking.sampling)
    # Not before: what is refused leaves the record to others.
    record.claim(name, settings)
    items = [(i, sample) for i in range(len(problems)) for sample in range(asking.samples)]
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
        asking.sampling,
        adapters=target.adapters,
        scale=target.scale,
        end_token=language.end_tokens,
        done=lambda at, new: text_of(at, new)[1],
        rows=asking.rows,
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
    known = record.generations(name)
    texts = [[known[p.name, sample] for sample in range(asking.samples)] for p in problems]
    return summary(texts, benchmark.runs_code)


def read_language(target: Target, tokenizer: str | None = None) -> Language:
    """The tokenizer of the target, or the one that is named.

    Raises:
      ValueError: If there is none, or it is another model's, as in `text.check_vocabulary`.
    """
    source = tokenizer or target.tokenizer
    if source is None:
        raise ValueError("where the model's tokenizer is, --tokenizer must say")
    language = pretrained.read_language(source)
    size, model = getattr(target.model, "vocab_size", 0), type(target.model).__name__
    check_vocabulary(language.tokenizer, size, source=source, model=model)
    return language


def summary(texts: Sequence[Sequence[Mapping[str, Any]]], runs_code: bool) -> dict[str, Any]:
    """The share of problems solved, with 1, 10 and 100 texts as far as there are so many.

    Args:
      texts: For each problem the rows of its texts, equally many.
      runs_code: Whether the texts are programs.
    """
    samples = len(texts[0])
    name = "pass" if runs_code else "exact_match"
    passed = [sum(row["passed"] for row in rows) for rows in texts]
    found: dict[str, Any] = {
        f"{name}@{k}": float(np.mean([pass_at_k(samples, count, k) for count in passed]))
        for k in (1, 10, 100)
        if k <= samples
    }
    flat = [row for rows in texts for row in rows]
    found |= {"problems": len(texts), "samples": samples}
    found |= {"cut_off": sum(not row["ended"] for row in flat)}
    if runs_code:
        by_kernel = {row["kernel"] for row in flat} - {None}
        found["isolation"] = "python" if False in by_kernel else "kernel" if by_kernel else None
    return found


class Record:
    """`evaluation.json` and `generations.jsonl` of a directory.

    Args:
      out: The directory, made if it is not there.
    """

    def __init__(self, out: Path):
        out.mkdir(parents=True, exist_ok=True)
        self.path, self._generations = out / "evaluation.json", out / "generations.jsonl"
        self._tasks = records.read_sealed(self.path) if self.path.exists() else {}
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
        return tabulate(
            rows,
            ["task", "", "value"],
            floatfmt=".4f",
        )


def _flat(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value
