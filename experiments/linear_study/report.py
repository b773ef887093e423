"""Tables and plots of the study of `experiments.linear`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.linear_study.program import Dials, Outcome
from experiments.linear_study.results import Chosen, geometric_mean
from experiments.shared import paired, plots
from experiments.shared.report import aligned
from fedlora_jax.experiment import records

REFERENCE = "fedit"
_LEGEND = """\
Error: relative excess loss in percent, (L(W) - L(W*)) / (L(W_0) - L(W*)), after the last round: the
geometric mean over {seeds} seeds with the smallest and the largest; lower is better. Over fedit:
the ratio of the errors under the same seed, geometric mean, with the 95% t-interval of its
logarithm and the p-value of the paired t-test, corrected by Holm for all comparisons of the table.
Rate, step: the clients' learning rate and the server's step, chosen from one grid under other
seeds; `*` marks an end of the grid, beyond which a better one may lie. Agg. error: relative
distance of the server's update from the mean of the clients', mean over rounds and seeds. kB: what
one client sends and receives in a round."""


class Row(NamedTuple):
    """What came of a method in a setting.

    Attributes:
      method: Its name.
      dials: The setting.
      chosen: Its point of the grid; None if training diverged at every one.
      outcomes: Under each seed there; None where training diverged.
    """

    method: str
    dials: Dials
    chosen: Chosen | None
    outcomes: Sequence[Outcome | None]

    @property
    def errors(self) -> list[float] | None:
        """The error under each seed; None if one is missing."""
        known = [outcome.error for outcome in self.outcomes if outcome is not None]
        return known if known and len(known) == len(self.outcomes) else None

    @property
    def aggregation_error(self) -> float | None:
        """Mean over seeds; None if one is missing."""
        known = [outcome.aggregation_error for outcome in self.outcomes if outcome is not None]
        return float(np.mean(known)) if known and len(known) == len(self.outcomes) else None


class Study(NamedTuple):
    """All that a report is made from.

    Attributes:
      command: What was run, for the record.
      settings: The base setting first.
      rows: One for each method and setting.
      sizes: Bytes of one client up and down in a round of each method, in the base setting.
      dials: The values of each dial.
      floors: By setting, the least error of any change of W_0 of the adapters' rank, geometric mean
        over seeds.
    """

    command: str
    settings: Sequence[Dials]
    rows: Sequence[Row]
    sizes: Mapping[str, tuple[float, float]]
    dials: Mapping[str, Sequence[float]]
    floors: Mapping[Dials, float]


def title(dials: Dials, base: Dials) -> str:
    """A setting by what is turned."""
    turned = [
        f"{words(name)} {value:g}"
        for name, value, usual in zip(dials._fields, dials, base, strict=True)
        if value != usual
    ]
    return ", ".join(turned) or "base"


def words(dial: str) -> str:
    """The name of a dial in words."""
    return {"momentum": "server momentum"}.get(dial, dial.replace("_", " "))


def in_setting(study: Study, dials: Dials) -> dict[str, Row]:
    """The rows of a setting by method, the best first, then those without a result."""
    rows = [row for row in study.rows if row.dials == dials]
    return {
        row.method: row
        for row in sorted(
            rows, key=lambda row: np.inf if row.errors is None else geometric_mean(row.errors)
        )
    }


def ratios(rows: Mapping[str, Row]) -> dict[str, paired.Difference]:
    """Natural logarithms of the errors over those of `REFERENCE`, paired over seeds."""
    logs = {name: np.log(row.errors).tolist() for name, row in rows.items() if row.errors}
    if REFERENCE not in logs or len(logs) < 2 or len(logs[REFERENCE]) < 2:
        return {}
    return paired.differences(logs, REFERENCE)


def render(study: Study, dials: Dials, style: str = "simple") -> str:
    """The table of a setting; `style` is a table format of the library tabulate."""
    rows = in_setting(study, dials)
    compared = ratios(rows)
    head = ["method", "error %", "range", f"over {REFERENCE}", "95% interval", "p (Holm)"]
    head += ["rate", "step", "agg. error", "kB up", "kB down"]
    lines = []
    for name, row in rows.items():
        found, chosen = compared.get(name), row.chosen
        versus = ["-"] * 3
        if found is not None:
            mean, low, high = np.exp([found.mean, found.low, found.high])
            interval = "-" if np.isnan(low) else f"{low:.3f} to {high:.3f}"
            versus = [f"{mean:.3f}", interval, found.shown_p]
        steps = ["-"] * 2 if chosen is None else [_marked(chosen, x) for x in ("rate", "step")]
        error = "-" if row.aggregation_error is None else f"{row.aggregation_error:.4f}"
        sizes = [f"{size / 1000:.2f}" for size in study.sizes[name]]
        lines.append([name, error_of(row), _range(row), *versus, *steps, error, *sizes])
    return aligned(head, lines, style)


def render_all(study: Study, style: str = "github") -> str:
    """In how many settings each method is apart from `REFERENCE`, and by how much over all."""
    found: dict[str, list[paired.Difference]] = {}
    for dials in study.settings:
        for name, each in ratios(in_setting(study, dials)).items():
            found.setdefault(name, []).append(each)
    means = {name: float(np.mean([x.mean for x in each])) for name, each in found.items()}
    lines = []
    for name in sorted(means, key=means.__getitem__):
        lower = sum(each.high < 0 for each in found[name])
        higher = sum(each.low > 0 for each in found[name])
        lines.append(
            [name, f"{np.exp(means[name]):.3f}", *map(str, (lower, higher, len(found[name])))]
        )
    return aligned(["method", f"over {REFERENCE}", "better", "worse", "settings"], lines, style)


def error_of(row: Row) -> str:
    """The geometric mean over seeds in percent, or under how many of them training diverged."""
    if row.errors is not None:
        return f"{100 * geometric_mean(row.errors):.3g}"
    lost = sum(outcome is None for outcome in row.outcomes)
    return f"diverged ({lost} of {len(row.outcomes)})" if row.outcomes else "diverged"


def _range(row: Row) -> str:
    if row.errors is None:
        return "-"
    return " to ".join(f"{100 * end(row.errors):.3g}" for end in (min, max))


def _marked(chosen: Chosen, side: str) -> str:
    value = getattr(chosen, side)
    return "-" if value is None else f"{value:g}" + " *" * (side in chosen.edges)


def along(study: Study, dial: str) -> dict[str, dict[float, Row]]:
    """The rows of each method by the value of a dial, the others as in the base setting."""
    base = study.settings[0]
    found: dict[str, dict[float, Row]] = {name: {} for name in in_setting(study, base)}
    for value in sorted({*study.dials.get(dial, ()), getattr(base, dial)}):
        for name, row in in_setting(study, base._replace(**{dial: value})).items():
            found[name][value] = row
    return found


def render_along(study: Study, dial: str, style: str = "github") -> str:
    """The errors by method and value of a dial, with the aggregation error in brackets."""
    lines = along(study, dial)
    values = list(next(iter(lines.values())))

    def cell(row: Row) -> str:
        extra = row.aggregation_error
        return error_of(row) + ("" if extra is None else f" ({extra:.3f})")

    head = [words(dial), *(f"{value:g}" for value in values)]
    shown = [[name, *map(cell, rows.values())] for name, rows in lines.items()]
    least = [f"{100 * floor:.3g}" for floor in _floors(study, dial, values)]
    return aligned(head, [["best of the rank", *least], *shown], style)


def _floors(study: Study, dial: str, values: Sequence[Any]) -> list[float]:
    base = study.settings[0]
    return [study.floors[base._replace(**{dial: value})] for value in values]


def draw(study: Study, dial: str) -> plots.Plot | None:
    """Error and aggregation error against a dial; None if it is not turned."""
    lines = along(study, dial)
    values = list(next(iter(lines.values())))
    if len(values) < 3:
        return None
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, look in plots.styles(sorted(lines)).items():
        errors = {v: geometric_mean(r.errors) for v, r in lines[name].items() if r.errors}
        left.plot(errors.keys(), [100 * x for x in errors.values()], **look, ms=4, label=name)
        found = {v: r.aggregation_error for v, r in lines[name].items()}
        right.plot(found.keys(), [np.nan if x is None else x for x in found.values()], **look, ms=4)
    least = [100 * floor for floor in _floors(study, dial, values)]
    left.plot(values, least, color="k", lw=1, ls=":", label="best of the rank")
    left.set(ylabel="relative excess loss (%)", yscale="log")
    right.set(ylabel="aggregation error")
    for axes in (left, right):
        axes.set(xlabel=words(dial))
        axes.grid(alpha=0.3)
        if min(values) > 0 and max(values) / min(values) > 4:
            axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    return plots.Plot(
        figure,
        "Relative excess loss after the last round, geometric mean over seeds, and aggregation "
        f"error, against {words(dial)}; both steps of each method chosen at each value; dotted: "
        "the least that a change of the adapters' rank can have",
    )


def summary(study: Study) -> dict[str, Any]:
    """The numbers of the report, for other programs."""
    return {
        "command": study.command,
        "bytes_up_down": study.sizes,
        "best_of_rank": {title(x, study.settings[0]): y for x, y in study.floors.items()},
        "rows": [
            {
                "method": row.method,
                "setting": title(row.dials, study.settings[0]),
                "dials": row.dials._asdict(),
                "chosen": row.chosen and row.chosen._asdict(),
                "errors": [outcome and outcome.error for outcome in row.outcomes],
                "aggregation_errors": [x and x.aggregation_error for x in row.outcomes],
            }
            for row in study.rows
        ],
    }


def write(workdir: Path, study: Study) -> Path:
    """Writes `report.md`, `summary.json` and the plots; returns the path of the report."""
    text = json.dumps(summary(study))
    # A line a row.
    text = text.replace('{"method"', '\n{"method"') + "\n"
    records.write_atomically(workdir / "summary.json", text)
    base = study.settings[0]
    turned_to = ", ".join(f"{words(name)} {value:g}" for name, value in base._asdict().items())
    seeds = max(len(row.outcomes) for row in study.rows)
    parts = [
        "# Distance from a known optimum",
        f"```\n{study.command}\n```",
        f"Base setting: {turned_to}. A model that differs from W_0 by rank {base.rank} has an "
        f"error of {100 * study.floors[base]:.3g}% at least.",
        render(study, base, "github"),
        _LEGEND.format(seeds=seeds),
    ]
    for dials in study.settings[1:]:
        if dials.momentum != base.momentum:
            parts += [f"## {title(dials, base).capitalize()}", render(study, dials, "github")]
    for dial in Dials._fields:
        plot = draw(study, dial)
        if plot is not None:
            parts += [
                f"## {words(dial).capitalize()}",
                plots.save(workdir, {dial: plot}),
                render_along(study, dial),
                "Error in percent, geometric mean over seeds; in brackets the aggregation error.",
            ]
    parts += [
        "## All settings",
        render_all(study),
        f"The geometric mean over settings of the ratio to {REFERENCE}; in how many of them the "
        "method is better or worse by its 95% interval (each by itself, not corrected).",
        _edges(study),
    ]
    records.write_atomically(workdir / "report.md", "\n\n".join(parts) + "\n")
    return workdir / "report.md"


def _edges(study: Study) -> str:
    chosen = [row.chosen for row in study.rows if row.chosen is not None]
    counts = [sum(side in each.edges for each in chosen) for side in ("rate", "step")]
    return (
        f"Of {len(chosen)} choices {counts[0]} took a rate, and {counts[1]} a step, at an end of "
        "the grid."
    )
