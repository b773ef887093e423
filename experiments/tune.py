"""Chooses the learning rate of each method on the validation split, from one grid for all.

    python -m experiments.tune --config=configs/digits.py --workdir=runs/tuned \\
        --learning_rates=0.002,0.006,0.02,0.06 --seeds=2
    python -m experiments.compare --config=configs/digits.py --workdir=runs/all --methods=all \\
        --seeds=5 --learning_rates=runs/tuned/learning_rates.json

Runs every method at every rate under every seed, as `experiments.train` does but judged on the
validation split, and takes the rate with the best headline metric after the last round, mean over
seeds. A rate at which all clients of a round diverge is out for that method. Leaves
`learning_rates.json`, and `report.md` with a plot, in the work directory. Run again after a kill,
it goes on from the last finished round.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from experiments.shared import plots, report
from experiments.shared.apps import command, method_names, progress_bar, run, whole_rounds
from fedlora_jax import experiment, locks
from fedlora_jax.experiment import records
from fedlora_jax.experiment.finished import judged_on
from fedlora_jax.federated.metrics import Metric

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file with a validation split, e.g. configs/digits.py."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for all that is written.", required=True)
_METHODS = flags.DEFINE_list("methods", ["all"], "Methods to choose a learning rate for, or all.")
_LEARNING_RATES = flags.DEFINE_list(
    "learning_rates", ["0.002", "0.006", "0.02", "0.06"], "The grid, the same for all methods."
)
_SEEDS = flags.DEFINE_integer("seeds", 2, "Number of seeds: 0, 1, ...", lower_bound=1)

# By learning rate: the headline metric under each seed, or None if training diverged.
Values: TypeAlias = dict[float, list[float] | None]

_LEGEND = """\
{metric} on the validation split after the last round, {better} is better, the plain mean over
domains, as mean ± sample standard deviation over {seeds} seed{s}; `*` marks the best mean, which is
chosen.
"edge": there is no better rate within the grid, but there may be one beyond it."""


def main() -> None:
    """Runs the grid, then writes what is chosen."""
    rates = parse_learning_rates(_LEARNING_RATES.value)
    tune(_CONFIG.value, Path(_WORKDIR.value), method_names(_METHODS.value), rates, _SEEDS.value)


def parse_learning_rates(texts: Sequence[str]) -> list[float]:
    """The rates of a grid in ascending order, each once."""
    try:
        rates = sorted({float(text) for text in texts})
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"--learning_rates={','.join(texts)}: expected positive numbers")
    return rates


def tune(
    config: ConfigDict, workdir: Path, names: Sequence[str], rates: Sequence[float], num_seeds: int
) -> dict[str, float]:
    """Chooses one of the learning rates for each method, and writes the report into `workdir`.

    Raises:
      ValueError: If the configuration has no validation split.
      FloatingPointError: If every rate diverged for a method, after all has been written.
    """
    config = judged_on_validation(config)
    configs = {name: config.copy_and_resolve_references() for name in names}
    for name, mine in configs.items():
        mine.method = name
        experiment.check(mine)
    locks.check_writable(workdir)
    setting = experiment.prepare(config)
    found: dict[str, Values] = {}
    total = len(names) * len(rates) * num_seeds * config.rounds
    with progress_bar(total) as bar, whole_rounds(bar) as advance:
        for name, mine in configs.items():
            program = experiment.compile_program(mine, setting)
            found[name] = {}
            for rate in rates:
                mine.local.learning_rate = rate
                directory, before = workdir / name / f"rate_{rate}", bar.n
                found[name][rate] = _values(
                    mine, setting, program, directory, num_seeds, bar, advance
                )
                bar.update(num_seeds * config.rounds - (bar.n - before))  # of a rate given up
    metric = setting.task.metrics[0]
    chosen = choose(found, metric)
    path = write(workdir, found, chosen, metric)
    print(f"\n{render(found, chosen, metric)}\n\nReport with plot: {path}")
    failed = [name for name in names if name not in chosen]
    if failed:
        raise FloatingPointError(
            f"training diverged at every learning rate for {', '.join(failed)}, which "
            f"{workdir / 'learning_rates.json'} therefore lacks; try smaller ones"
        )
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


def _values(
    config: ConfigDict,
    setting: experiment.Setting,
    program: experiment.Program,
    workdir: Path,
    num_seeds: int,
    bar: tqdm,
    advance: experiment.Progress,
) -> list[float] | None:
    """The final value under each seed; None as soon as training diverges under one."""
    metric, values = setting.task.metrics[0], []
    for seed in range(num_seeds):
        config.seed = seed
        title = f"{config.method}, learning rate {config.local.learning_rate:g}, seed {seed}"
        bar.set_description(title)
        final = _value(config, setting, program, workdir / f"seed_{seed}", advance)
        if bar.disable:
            print(f"{title}: {'diverged' if final is None else metric.show(final)}", flush=True)
        if final is None:
            return None
        values.append(final)
    return values


def _value(
    config: ConfigDict,
    setting: experiment.Setting,
    program: experiment.Program,
    workdir: Path,
    advance: experiment.Progress,
) -> float | None:
    # Without a mark, a run that diverged would be tried again each time.
    mark = workdir / "diverged.json"
    text = config.to_json(indent=2, sort_keys=True) + "\n"
    if mark.exists() and mark.read_text() == text:
        return None
    try:
        last = experiment.run(config, setting, program, workdir, advance)[-1]
        return last[setting.task.metrics[0].name]
    except FloatingPointError:
        records.write_atomically(mark, text)
        return None


def choose(found: Mapping[str, Values], metric: Metric) -> dict[str, float]:
    """For each method the rate of the best mean, of equal ones the smallest.

    A method that diverged at every rate is left out.
    """
    chosen = {}
    for name, values in found.items():
        means = {rate: float(np.mean(x)) for rate, x in sorted(values.items()) if x is not None}
        if means:
            chosen[name] = metric.best(means)
    return chosen


def render(
    found: Mapping[str, Values],
    chosen: Mapping[str, float],
    metric: Metric,
    style: str = "simple",
) -> str:
    """The table of all values; `style` is a table format of the library tabulate."""
    rates = list(next(iter(found.values())))
    rows = []
    for name, values in found.items():
        mine = chosen.get(name)
        cells = [_cell(values[rate], metric) + " *" * (rate == mine) for rate in rates]
        edge = " (edge)" * (mine in (min(rates), max(rates)))
        rows.append([name, *cells, "-" if mine is None else f"{mine:g}{edge}"])
    return report.aligned(["method", *(f"{rate:g}" for rate in rates), "chosen"], rows, style)


def _cell(values: Sequence[float] | None, metric: Metric) -> str:
    if values is None:
        return "diverged"
    return report.spread([metric.factor * x for x in values], metric.digits)


def write(
    workdir: Path, found: Mapping[str, Values], chosen: Mapping[str, float], metric: Metric
) -> Path:
    """Writes `learning_rates.json` and `report.md`; returns the path of the latter."""
    record = {
        "command": command(),
        "learning_rates": chosen,
        f"validation_{metric.name}": {
            name: {f"{rate:g}": x for rate, x in values.items()} for name, values in found.items()
        },
    }
    records.write_atomically(workdir / "learning_rates.json", json.dumps(record, indent=1) + "\n")
    seeds = max((len(x) for each in found.values() for x in each.values() if x), default=0)
    parts = [
        "# Learning rates",
        f"```\n{command()}\n```",
        render(found, chosen, metric, "github"),
        _LEGEND.format(
            metric=metric.sentence,
            better=metric.better,
            seeds=seeds,
            s="s" * (seeds != 1),
        ),
        plots.save(workdir, {"learning_rates": plots.learning_rates(found, metric)}),
    ]
    records.write_atomically(workdir / "report.md", "\n\n".join(parts) + "\n")
    return workdir / "report.md"


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run(main)
