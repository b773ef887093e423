"""How time grows with the number of clients and the rank."""

import functools
from typing import Any

import jax
import numpy as np
from tabulate import tabulate

from experiments.benchmarks.aggregation import adapters, bind, timed


def measure(repeats: int) -> dict[str, Any]:
    """Seconds on one kernel 2048 x 2048 over K at r = 8, and over r at K = 4."""
    shape = {"kernel": (2048, 2048)}
    rows = ["fedit", "lora_fair closed form", "flora_na", "flora", "flexlora"]
    axes = {
        "K": [(2**i, 8) for i in range(1, 9)],
        "r": [(4, 2**i) for i in range(2, 8)],
    }
    result: dict[str, Any] = {"kernel": [2048, 2048], "fixed": {"K": "r = 8", "r": "K = 4"}}
    for axis, points in axes.items():
        result[axis] = {"at": [point[axis == "r"] for point in points]}
        for row in rows:
            seconds = []
            for count, rank in points:
                stacked = adapters(0, count, rank, shape)
                call = bind(row, count, rank, shape)
                jax.block_until_ready(call(stacked))
                seconds.append(min(timed(functools.partial(call, stacked), repeats)))
            half = len(points) // 2
            slope = np.polyfit(np.log(result[axis]["at"][half:]), np.log(seconds[half:]), 1)[0]
            result[axis][row] = {"seconds": seconds, "exponent": round(float(slope), 2)}
    return result


def draw(results: dict[str, Any]) -> Any:
    """Time by clients and by rank, with exponents."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    growth = results["growth"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, panel in zip(("K", "r"), panels, strict=True):
        at = growth[axis]["at"]
        for row, line in growth[axis].items():
            if row != "at":
                label = f"{row}: {axis}^{line['exponent']:.2g}"
                panel.loglog(at, [1e3 * s for s in line["seconds"]], marker="o", label=label)
        panel.set(xlabel=f"{axis} ({growth['fixed'][axis]})", xticks=at, xticklabels=at)
        panel.minorticks_off()
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms, one kernel 2048 x 2048")
    figure.tight_layout()
    return figure


def page(results: dict[str, Any]) -> str:
    """The exponents, as a table."""
    facts, growth = results["environment"], results["growth"]
    table = [
        [row, *(growth[axis][row]["exponent"] for axis in "Kr")]
        for row in growth["K"]
        if row != "at"
    ]
    headers = ["function", "exponent in K", "exponent in r"]
    return f"""# Growth with clients and rank

{tabulate(table, headers, tablefmt="github")}

Exponents are fitted to the upper half of the points, of each the best of {facts["repeats"]} calls.
{facts["date"]}, {facts["device"]}, {facts["cores"]} cores, jax {facts["versions"]["jax"]}, load
average {facts["load_average_at_start"]} when it began."""
