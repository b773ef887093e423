"""Tables and plots from the metrics of finished runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from tabulate import tabulate

from fedlora_jax.federated import records

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Rounds: TypeAlias = list[dict[str, Any]]
Runs: TypeAlias = Mapping[str, Sequence[Rounds]]  # method -> one list of rounds a seed

_CAPTIONS = {
    "accuracy.png": "Accuracy over rounds, mean over domains; the band is one standard deviation "
    "over seeds",
    "domains.png": "Accuracy after the last round, per domain; bars are one standard deviation "
    "over seeds",
    "aggregation_error.png": "Relative distance of the server's update from the mean of the "
    "clients' updates",
    "partition.png": "Training examples by client and label, clients grouped by domain, first seed",
}

_LEGEND = """\
Accuracy: test accuracy in percent after the last round, the plain mean over domains, as mean ±
sample standard deviation over seeds; then the mean over seeds for each domain. Agg. error: relative
Frobenius distance of the server's update from the mean of the clients' updates, mean over rounds
and seeds. MB: megabytes that the whole cohort sends and receives in a round. Seconds: median over
all rounds, without evaluation."""


def table(runs: Runs) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the comparison, as `_LEGEND` explains them."""
    domains = list(next(iter(runs.values()))[0][-1]["domain_accuracy"])
    head = ["method", "accuracy %", *domains, "agg. error", "MB up", "MB down", "s / round"]
    rows = []
    for method, seeds in runs.items():
        last = [rounds[-1] for rounds in seeds]
        everything = [row for rounds in seeds for row in rounds]
        errors = [r["aggregation_error"] for r in everything if r["aggregation_error"] is not None]
        rows.append(
            [
                method,
                _spread([100 * row["accuracy"] for row in last]),
                *(f"{100 * _mean(row['domain_accuracy'][d] for row in last):.1f}" for d in domains),
                f"{_mean(errors):.4f}" if errors else "-",
                f"{last[0]['megabytes_up']:.2f}",
                f"{last[0]['megabytes_down']:.2f}",
                f"{np.median([row['seconds'] for row in everything]):.2f}",
            ]
        )
    return head, rows


def render(runs: Runs, style: str = "simple") -> str:
    """The table as text; `style` is a table format of the library tabulate."""
    head, rows = table(runs)
    align = ("left", *["right"] * (len(head) - 1))
    return tabulate(rows, head, tablefmt=style, colalign=align, disable_numparse=True)


def write(
    workdir: Path, runs: Runs, partition: np.ndarray, domains: Sequence[str], command: str
) -> Path:
    """Writes `report.md` and its plots.

    Args:
      workdir: Where to write.
      runs: Metrics by method and seed.
      partition: The number of examples of each client, domain and label, `[N, D, L]`.
      domains: Names of the domains.
      command: What was run, for the record.

    Returns:
      The path of the report.
    """
    plots = {
        "accuracy.png": lambda axes: _over_rounds(axes, runs, "accuracy", 100, "accuracy (%)"),
        "domains.png": lambda axes: _by_domain(axes, runs),
        "aggregation_error.png": lambda axes: _over_rounds(
            axes, runs, "aggregation_error", 1, "relative error"
        ),
        "partition.png": lambda axes: _partition(axes, partition, domains),
    }
    for name, draw in plots.items():
        figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
        draw(axes)
        figure.savefig(workdir / name, dpi=120)
        plt.close(figure)
    seeds = len(next(iter(runs.values())))
    figures = "\n\n".join(
        f"![{caption}]({name})\n\n*{caption}.*" for name, caption in _CAPTIONS.items()
    )
    records.write_atomically(
        workdir / "report.md",
        f"# Comparison over {seeds} seed{'s' * (seeds > 1)}\n\n"
        f"```\n{command}\n```\n\n{render(runs, 'github')}\n\n{_LEGEND}\n\n{figures}\n",
    )
    return workdir / "report.md"


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def _over_rounds(axes: Any, runs: Runs, field: str, factor: float, label: str) -> None:
    for index, (method, seeds) in enumerate(runs.items()):
        values = np.array([[row[field] for row in rounds] for rounds in seeds], float) * factor
        if np.isnan(values).all():
            continue
        x, mean, spread = np.arange(1, values.shape[1] + 1), values.mean(0), values.std(0)
        axes.plot(x, mean, color=f"C{index}", label=method)
        axes.fill_between(x, mean - spread, mean + spread, color=f"C{index}", alpha=0.15, lw=0)
    axes.set(xlabel="round", ylabel=label)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)


def _by_domain(axes: Any, runs: Runs) -> None:
    domains = list(next(iter(runs.values()))[0][-1]["domain_accuracy"])
    width = 0.8 / len(runs)
    for index, (method, seeds) in enumerate(runs.items()):
        last = [[100 * rounds[-1]["domain_accuracy"][d] for d in domains] for rounds in seeds]
        x = np.arange(len(domains)) + (index - (len(runs) - 1) / 2) * width
        axes.bar(x, np.mean(last, 0), width, yerr=np.std(last, 0), label=method, error_kw={"lw": 1})
    axes.set_xticks(range(len(domains)), domains)
    axes.set(ylabel="accuracy (%)", ylim=(0, 100))
    axes.grid(alpha=0.3, axis="y")
    axes.legend(frameon=False, ncols=len(runs), loc="upper center", bbox_to_anchor=(0.5, 1.12))


def _partition(axes: Any, counts: np.ndarray, domains: Sequence[str]) -> None:
    by_label = counts.sum(1)  # [N, L]
    home = counts.sum(2).argmax(1)  # [N]
    clients, labels = np.nonzero(by_label)
    sizes = by_label[clients, labels]
    axes.scatter(
        clients, labels, s=260 * sizes / by_label.max(), c=[f"C{d}" for d in home[clients]], lw=0
    )
    for index, domain in enumerate(domains):
        members = np.flatnonzero(home == index)
        if len(members):
            axes.text(members.mean(), by_label.shape[1], domain, ha="center", color=f"C{index}")
    axes.set(
        xlabel="client",
        ylabel="label",
        yticks=range(by_label.shape[1]),
        ylim=(-1, by_label.shape[1] + 1),
    )
    axes.spines[["top", "right"]].set_visible(False)
