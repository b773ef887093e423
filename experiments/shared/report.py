"""Tables and plots from the metrics of finished runs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from experiments.shared import clients, paired, plots
from experiments.shared.apps import command
from experiments.shared.plots import Rounds, Runs
from fedlora_jax import experiment, locks
from fedlora_jax.experiment import partitions, records
from fedlora_jax.experiment.partitions import Overview
from fedlora_jax.federated.metrics import Metric

_LEGEND = {
    "learning rate": "Learning rate: that of each method's clients at the start.",
    "server step": "Server step: the factor by which the server goes beyond the method's change.",
    "agg. error": "Agg. error: relative Frobenius distance of the server's update from the mean of "
    "the clients' updates.",
    "MB up": "MB: megabytes that the whole cohort sends and receives in a round.",
    "MB catch-up": "Catch-up: what clients that skipped rounds must be sent in addition, because "
    "those rounds changed the backbone, or what else they hold.",
    "epsilon": "Epsilon: of differential privacy, over all rounds.",
    "s / round": "Seconds: median over all rounds, without evaluation. Errors and megabytes are "
    "means over rounds and seeds.",
}

_PAIRED_LEGEND = """\
{metric} minus that of {reference} under the same seed, in {unit}: the mean over {seeds} seeds, its
95% t-interval, on how many seeds the method is {better}, and the p-value of a two-sided paired
t-test, corrected by Holm for the {methods} comparisons of this table; an interval holds for its
method alone, and there is none (-) where all seeds have the same difference. A seed sets the split
over clients, the first adapters, the cohorts and the batches: intervals say what another seed could
change. They do not say what another data set, backbone or learning rate could, nor other test
examples: all runs share the same {test_examples}."""


class Study(NamedTuple):
    """What a report says besides the metrics.

    Attributes:
      command: What was run, for the record.
      clients: What they have, under the first seed.
      test_examples: Their number.
      learning_rates: That of each method.
      metric: The headline.
      untouched: What the metrics are of the model before any training; None where it has a new
        head, which says nothing before it is trained.
      steps: The server's step size of each method that has another than 1.
      diverged: Methods that are left out because training diverged, and where it did.
      failed: Other methods that are left out, and why, run by run.
    """

    command: str
    clients: Overview
    test_examples: int
    learning_rates: Mapping[str, float]
    metric: Metric
    untouched: Mapping[str, Any] | None = None
    steps: Mapping[str, float] = MappingProxyType({})
    diverged: Mapping[str, str] = MappingProxyType({})
    failed: Sequence[tuple[str, str]] = ()


def left_out(diverged: Mapping[str, str], failed: Sequence[tuple[str, str]]) -> str:
    """Says which methods diverged, and of which runs failed otherwise, a line each."""
    lines = []
    if diverged:
        lines.append(f"training diverged for {', '.join(diverged)}")
        lines += [f"{method}: {why}" for method, why in diverged.items()]
    if failed:
        lines.append(f"runs failed for {', '.join(dict(failed))}")
        lines += [f"{method}: {why}" for method, why in failed]
    return "\n".join(lines)


def table(
    runs: Runs,
    learning_rates: Mapping[str, float],
    metric: Metric,
    untouched: Mapping[str, Any] | None = None,
    steps: Mapping[str, float] = MappingProxyType({}),
) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the comparison, as `legend` explains them.

    Columns in which no run has anything to say are left out, and learning rates and server steps
    if all are equal.
    """
    rows = [
        _row(method, seeds, (learning_rates[method], steps.get(method, 1.0)), metric)
        for method, seeds in runs.items()
    ]
    personal = f"personal_{metric.name}"
    silent: dict[str | _Domain, bool] = {
        "learning rate": len(set(learning_rates[method] for method in runs)) == 1,
        "server step": len({row["server step"] for row in rows}) == 1,
        _personal(metric): not _any(runs, personal, lambda x: x is not None),
        "MB catch-up": not _any(runs, "megabytes_catch_up", bool),
        "epsilon": not _any(runs, "epsilon", lambda x: x is not None),
    }
    columns = [column for column in rows[0] if not silent.get(column)]
    if untouched is not None:
        rows.insert(0, {"method": "untouched model", **_judged([untouched], metric)})
    head = [column.name if isinstance(column, _Domain) else column for column in columns]
    return head, [[row.get(column, "-") for column in columns] for row in rows]


class _Domain(NamedTuple):
    """The column of a domain, which may have the name of another column."""

    name: str


def _row(
    method: str, seeds: Sequence[Rounds], tuned: tuple[float, float], metric: Metric
) -> dict[str | _Domain, str]:
    """The columns of a method, `tuned` being its learning rate and its server's step size."""
    everything = [row for rounds in seeds for row in rounds]
    # Files of older versions lack the fields that are asked for with `get`.
    epsilons = [x for rounds in seeds if (x := rounds[-1].get("epsilon")) is not None]
    catch_up = [row.get("megabytes_catch_up", 0.0) for row in everything]
    errors = [r["aggregation_error"] for r in everything if r["aggregation_error"] is not None]
    return {
        "method": method,
        "learning rate": f"{tuned[0]:g}",
        "server step": f"{tuned[1]:g}",
        **_judged([rounds[-1] for rounds in seeds], metric),
        "agg. error": f"{_mean(errors):.4f}" if errors else "-",
        "MB up": f"{_mean(row['megabytes_up'] for row in everything):.2f}",
        "MB down": f"{_mean(row['megabytes_down'] for row in everything):.2f}",
        "MB catch-up": f"{_mean(catch_up):.2f}",
        "epsilon": f"{max(epsilons):.2f}" if epsilons else "-",
        "s / round": f"{np.median([row['seconds'] for row in everything]):.2f}",
    }


def _overall(metric: Metric) -> str:
    """The name of the column of a metric."""
    return f"{metric.words} {metric.unit}".strip()


def _personal(metric: Metric) -> str:
    """The name of the column of the same for each client."""
    return f"personal {metric.unit}".strip()


def _judged(rows: Sequence[Mapping[str, Any]], metric: Metric) -> dict[str | _Domain, str]:
    """The columns of the headline: overall, by domain, and personal, over seeds."""
    domains = [row[f"domain_{metric.name}"] for row in rows]
    return {
        _overall(metric): _shown([row[metric.name] for row in rows], metric),
        **{
            _Domain(domain): _shown([row[domain] for row in domains], metric, mean_alone=True)
            for domain in domains[0]
        },
        _personal(metric): _shown([row.get(f"personal_{metric.name}") for row in rows], metric),
    }


def _shown(values: Sequence[float | None], metric: Metric, mean_alone: bool = False) -> str:
    known = [metric.factor * value for value in values if value is not None]
    if not known:
        return "-"
    return spread([_mean(known)] if mean_alone else known, metric.digits)


def legend(head: Sequence[str], metric: Metric) -> str:
    """What the columns of `table` mean."""
    texts = {
        _overall(metric): f"{metric.sentence}: on test examples after the last round, "
        f"{metric.better} is better, the plain mean over domains, "
        "as mean ± sample standard deviation over seeds; then the mean over seeds for each domain.",
        _personal(metric): "Personal: the mean over clients, each judged on test "
        "examples distributed as its own data, with its own factors if the method keeps them.",
        **_LEGEND,
    }
    return " ".join(texts[column] for column in head if column in texts)


def _any(runs: Runs, field: str, wanted: Any) -> bool:
    return any(wanted(row.get(field)) for seeds in runs.values() for r in seeds for row in r)


def comparable(runs: Runs, metric: Metric) -> Runs:
    """The methods that end with a number under every seed.

    Without one are a loss beyond all numbers and the correlation of a constant.
    """
    return {
        method: seeds
        for method, seeds in runs.items()
        if all(rounds[-1][metric.name] is not None for rounds in seeds)
    }


def reference_of(runs: Runs) -> str | None:
    """The method that others are compared with: fedit, or else the first.

    None if there is nothing to compare: one method, or one seed.
    """
    if len(runs) < 2 or min(len(each) for each in runs.values()) < 2:
        return None
    return "fedit" if "fedit" in runs else next(iter(runs))


def compared(runs: Runs, reference: str, metric: Metric) -> dict[str, paired.Difference]:
    """Final values as they are shown, compared with those of a method under the same seeds."""
    final = {
        method: [metric.factor * rounds[-1][metric.name] for rounds in seeds]
        for method, seeds in runs.items()
    }
    return paired.differences(final, reference)


def render_paired(runs: Runs, reference: str, metric: Metric, style: str = "simple") -> str:
    """The differences from a reference as text."""
    digits = metric.digits + 1
    head = [
        f"minus {reference}",
        metric.difference_unit,
        "95% interval",
        f"{metric.better} on",
        "p (Holm)",
    ]
    rows = [
        [
            method,
            f"{each.mean:+.{digits}f}",
            "-" if np.isnan(each.low) else f"{each.low:+.{digits}f} to {each.high:+.{digits}f}",
            f"{getattr(each, metric.better)} of {each.seeds}",
            each.shown_p,
        ]
        for method, each in compared(runs, reference, metric).items()
    ]
    return aligned(head, rows, style)


def summary(runs: Runs, study: Study) -> str:
    """All tables, for a terminal."""
    numbers = comparable(runs, study.metric)
    reference = reference_of(numbers)
    parts = [render(runs, study)]
    if reference is not None:
        parts.append(render_paired(numbers, reference, study.metric))
    return "\n\n".join(parts)


def render(runs: Runs, study: Study, style: str = "simple") -> str:
    """The table as text; `style` is a table format of the library tabulate."""
    rows = table(runs, study.learning_rates, study.metric, study.untouched, study.steps)
    return aligned(*rows, style)


def step_of(config: ConfigDict) -> float:
    """The server's step size of a configuration, in whichever space."""
    server = config.server
    return server.step if server.optimizer == "none" else server.learning_rate


def finish(
    config: ConfigDict,
    setting: experiment.Setting,
    workdir: Path,
    runs: Runs,
    learning_rates: Mapping[str, float],
    untouched: Mapping[str, Any] | None = None,
    diverged: Mapping[str, str] = MappingProxyType({}),
    failed: Sequence[tuple[str, str]] = (),
    *,
    first: Path,
    steps: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Writes the report of finished runs into `workdir`, and prints its tables.

    Args:
      config: What the methods share.
      setting: From `experiment.prepare`.
      workdir: Where to write.
      runs: The metrics.
      learning_rates: That of each method.
      untouched: The metrics of the model before any training.
      diverged: Methods that are left out because training diverged, and where it did.
      failed: Other methods that are left out, and why, run by run.
      first: The work directory of the first run.
      steps: The server's step size of each method that has another than 1.
    """
    config = config.copy_and_resolve_references()
    config.seed = next(iter(runs.values()))[0][0]["seed"]
    parts = partitions.of_run(config, setting.train, first).parts
    study = Study(
        command(),
        partitions.overview(setting.train, setting.domains, parts),
        len(setting.test["domain"]),
        learning_rates,
        setting.task.metrics[0],
        untouched,
        steps,
        diverged,
        failed,
    )
    path = write(workdir, runs, study)
    print(f"\n{summary(runs, study)}\n\nReport with plots: {path}")


def write(workdir: Path, runs: Runs, study: Study) -> Path:
    """Writes `report.md` and its plots into `workdir`; returns the path of the report.

    It waits while another process writes there.
    """
    metric = study.metric
    numbers = comparable(runs, metric)
    reference = reference_of(numbers)
    drawn = {
        metric.name: plots.over_rounds(runs, metric),
        f"{metric.name}_and_megabytes": plots.over_megabytes(runs, metric),
        "paired": None
        if reference is None
        else plots.differences(compared(numbers, reference, metric), reference, metric),
        "domains": plots.domains(runs, metric),
        "aggregation_error": plots.aggregation_error(runs),
        f"error_and_{metric.name}": plots.error_against(numbers, metric),
        "partition": plots.partition(study.clients),
    }
    seeds = len(next(iter(runs.values())))
    head, _ = table(runs, study.learning_rates, metric, steps=study.steps)
    parts = [
        f"# Comparison over {seeds} seed{'s' * (seeds > 1)}",
        f"```\n{study.command}\n```",
        render(runs, study, "github"),
        legend(head, metric),
    ]
    if study.untouched is not None:
        parts.append("The untouched model is the pretrained one, before any training.")
    if silent := [method for method in runs if method not in numbers]:
        parts.append(
            f"Of {', '.join(silent)} the {metric.words} after the last round is no number under "
            "some seed: nothing is compared with it."
        )
    if study.diverged or study.failed:
        parts.append(f"Left out: {left_out(study.diverged, study.failed)}")
    if reference:
        parts += [
            f"## Against {reference}",
            render_paired(numbers, reference, metric, "github"),
            _PAIRED_LEGEND.format(
                metric=metric.words.capitalize(),
                unit=metric.difference_unit,
                better=metric.better,
                reference=reference,
                seeds=seeds,
                methods=len(numbers) - 1,
                test_examples=f"{study.test_examples:,}",
            ),
        ]
    parts += [
        "## The clients",
        aligned(*clients.table(study.clients), "github"),
        f"Under the first seed. {clients.legend(study.clients)}",
    ]
    with locks.held(workdir, workdir / ".lock", wait=True):
        parts += ["## Plots", plots.save(workdir, drawn)]
        records.write_atomically(workdir / "runs.jsonl", curves(runs, metric))
        records.write_atomically(workdir / "report.md", "\n\n".join(parts) + "\n")
    return workdir / "report.md"


def curves(runs: Runs, metric: Metric) -> str:
    """A line of JSON a run: the headline metric and the aggregation error after each round.

    None where a round was not evaluated. It is what differences under a seed need, of methods that
    have not run yet too.
    """
    lines = [
        {
            "method": name,
            "seed": rows[0]["seed"],
            **{
                field: [
                    None if (x := row.get(field)) is None else float(f"{x:.6g}") for row in rows
                ]
                for field in (metric.name, "aggregation_error")
            },
        }
        for name, seeds in runs.items()
        for rows in seeds
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def aligned(head: list[str], rows: list[list[str]], style: str) -> str:
    """A table with its first column to the left and all others to the right."""
    align = ("left", *["right"] * (len(head) - 1))
    return tabulate(rows, head, tablefmt=style, colalign=align, disable_numparse=True)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± sample standard deviation, or the value itself if there is one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
