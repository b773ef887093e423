"""Finished runs on disk, a line each, and what is chosen from them."""

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from ml_collections import ConfigDict

from experiments.linear_study.program import Dials, Outcome, Run
from fedlora_jax.checksums import Damaged
from fedlora_jax.experiment import records

RUNS = "runs.jsonl"
# What decides a run besides its method, setting, point and seed.
_DECIDING = ("rounds", "problem", "lora", "local", "options", "variants")
_CHECK = "crc32"


class Key(NamedTuple):
    """Which run."""

    method: str
    dials: Dials
    run: Run


# Outcomes as Python numbers; None where training diverged.
Results: TypeAlias = dict[Key, Outcome | None]


class Chosen(NamedTuple):
    """The point of the grid that a method takes in a setting.

    Attributes:
      rate: Learning rate of the clients.
      step: The server's step, None of a method without one.
      edges: Which of the two, `"rate"` or `"step"`, are the first or the last of their side.
    """

    rate: float
    step: float | None
    edges: tuple[str, ...]


def check_config(workdir: Path, config: ConfigDict) -> None:
    """Writes what decides a run into the work directory, or compares it with what is there.

    More settings, seeds and points of the grid may join runs that are there. Without any the
    configuration that is there binds nobody.

    Raises:
      ValueError: If something differs; it names the fields.
    """
    mine = {name: json.loads(config.to_json())[name] for name in _DECIDING}
    path = workdir / records.CONFIG
    if not path.exists() or not (workdir / RUNS).exists():
        records.write_sealed(path, mine)
        return
    theirs = records.read_sealed(path)
    # A method or a variant that is new decides nothing of the runs that are there.
    for name in ("options", "variants"):
        shared = mine[name].keys() & theirs[name].keys()
        mine[name], theirs[name] = ({k: x[name][k] for k in shared} for x in (mine, theirs))
    if found := records.differences(mine, theirs, "config"):
        raise ValueError(
            f"{workdir} holds runs of another configuration: {'; '.join(found)}. Choose another "
            "work directory"
        )


def read(workdir: Path) -> Results:
    """The runs of a work directory; a line cut short by a kill is taken off the file.

    Raises:
      Damaged: If a line is not what was written; the message says which.
    """
    path = workdir / RUNS
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        with records.replacing(path) as file:
            file.write(whole)
    results: Results = {}
    for number, row in enumerate(records.read_lines(path), 1):
        if row.pop(_CHECK, None) != _crc32(row):
            raise Damaged(
                f"line {number} of {path} is not what was written. Bring it back from a copy, or "
                "remove this line to have its run done again"
            )
        key = Key(
            row["method"], Dials(**row["setting"]), Run(row["rate"], row["step"], row["seed"])
        )
        diverged = row["error"] is None
        results[key] = None if diverged else Outcome(row["error"], row["aggregation_error"])
    return results


def append(workdir: Path, results: Mapping[Key, Outcome | None]) -> None:
    """Writes runs, all of them to the disk before it returns."""
    lines = []
    for (method, dials, run), outcome in results.items():
        row = {"method": method, "setting": dials._asdict(), **run._asdict()}
        row |= dict.fromkeys(Outcome._fields) if outcome is None else outcome._asdict()
        lines.append(json.dumps({**row, _CHECK: _crc32(row)}) + "\n")
    with open(workdir / RUNS, "a") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def _crc32(row: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True).encode())


def rounded(outcome: Outcome) -> Outcome | None:
    """The outcome to four digits, so that files are small; None if training diverged."""
    if not math.isfinite(outcome.error):
        return None
    return Outcome(*(float(f"{x:.4g}") for x in outcome))


def ranked(
    results: Results, method: str, dials: Dials, points: Iterable[Run], seeds: Sequence[int]
) -> list[Run]:
    """The points by the geometric mean of the error under these seeds, the smallest first.

    A point at which training diverged under one of them is left out, and so is one that has no run
    under one of them. Equal points stay in their order.
    """
    means = {}
    for point in points:
        keys = [Key(method, dials, point._replace(seed=seed)) for seed in seeds]
        found = [outcome.error for key in keys if (outcome := results.get(key)) is not None]
        if len(found) == len(seeds):
            means[point] = geometric_mean(found)
    return sorted(means, key=means.__getitem__)


def chosen(best: Run, points: Iterable[Run]) -> Chosen:
    """A point of the grid, with the sides of which it takes an end."""
    edges = []
    for side in ("rate", "step"):
        values = {getattr(point, side) for point in points}
        if len(values) > 1 and getattr(best, side) in (min(values), max(values)):
            edges.append(side)
    return Chosen(best.rate, best.step, tuple(edges))


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm; an error that float32 rounds to zero counts as 1e-30."""
    return float(np.exp(np.mean(np.log(np.maximum(values, 1e-30)))))
