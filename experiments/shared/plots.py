"""Plots of finished runs. Every function returns a figure with its caption."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.shared import paired
from fedlora_jax.data import partition as data_partition
from fedlora_jax.experiment.partitions import Overview
from fedlora_jax.federated.metrics import Metric

Rounds: TypeAlias = list[dict[str, Any]]
Runs: TypeAlias = Mapping[str, Sequence[Rounds]]  # method -> one list of rounds a seed

# With more methods than this, bands would cover the lines, and bars would be too thin.
_FEW = 6
# Errors below are those of float32 arithmetic: the method is exact.
_EXACT = 1e-4


class Plot(NamedTuple):
    """A figure, and the sentence below it."""

    figure: Figure
    caption: str


def save(workdir: Path, plots: Mapping[str, Plot | None]) -> str:
    """Writes each plot as `workdir/NAME.png`; returns the Markdown that shows them."""
    shown = []
    for name, plot in plots.items():
        if plot is not None:
            plot.figure.savefig(workdir / f"{name}.png", dpi=120)
            shown.append(f"![{plot.caption}]({name}.png)\n\n*{plot.caption}.*")
    return "\n\n".join(shown)


def styles(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour, line style and marker of each method; all different up to forty."""
    return {
        name: {
            "color": f"C{index % 10}",
            "linestyle": ("-", "--", ":", "-.")[index // 10 % 4],
            "marker": ("o", "s", "^", "D")[index // 10 % 4],
        }
        for index, name in enumerate(names)
    }


def over_rounds(runs: Runs, metric: Metric) -> Plot:
    """A metric over rounds."""
    figure, axes = _figure()
    banded = _over_rounds(axes, runs, metric.name, metric.factor)
    axes.set(ylabel=metric.title)
    return Plot(figure, f"{metric.sentence} over rounds, mean over domains{banded}")


def over_megabytes(runs: Runs, metric: Metric) -> Plot | None:
    """A metric over what has been sent so far, on a logarithmic scale; None if nothing is sent."""
    sent = {
        method: np.array([[_sent(row) for row in rounds] for rounds in seeds]).cumsum(1).mean(0)
        for method, seeds in runs.items()
    }
    sent = {method: megabytes for method, megabytes in sent.items() if megabytes[0] > 0}
    if not sent:
        return None
    figure, axes = _figure()
    looks = styles(list(runs))
    for method, megabytes in sent.items():
        known, values = _known(runs[method], metric.name)
        look = {**looks[method], "ms": 3}
        mean = values.mean(0) * metric.factor
        axes.plot(megabytes[known], mean, **look, lw=1.5, label=method)
    axes.set(xlabel="MB up, down and to catch up, whole cohort, so far", xscale="log")
    axes.set(ylabel=metric.title)
    axes.grid(alpha=0.3)
    _legend_outside(axes)
    return Plot(
        figure, f"{metric.sentence} over megabytes, a mark for each evaluation, mean over domains"
    )


def _known(seeds: Sequence[Rounds], field: str) -> tuple[np.ndarray, np.ndarray]:
    """The rounds that have a field under all seeds, `[R]`, and its values there, `[seeds, R]`.

    Not every round need be evaluated.
    """
    known = [i for i, rows in enumerate(zip(*seeds)) if all(field in row for row in rows)]
    values = [[rounds[i][field] for i in known] for rounds in seeds]
    return np.array(known, int), np.array(values, float)


def _sent(row: Mapping[str, Any]) -> float:
    """Megabytes of a round, in all directions."""
    fields = ("megabytes_up", "megabytes_down", "megabytes_catch_up")
    return float(sum(row.get(field) or 0.0 for field in fields))


def aggregation_error(runs: Runs) -> Plot | None:
    """Aggregation error over rounds; None if no method has one."""
    having = {
        method: seeds
        for method, seeds in runs.items()
        if any(row["aggregation_error"] is not None for rounds in seeds for row in rounds)
    }
    if not having:
        return None
    figure, axes = _figure()
    banded = _over_rounds(axes, having, "aggregation_error", 1, styles(list(runs)))
    axes.set(ylabel="relative error")
    return Plot(
        figure,
        "Relative distance of the server's update from the mean of the clients' updates" + banded,
    )


def domains(runs: Runs, metric: Metric) -> Plot:
    """A metric by domain after the last round: bars for few methods, a heat map for many.

    Bars show differences only against the range that a metric has.
    """
    field = f"domain_{metric.name}"
    names = list(next(iter(runs.values()))[0][-1][field])
    # [methods, seeds, domains], as shown
    values = metric.factor * np.array(
        [[[rounds[-1][field][d] for d in names] for rounds in s] for s in runs.values()], float
    )
    if len(runs) <= _FEW and metric.bounds is not None:
        return _domain_bars(list(runs), names, values, metric)
    return _domain_map(list(runs), names, values.mean(1), metric)


def differences(found: Mapping[str, paired.Difference], reference: str, metric: Metric) -> Plot:
    """Differences from a reference with their intervals, sorted, the best on top."""
    figure, axes = _figure(1.2 + 0.28 * len(found))
    sign = 1 if metric.higher_is_better else -1
    ordered = sorted(found.items(), key=lambda item: sign * item[1].mean)
    for y, (_, each) in enumerate(ordered):
        axes.plot([each.low, each.high], [y, y], color="C0", lw=1.5)
        axes.plot(each.mean, y, "o", color="C0", ms=5)
    axes.axvline(0, color="k", lw=1, ls=":")
    axes.set_yticks(range(len(ordered)), [method for method, _ in ordered])
    axes.set(
        ylim=(-0.6, len(ordered) - 0.4),
        xlabel=f"{metric.words} minus that of {reference} ({metric.difference_unit}), "
        f"{metric.better} is better",
    )
    axes.grid(alpha=0.3, axis="x")
    return Plot(
        figure,
        f"{metric.sentence} after the last round minus that of {reference}, paired over seeds: "
        "mean and 95% t-interval",
    )


def error_against(runs: Runs, metric: Metric) -> Plot | None:
    """Aggregation error against a metric; None unless three methods at least have an error.

    A method that trains on pooled data has one client in a round, and no error to speak of.
    """
    aggregating = {
        method: seeds
        for method, seeds in runs.items()
        if len(seeds[0][0]["cohort"]) > 1 and all(_errors(rounds) for rounds in seeds)
    }
    if len(aggregating) < 3:
        return None
    figure, axes = _figure()
    looks = styles(list(runs))
    errors = np.array([[np.mean(_errors(r)) for r in seeds] for seeds in aggregating.values()])
    errors = np.where(errors < _EXACT, 0, errors)
    last = [[rounds[-1][metric.name] for rounds in seeds] for seeds in aggregating.values()]
    final = metric.factor * np.array(last)
    for method, x, y in zip(aggregating, errors, final, strict=True):
        look = {**looks[method], "linestyle": ""}
        axes.plot(x, y, **look, ms=5, alpha=0.8, label=method)
    axes.set(xlabel="aggregation error, mean over rounds", ylabel=metric.title)
    axes.grid(alpha=0.3)
    _legend_outside(axes)
    correlations = paired.rank_correlations(errors, final)
    return Plot(
        figure,
        f"Aggregation error against {metric.words} after the last round, a point for each method "
        f"and seed. {_said(correlations, len(aggregating))}",
    )


def learning_rates(
    found: Mapping[str, Mapping[float, Sequence[float] | None]], metric: Metric, rounds: int
) -> Plot:
    """A metric after so many rounds against the learning rate, a line a method.

    None marks a rate that failed.
    """
    figure, axes = _figure()
    for method, look in styles(list(found)).items():
        means = {rate: np.mean(x) for rate, x in found[method].items() if x is not None}
        points = [metric.factor * mean for mean in means.values()]
        axes.plot(list(means), points, **look, ms=4, lw=1.3, label=method)
    rates = list(next(iter(found.values())))
    axes.set(xlabel="learning rate", ylabel=f"validation {metric.title}", xscale="log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    _legend_outside(axes)
    return Plot(
        figure,
        f"{metric.sentence} on the validation split after {rounds} round{'s' * (rounds > 1)} "
        "against the learning rate, mean over seeds, at the best server step for each rate; a rate "
        "at which training diverged has no point",
    )


def partition(clients: Overview) -> Plot:
    """What each client has: how many examples, of which labels, and how far from all data."""
    numbers = np.arange(len(clients.counts))
    by_kind, whole = clients.by_kind, clients.whole_by_kind
    labelled, several = clients.kind == "label", len(whole) > 1
    heights = [1.4, 3.2] * labelled + [1.4] * (not labelled) + [1.0, 1.0] * several
    figure = Figure(figsize=(9, 1 + sum(heights)), layout="constrained")
    panels = iter(
        figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    )
    _sizes(axes := next(panels), clients)
    if labelled:
        _shares(axes := next(panels), by_kind)
    if several:
        entropy = data_partition.entropy(by_kind)
        _bars(axes := next(panels), entropy, f"{clients.kind} entropy\nnats")
        axes.axhline(data_partition.entropy(whole), color="k", lw=1, ls=":")
        axes.set_ylim(0, np.log(len(whole)))
        _bars(axes := next(panels), data_partition.distance(by_kind, whole), "distance\nto all")
        axes.set_ylim(0, 1)
    axes.set(xlabel="client", xlim=(-0.6, len(numbers) - 0.4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    parts = ["the number of training examples", "the share of each label"][: 1 + labelled]
    if several:
        parts += [
            f"the entropy of its {clients.kind}s (dotted: of all data)",
            f"the total variation distance of its {clients.kind}s from those of all data",
        ]
    return Plot(figure, f"Of each client, first seed: {', '.join(parts)}")


def _sizes(axes: Any, clients: Overview) -> None:
    """The number of examples of each client, by domain."""
    by_domain = clients.counts.sum(2)
    below = np.zeros(len(by_domain), int)
    for index, domain in enumerate(clients.domains):
        axes.bar(
            range(len(by_domain)),
            by_domain[:, index],
            bottom=below,
            color=f"C{index % 10}",
            label=_plain(domain),
        )
        below += by_domain[:, index]
    axes.set_ylabel("examples")
    axes.spines[["top", "right"]].set_visible(False)
    if len(clients.domains) > 1:
        axes.legend(
            frameon=False,
            fontsize=9,
            ncols=6,
            loc="lower center",
            bbox_to_anchor=(0.5, 1),
            handlelength=1,
        )


def _shares(axes: Any, by_label: np.ndarray) -> None:
    """The share of each label in each client's examples."""
    shares = (by_label / by_label.sum(1, keepdims=True)).T
    look: dict[str, Any] = {"cmap": "Greys", "interpolation": "nearest"}
    image = axes.imshow(shares, aspect="auto", origin="lower", vmin=0, **look)
    axes.set_ylabel("label")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=11, integer=True, min_n_ticks=1))
    axes.spines[:].set_visible(False)
    axes.figure.colorbar(image, ax=axes, label="share", pad=0.01)


def _bars(axes: Any, values: np.ndarray, name: str) -> None:
    axes.bar(range(len(values)), values, color="0.4")
    axes.set_ylabel(name)
    axes.spines[["top", "right"]].set_visible(False)


def _figure(height: float = 4.8) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots()


def _plain(name: str) -> str:
    """A name of somebody's data, in which a dollar begins no formula."""
    return name.replace("$", r"\$")


def _legend_outside(axes: Any) -> None:
    """The methods beside the axes, in the order in which their lines end."""
    handles, labels = axes.get_legend_handles_labels()
    ends = [line.get_ydata()[-1:].sum() for line in handles]
    order = np.argsort(-np.nan_to_num(ends, nan=-np.inf), kind="stable")
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        frameon=False,
        fontsize=9,
        handlelength=3,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )


def _over_rounds(
    axes: Any,
    runs: Runs,
    field: str,
    factor: float,
    looks: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """Draws a line a method; returns what is to be said of the bands around them."""
    looks = looks or styles(list(runs))
    banded = len(runs) <= _FEW and len(next(iter(runs.values()))) > 1
    for method, seeds in runs.items():
        known, values = _known(seeds, field)
        x, values = known + 1, values * factor
        mean = values.mean(0)
        look = {**looks[method], "marker": ""}
        axes.plot(x, mean, **look, lw=1.5, label=method)
        if banded:
            spread = values.std(0, ddof=1)
            axes.fill_between(
                x, mean - spread, mean + spread, color=look["color"], alpha=0.15, lw=0
            )
    axes.set(xlabel="round")
    axes.grid(alpha=0.3)
    _legend_outside(axes)
    return "; the band is one standard deviation over seeds" if banded else ""


def _domain_bars(methods: list[str], names: list[str], values: np.ndarray, metric: Metric) -> Plot:
    figure, axes = _figure()
    width = 0.8 / len(methods)
    several = values.shape[1] > 1
    for index, (method, look) in enumerate(styles(methods).items()):
        x = np.arange(len(names)) + (index - (len(methods) - 1) / 2) * width
        spread = values[index].std(0, ddof=1) if several else None
        axes.bar(
            x,
            values[index].mean(0),
            width,
            yerr=spread,
            color=look["color"],
            label=method,
            error_kw={"lw": 1},
        )
    axes.set_xticks(range(len(names)), map(_plain, names))
    axes.set(ylabel=metric.title)
    if metric.bounds is not None:
        axes.set(ylim=tuple(metric.factor * bound for bound in metric.bounds))
    axes.grid(alpha=0.3, axis="y")
    axes.legend(frameon=False, ncols=len(methods), loc="upper center", bbox_to_anchor=(0.5, 1.12))
    bars = "; bars are one standard deviation over seeds" if several else ""
    return Plot(figure, f"{metric.sentence} after the last round, by domain{bars}")


def _domain_map(methods: list[str], names: list[str], values: np.ndarray, metric: Metric) -> Plot:
    values = np.column_stack([values.mean(1), values])
    sign = -1 if metric.higher_is_better else 1
    order = np.argsort(sign * values[:, 0], kind="stable")
    values = values[order]
    figure, axes = _figure(1 + 0.3 * len(methods))
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        color = "black" if value > middle else "white"
        axes.text(
            column,
            row,
            f"{value:.{metric.digits}f}",
            ha="center",
            va="center",
            color=color,
            fontsize=9,
        )
    axes.axvline(0.5, color="white", lw=3)
    axes.set_xticks(range(len(names) + 1), ["mean", *map(_plain, names)])
    axes.set_yticks(range(len(methods)), [methods[i] for i in order])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label=metric.title)
    return Plot(
        figure,
        f"{metric.sentence} after the last round, by domain, mean over seeds; methods sorted by "
        "their mean over domains, the best on top",
    )


def _errors(rounds: Rounds) -> list[float]:
    return [r["aggregation_error"] for r in rounds if r["aggregation_error"] is not None]


def _said(correlations: list[float], methods: int) -> str:
    if not correlations:
        return "All errors are equal, so there is no rank correlation"
    over = f"over the {methods} methods that aggregate"
    if len(correlations) == 1:
        return f"Spearman's rank correlation {over}: {correlations[0]:+.2f}"
    return (
        f"Spearman's rank correlation {over}, within each seed: mean "
        f"{np.mean(correlations):+.2f}, from {min(correlations):+.2f} to {max(correlations):+.2f}"
    )
