"""Tables and plots from the metrics of finished runs."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from experiments.shared import paired, plots
from experiments.shared.apps import command
from experiments.shared.plots import Rounds, Runs
from fedlora_jax import experiment
from fedlora_jax.experiment import records

_LEGEND = {
    "learning rate": "Learning rate: that of each method's clients at the start.",
    "accuracy %": "Accuracy: test accuracy in percent after the last round, the plain mean over "
    "domains, as mean ± sample standard deviation over seeds; then the mean over seeds for each "
    "domain.",
    "personal %": "Personal: the mean over clients, each judged on test examples distributed as "
    "its own data, with its own factors if the method keeps them.",
    "agg. error": "Agg. error: relative Frobenius distance of the server's update from the mean of "
    "the clients' updates.",
    "MB up": "MB: megabytes that the whole cohort sends and receives in a round.",
    "MB catch-up": "Catch-up: what clients that skipped rounds must be sent in addition, because "
    "those rounds changed the backbone.",
    "epsilon": "Epsilon: of differential privacy, over all rounds.",
    "s / round": "Seconds: median over all rounds, without evaluation. Errors and megabytes are "
    "means over rounds and seeds.",
}

_PAIRED_LEGEND = """\
Accuracy minus that of {reference} under the same seed, in points: the mean over {seeds} seeds, its
95% t-interval, on how many seeds the method is higher, and the p-value of a two-sided paired
t-test, corrected by Holm for the {methods} comparisons of this table; an interval holds for its
method alone. A seed sets the split over clients, the first adapters, the cohorts and the batches:
intervals say what another seed could change. They do not say what another data set, backbone or
learning rate could, nor other test examples: all runs share the same {test_examples}."""


class Study(NamedTuple):
    """What a report says besides the metrics.

    Attributes:
      command: What was run, for the record.
      partition: The number of examples of each client, domain and label, `[N, D, L]`.
      domains: Names of the domains.
      test_examples: Their number.
      learning_rates: That of each method.
    """

    command: str
    partition: np.ndarray
    domains: Sequence[str]
    test_examples: int
    learning_rates: Mapping[str, float]


def table(runs: Runs, learning_rates: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the comparison, as `_LEGEND` explains them.

    Columns in which no run has anything to say are left out, and learning rates if all are equal.
    """
    rows = [_row(method, seeds, learning_rates[method]) for method, seeds in runs.items()]
    silent = {
        "learning rate": len(set(learning_rates[method] for method in runs)) == 1,
        "personal %": not _any(runs, "personal_accuracy", lambda x: x is not None),
        "MB catch-up": not _any(runs, "megabytes_catch_up", bool),
        "epsilon": not _any(runs, "epsilon", lambda x: x is not None),
    }
    head = [column for column in rows[0] if not silent.get(column)]
    return head, [[row[column] for column in head] for row in rows]


def _row(method: str, seeds: Sequence[Rounds], learning_rate: float) -> dict[str, str]:
    last = [rounds[-1] for rounds in seeds]
    everything = [row for rounds in seeds for row in rounds]
    # Files of older versions lack the fields that are asked for with `get`.
    personal = [100 * x for row in last if (x := row.get("personal_accuracy")) is not None]
    epsilons = [x for row in last if (x := row.get("epsilon")) is not None]
    catch_up = [row.get("megabytes_catch_up", 0.0) for row in everything]
    errors = [r["aggregation_error"] for r in everything if r["aggregation_error"] is not None]
    return {
        "method": method,
        "learning rate": f"{learning_rate:g}",
        "accuracy %": spread([100 * row["accuracy"] for row in last]),
        **{
            domain: f"{100 * _mean(row['domain_accuracy'][domain] for row in last):.1f}"
            for domain in last[0]["domain_accuracy"]
        },
        "personal %": spread(personal) if personal else "-",
        "agg. error": f"{_mean(errors):.4f}" if errors else "-",
        "MB up": f"{_mean(row['megabytes_up'] for row in everything):.2f}",
        "MB down": f"{_mean(row['megabytes_down'] for row in everything):.2f}",
        "MB catch-up": f"{_mean(catch_up):.2f}",
        "epsilon": f"{max(epsilons):.2f}" if epsilons else "-",
        "s / round": f"{np.median([row['seconds'] for row in everything]):.2f}",
    }


def _any(runs: Runs, field: str, wanted: Any) -> bool:
    return any(wanted(row.get(field)) for seeds in runs.values() for r in seeds for row in r)


def reference_of(runs: Runs) -> str | None:
    """The method that others are compared with: fedit, or else the first.

    None if there is nothing to compare: one method, or one seed.
    """
    seeds = min(len(each) for each in runs.values())
    if len(runs) < 2 or seeds < 2:
        return None
    return "fedit" if "fedit" in runs else next(iter(runs))


def compared(runs: Runs, reference: str) -> dict[str, paired.Difference]:
    """Final accuracies, in points, compared with those of a method under the same seeds."""
    final = {
        method: [100 * rounds[-1]["accuracy"] for rounds in seeds] for method, seeds in runs.items()
    }
    return paired.differences(final, reference)


def render(runs: Runs, learning_rates: Mapping[str, float], style: str = "simple") -> str:
    """The table as text; `style` is a table format of the library tabulate."""
    return aligned(*table(runs, learning_rates), style)


def render_paired(runs: Runs, reference: str, style: str = "simple") -> str:
    """The differences from a reference as text."""
    head = [f"minus {reference}", "points", "95% interval", "higher on", "p (Holm)"]
    rows = [
        [
            method,
            f"{each.mean:+.2f}",
            f"{each.low:+.2f} to {each.high:+.2f}",
            f"{each.higher} of {each.seeds}",
            f"{each.p:.3f}" if each.p >= 0.0005 else "< 0.001",
        ]
        for method, each in compared(runs, reference).items()
    ]
    return aligned(head, rows, style)


def summary(runs: Runs, learning_rates: Mapping[str, float]) -> str:
    """All tables, for a terminal."""
    reference = reference_of(runs)
    parts = [render(runs, learning_rates)]
    if reference is not None:
        parts.append(render_paired(runs, reference))
    return "\n\n".join(parts)


def finish(
    config: ConfigDict,
    setting: experiment.Setting,
    workdir: Path,
    runs: Runs,
    learning_rates: Mapping[str, float],
) -> None:
    """Writes the report of finished runs into `workdir`, and prints its tables."""
    study = Study(
        command(),
        experiment.partition_counts(config, setting),
        setting.domains,
        len(setting.test["label"]),
        learning_rates,
    )
    path = write(workdir, runs, study)
    print(f"\n{summary(runs, learning_rates)}\n\nReport with plots: {path}")


def write(workdir: Path, runs: Runs, study: Study) -> Path:
    """Writes `report.md` and its plots into `workdir`; returns the path of the report."""
    reference = reference_of(runs)
    drawn = {
        "accuracy": plots.accuracy(runs),
        "paired": plots.differences(compared(runs, reference), reference) if reference else None,
        "domains": plots.domains(runs),
        "aggregation_error": plots.aggregation_error(runs),
        "error_and_accuracy": plots.error_and_accuracy(runs),
        "partition": plots.partition(study.partition, study.domains),
    }
    seeds = len(next(iter(runs.values())))
    head, _ = table(runs, study.learning_rates)
    parts = [
        f"# Comparison over {seeds} seed{'s' * (seeds > 1)}",
        f"```\n{study.command}\n```",
        render(runs, study.learning_rates, "github"),
        " ".join(text for column, text in _LEGEND.items() if column in head),
    ]
    if reference:
        parts += [
            f"## Against {reference}",
            render_paired(runs, reference, "github"),
            _PAIRED_LEGEND.format(
                reference=reference,
                seeds=seeds,
                methods=len(runs) - 1,
                test_examples=f"{study.test_examples:,}",
            ),
        ]
    parts += ["## Plots", plots.save(workdir, drawn)]
    records.write_atomically(workdir / "report.md", "\n\n".join(parts) + "\n")
    return workdir / "report.md"


def aligned(head: list[str], rows: list[list[str]], style: str) -> str:
    """A table with its first column to the left and all others to the right."""
    align = ("left", *["right"] * (len(head) - 1))
    return tabulate(rows, head, tablefmt=style, colalign=align, disable_numparse=True)


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation, or the value itself if there is one."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
