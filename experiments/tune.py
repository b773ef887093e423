"""Chooses each method's learning rate and server step on the validation split, from one grid.

    python -m experiments.tune --config=configs/digits.py --workdir=runs/tuned \\
        --learning_rates=0.002,0.006,0.02,0.06 --server_steps=1,2,3 --seeds=2
    python -m experiments.compare --config=configs/digits.py --workdir=runs/all --methods=all \\
        --seeds=5 --learning_rates=runs/tuned/learning_rates.json

Runs every method at every point of the grid under every seed, as `experiments.train` does but
judged on the validation split. `--halving=3` spends less, by successive halving: all points for a
few rounds, the best third of them for three times as many, and so on to all rounds, each from where
it was. It is off by default, because large server steps fall behind first and end ahead. Of the
points that got so far the one with the best headline metric, mean over seeds, is chosen. A point at
which all clients of a round diverge is out, and the next best takes its place. A method of which a
run fails otherwise is left out. A method that has no server's step is tuned without.

Leaves `learning_rates.json`, and `report.md` with a plot, in the work directory; both say what was
spent. Run again after a kill, it goes on from the last finished round.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from experiments.shared import plots, report
from experiments.shared.apps import (
    check_asked,
    command,
    has_step,
    is_of_one_run,
    method_names,
    progress_bar,
    run,
    set_step,
    whole_rounds,
)
from fedlora_jax import experiment, locks
from fedlora_jax.experiment import records
from fedlora_jax.experiment.finished import judged_on
from fedlora_jax.federated.metrics import Metric

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file with a validation split, e.g. configs/digits.py."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for all that is written.", required=True)
_METHODS = flags.DEFINE_list(
    "methods", ["all"], "Methods to tune, or all; a method that --config names must be among them."
)
_LEARNING_RATES = flags.DEFINE_list(
    "learning_rates", ["0.002", "0.006", "0.02", "0.06"], "The grid, the same for all methods."
)
_SERVER_STEPS = flags.DEFINE_list(
    "server_steps",
    None,
    "The other side of the grid: values of config.server.step, or of config.server.learning_rate "
    "with a config.server.optimizer; by default that of the configuration alone.",
)
_HALVING = flags.DEFINE_integer(
    "halving",
    1,
    "One point in so many goes on, for so many times the rounds; 1: all, to the last round.",
    lower_bound=1,
)
_SEEDS = flags.DEFINE_integer(
    "seeds",
    2,
    "Number of seeds: 0, 1, ...; a --config.seed must be one of them.",
    lower_bound=1,
)


class Point(NamedTuple):
    """A point of the grid; `step` is None of a method that has no server's step."""

    rate: float
    step: float | None = None

    @property
    def directory(self) -> str:
        """Where its runs are, within the directory of its method."""
        return f"rate_{self.rate}" + ("" if self.step is None else f"_step_{self.step}")


class Rung(NamedTuple):
    """How many points, the best so far, are run until how many rounds are finished."""

    rounds: int
    points: int


class Spent(NamedTuple):
    """What the search for a method has taken; seconds without evaluation and compilation."""

    points: int
    rounds: int
    seconds: float


# By finished rounds: the headline metric under each seed, or None if training had diverged.
Values: TypeAlias = dict[int, list[float] | None]
# Of one method, in the order of the grid.
Found: TypeAlias = dict[Point, Values]

_LEGEND = """\
{metric} on the validation split, {better} is better, the plain mean over domains, as mean ± sample
standard deviation over {seeds} seed{s}: after the last round, or after so many rounds as stand in
brackets, where the search left off. `*` marks the best mean after the last round, which is chosen.
"edge": there is no better value within the grid, but there may be one beyond it."""


def main() -> None:
    """Runs the search, then writes what is chosen."""
    rates = parse_positive("learning_rates", _LEARNING_RATES.value)
    if _SERVER_STEPS.value is None:
        steps = [report.step_of(_CONFIG.value)]
    else:
        steps = parse_positive("server_steps", _SERVER_STEPS.value)
    names = method_names(_METHODS.value)
    check_asked(_CONFIG.value, names, _SEEDS.value)
    workdir = Path(_WORKDIR.value)
    tune(_CONFIG.value, workdir, names, rates, steps, _SEEDS.value, _HALVING.value)


def parse_positive(flag: str, texts: Sequence[str]) -> list[float]:
    """The numbers of one side of a grid in ascending order, each once."""
    try:
        values = sorted({float(text) for text in texts})
    except ValueError:
        values = []
    if not values or not all(0 < value < float("inf") for value in values):
        raise ValueError(f"--{flag}={','.join(texts)}: expected positive numbers")
    return values


def plan(points: int, rounds: int, halving: int) -> list[Rung]:
    """The rungs of successive halving, from all points for the fewest rounds to all rounds.

    Each has `halving` times the rounds of the one before, and one in `halving` of its points,
    rounded up; as many as there are rounds and points for.
    """
    levels = 0
    while halving > 1 and halving ** (levels + 1) <= rounds and halving**levels < points:
        levels += 1
    return [
        Rung(-(-rounds // halving ** (levels - level)), -(-points // halving**level))
        for level in range(levels + 1)
    ]


def search(
    points: Sequence[Point],
    rungs: Sequence[Rung],
    run_to: Callable[[Point, int], list[float] | None],
    metric: Metric,
) -> Found:
    """Successive halving.

    Args:
      points: The grid; of equal points the first is taken.
      rungs: From `plan`.
      run_to: From a point and a number of rounds to the values after these, None if it diverged.
      metric: What the values are of.
    """
    found: Found = {point: {} for point in points}
    order = list(points)
    for rung in rungs:
        means: dict[Point, float] = {}
        for point in order:
            if len(means) == rung.points:
                break
            values = found[point][rung.rounds] = run_to(point, rung.rounds)
            if values is not None:
                means[point] = float(np.mean(values))
        order = sorted(means, key=means.__getitem__, reverse=metric.higher_is_better)
    return found


def tune(
    config: ConfigDict,
    workdir: Path,
    names: Sequence[str],
    rates: Sequence[float],
    steps: Sequence[float],
    num_seeds: int,
    halving: int,
) -> dict[str, Point]:
    """Chooses a point of the grid for each method, and writes the report into `workdir`.

    Raises:
      ValueError: Before any work, if the configuration has no validation split, or the directory of
        a run holds one of another configuration. If a run failed otherwise than by diverging, after
        all other methods have run and all is written.
      FloatingPointError: If every point diverged for a method, and no run failed otherwise;
        likewise.
    """
    config = judged_on_validation(config)
    grids = {name: _grid(config, name, rates, steps) for name in names}
    for name, grid in grids.items():
        _check_workdirs(grid, workdir / name, num_seeds)
    locks.check_writable(workdir)
    setting = experiment.prepare(next(iter(grids[names[0]].values())))
    metric, found, spent = setting.task.metrics[0], {}, {}
    failed: list[tuple[str, str]] = []
    total = sum(_rounds(plan(len(grid), config.rounds, halving)) for grid in grids.values())
    with progress_bar(num_seeds * total) as bar, whole_rounds(bar) as advance:
        for name, grid in grids.items():
            rungs = plan(len(grid), config.rounds, halving)
            runs = _Runs(grid, setting, workdir / name, num_seeds, bar, advance)
            before = bar.n
            try:
                values, taken = search(list(grid), rungs, runs.to, metric), runs.spent()
                found[name], spent[name] = values, taken
            except (ValueError, OSError) as error:
                if not is_of_one_run(error, first=name == names[0]):
                    raise
                failed.append((name, str(error)))
            bar.update(num_seeds * _rounds(rungs) - (bar.n - before))  # Of points given up.
    if not found:
        raise ValueError(report.left_out({}, failed))
    chosen = choose(found, metric, config.rounds)
    with locks.held(workdir, workdir / ".lock", wait=True):
        path = write(workdir, found, chosen, spent, metric, config.rounds, failed)
    print(f"\n{render(found, chosen, metric)}\n\n{told(spent)}\n\nReport with plot: {path}")
    said = [report.left_out({}, failed)] if failed else []
    if diverged := [name for name in found if name not in chosen]:
        said.append(
            f"training diverged at every point of the grid for {', '.join(diverged)}, which "
            f"{workdir / 'learning_rates.json'} therefore lacks; try smaller learning rates"
        )
    if said:
        raise (ValueError if failed else FloatingPointError)("\n".join(said))
    return chosen


def judged_on_validation(config: ConfigDict) -> ConfigDict:
    """The configuration with the validation split in the place of the test split."""
    splits = config.data.splits
    if "validation" not in splits:
        raise ValueError(
            "config.data.splits has no 'validation', and a learning rate is not to be chosen on "
            f"the test split; it has {', '.join(f'{k}={v!r}' for k, v in splits.items())}"
        )
    return judged_on(config, "validation")


def _grid(
    config: ConfigDict, name: str, rates: Sequence[float], steps: Sequence[float]
) -> dict[Point, ConfigDict]:
    """The points for a method, each with its configuration, which is checked."""
    base = config.copy_and_resolve_references()
    base.method = name
    mine: Sequence[float | None] = steps if has_step(base) else [None]
    grid = {}
    for point in (Point(rate, step) for rate in rates for step in mine):
        grid[point] = base.copy_and_resolve_references()
        grid[point].local.learning_rate = point.rate
        set_step(grid[point], point.step)
        experiment.check(grid[point])
    return grid


def _directory(workdir: Path, point: Point, seed: int) -> Path:
    """Of a run, within the directory of its method."""
    return workdir / point.directory / f"seed_{seed}"


def _check_workdirs(grid: Mapping[Point, ConfigDict], workdir: Path, num_seeds: int) -> None:
    for point, config in grid.items():
        mine = config.copy_and_resolve_references()
        for seed in range(num_seeds):
            mine.seed = seed
            experiment.check_workdir(mine, _directory(workdir, point, seed))


def _rounds(rungs: Sequence[Rung]) -> int:
    """Under one seed, if no point diverges."""
    fresh = [rung.rounds - before for rung, before in zip(rungs, [0, *(r.rounds for r in rungs)])]
    return sum(rung.points * rounds for rung, rounds in zip(rungs, fresh, strict=True))


class _Runs:
    """The runs of one method, which go on from where they are.

    Args:
      grid: The points with their configurations.
      setting: Of all methods.
      workdir: Of the method.
      num_seeds: How many runs a point has.
      bar: Of all runs.
      advance: Called for each finished round.
    """

    def __init__(
        self,
        grid: Mapping[Point, ConfigDict],
        setting: experiment.Setting,
        workdir: Path,
        num_seeds: int,
        bar: tqdm,
        advance: experiment.Progress,
    ):
        self._grid, self._setting, self._workdir = grid, setting, workdir
        self._seeds, self._bar, self._advance = range(num_seeds), bar, advance
        self._programs: dict[bool, experiment.Program] = {}
        self._shown: dict[Path, int] = {}

    def to(self, point: Point, rounds: int) -> list[float] | None:
        """The values after so many rounds, by seed; None as soon as training diverges in one."""
        metric, values = self._setting.task.metrics[0], []
        config = self._grid[point].copy_and_resolve_references()
        for seed in self._seeds:
            config.seed = seed
            step = "" if point.step is None else f", server step {point.step:g}"
            title = f"{config.method}, learning rate {point.rate:g}{step}, seed {seed}"
            self._bar.set_description(title)
            final = self._value(config, _directory(self._workdir, point, seed), rounds)
            if self._bar.disable:
                said = "diverged" if final is None else f"{metric.show(final)}, round {rounds}"
                print(f"{title}: {said}", flush=True)
            if final is None:
                return None
            values.append(final)
        return values

    def spent(self) -> Spent:
        """What all of it has taken, before a kill too."""
        rows = [
            row
            for point in self._grid
            for seed in self._seeds
            for row in records.read_metrics(_directory(self._workdir, point, seed))
        ]
        return Spent(len(self._grid), len(rows), sum(row["seconds"] for row in rows))

    def _program(self, config: ConfigDict) -> experiment.Program:
        """With the step of the configuration, of which what is compiled is independent."""
        stepping = experiment.steps(config)
        if stepping not in self._programs:
            self._programs[stepping] = experiment.compile_program(config, self._setting)
        return experiment.with_step(self._programs[stepping], config)

    def _value(self, config: ConfigDict, workdir: Path, rounds: int) -> float | None:
        # Without a mark, the round that diverged would be tried again each time. Of those before it
        # a search that is run again judges as the first one did.
        mark = workdir / "diverged.json"
        text = config.to_json(indent=2, sort_keys=True) + "\n"
        marked = mark.exists() and mark.read_text() == text
        if marked and len(records.read_metrics(workdir)) < rounds:
            return None
        finished = itertools.count(1)

        def advance() -> None:
            # Rounds of earlier rungs, and of later ones before a kill, are found finished again.
            shown = self._shown.get(workdir, 0)
            if shown < next(finished) <= rounds:
                self._shown[workdir] = shown + 1
                self._advance()

        try:
            rows = experiment.run(
                config, self._setting, self._program(config), workdir, advance, until=rounds
            )
        except FloatingPointError:
            records.write_atomically(mark, text)
            return None
        return _judged(rows[rounds - 1], self._setting.task.metrics[0].name, workdir)


def _judged(row: Mapping[str, Any], metric: str, workdir: Path) -> float:
    if metric not in row:
        raise ValueError(
            f"round {row['round']} of the run in {workdir} was not evaluated: choose another work "
            "directory, or one value of --halving and config.evaluate_every for all that is in it"
        )
    return row[metric]


def choose(found: Mapping[str, Found], metric: Metric, rounds: int) -> dict[str, Point]:
    """For each method the best mean after all rounds, of equal ones the smallest point.

    A method of which no point got so far is left out.
    """
    chosen = {}
    for name, points in found.items():
        ended = {point: values.get(rounds) for point, values in points.items()}
        means = {point: float(np.mean(x)) for point, x in sorted(ended.items()) if x is not None}
        if means:
            chosen[name] = metric.best(means)
    return chosen


def render(
    found: Mapping[str, Found],
    chosen: Mapping[str, Point],
    metric: Metric,
    style: str = "simple",
) -> str:
    """The table of the last values; `style` is a table format of the library tabulate."""
    rates = sorted({point.rate for points in found.values() for point in points})
    last = max(rounds for points in found.values() for x in points.values() for rounds in x)
    rows = []
    for name, points in found.items():
        mine = chosen.get(name)
        for step in dict.fromkeys(point.step for point in points):
            at = [Point(rate, step) for rate in rates]
            cells = [_cell(points[point], last, metric) + " *" * (point == mine) for point in at]
            here = mine is not None and mine.step == step
            said = _shown(mine, list(points)) if here and mine is not None else "-"
            rows.append([name, "-" if step is None else f"{step:g}", *cells, said])
    return report.aligned(
        ["method", "step", *(f"{rate:g}" for rate in rates), "chosen"], rows, style
    )


def _shown(point: Point, grid: Sequence[Point]) -> str:
    def side(value: float, values: set[float]) -> str:
        return f"{value:g}{' (edge)' * (value in (min(values), max(values)))}"

    shown = side(point.rate, {each.rate for each in grid})
    steps = {each.step for each in grid if each.step is not None}
    if point.step is None or len(steps) == 1:
        return shown
    return f"{shown}, {side(point.step, steps)}"


def _cell(values: Values, last: int, metric: Metric) -> str:
    if not values:
        return "-"
    rounds = max(values)
    reached = values[rounds]
    if reached is None:
        return "diverged"
    shown = report.spread([metric.factor * x for x in reached], metric.digits)
    return shown if rounds == last else f"{shown} [{rounds}]"


def told(spent: Mapping[str, Spent]) -> str:
    """What the search has taken, in words."""
    points, rounds, seconds = (sum(x) for x in zip(*spent.values(), strict=True))
    return (
        f"Spent: {points} points, {rounds} rounds, {seconds:.0f} s in rounds, for "
        f"{len(spent)} method{'s' * (len(spent) != 1)}."
    )


def write(
    workdir: Path,
    found: Mapping[str, Found],
    chosen: Mapping[str, Point],
    spent: Mapping[str, Spent],
    metric: Metric,
    rounds: int,
    failed: Sequence[tuple[str, str]],
) -> Path:
    """Writes `learning_rates.json` and `report.md`; returns the path of the latter."""
    record = {
        "command": command(),
        "learning_rates": {name: point.rate for name, point in chosen.items()},
        "server_steps": {name: point.step for name, point in chosen.items()},
        "rounds": rounds,
        "spent": {name: each._asdict() for name, each in spent.items()},
        f"validation_{metric.name}": {
            name: [{**point._asdict(), "after": values} for point, values in points.items()]
            for name, points in found.items()
        },
    }
    records.write_atomically(workdir / "learning_rates.json", json.dumps(record, indent=1) + "\n")
    every = [x for each in found.values() for v in each.values() for x in v.values() if x]
    seeds = max((len(x) for x in every), default=0)
    parts = [
        "# Learning rates and server steps",
        f"```\n{command()}\n```",
        render(found, chosen, metric, "github"),
        _LEGEND.format(
            metric=metric.sentence,
            better=metric.better,
            seeds=seeds,
            s="s" * (seeds != 1),
        ),
        *([f"Left out: {report.left_out({}, failed)}"] if failed else []),
        told(spent),
        plots.save(workdir, {"learning_rates": _plot(found, metric)}),
    ]
    records.write_atomically(workdir / "report.md", "\n\n".join(parts) + "\n")
    return workdir / "report.md"


def _plot(found: Mapping[str, Found], metric: Metric) -> plots.Plot:
    """All points after the rounds that all have: of each rate the best step."""
    first = min(rounds for points in found.values() for x in points.values() for rounds in x)
    by_rate: dict[str, dict[float, list[float] | None]] = {}
    for name, points in found.items():
        by_rate[name] = {}
        for rate in sorted({point.rate for point in points}):
            values = {p: x.get(first) for p, x in points.items() if p.rate == rate}
            means = {p: float(np.mean(x)) for p, x in values.items() if x is not None}
            by_rate[name][rate] = values[metric.best(means)] if means else None
    return plots.learning_rates(by_rate, metric, first)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run(main)
