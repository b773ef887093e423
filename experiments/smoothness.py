"""How smoothly rounds follow one another, and where a model gets to: a table by method.

    python -m experiments.smoothness --config=configs/digits_regimes.py:regime=fedsmooth_lora \\
        --methods=fedit,fedsmooth_lora --seeds=5 --out=runs/smoothness

Of each method and seed, with W_t the adapted kernels of the server's model after round t:

* the cosine between consecutive changes, W_{t+1} - W_t and W_t - W_{t-1}, over all kernels;
* what clients lose at the first step of each round, before they have learned anything in it, as a
  mean over clients, and over all steps of it;
* how many directions the change of the whole run has: the singular values of W_T - W_0 that hold
  99% of its squares, the mean over kernels.

Kernels are formed and decomposed on the host: it is made for small models. Writes `results.json`
after each run, and `README.md` with the table; given the same command again, it goes on.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments.shared import report, rounds
from experiments.shared.apps import check_asked, command, method_names, progress_bar, run
from fedlora_jax import experiment, locks, lora
from fedlora_jax.experiment import Program, Setting, records
from fedlora_jax.experiment.program import make_method
from fedlora_jax.federated.round import Federation, run_round, train_cohort
from fedlora_jax.methods import Server

Kernels: TypeAlias = dict[str, np.ndarray]
ENERGY = 0.99


def main() -> None:
    """Runs what is missing, and writes the table."""
    config, out = _CONFIG.value, Path(_OUT.value)
    names = method_names(_METHODS.value)
    check_asked(config, names, _SEEDS.value)
    with locks.held(out, out / ".lock"):
        text = page(study(config, out, names, _SEEDS.value))
        head = f"# How smoothly rounds follow one another\n\n```\n{command()}\n```\n\n"
        records.write_atomically(out / "README.md", head + text)
    print(text)


def study(
    config: ConfigDict, out: Path, names: Sequence[str], num_seeds: int
) -> list[dict[str, Any]]:
    """Runs every method under every seed.

    Args:
      config: What all have in common.
      out: Where `results.json` is, or will be.
      names: Methods.
      num_seeds: Seeds 0, 1, ...

    Returns:
      Of each run `method` and `seed`; `cosines`, one fewer than rounds; `first_loss` and `loss`,
      one a round; `directions`.

    Raises:
      ValueError: If a method has no model for all, `out` holds runs of another configuration, or
        as `rounds.check`.
      FloatingPointError: If training diverges; what is in `results.json` stays.
    """
    rounds.check(config)
    configs = {name: _with(config, name) for name in names}
    path, runs = out / "results.json", rounds.read(out / "results.json", config)
    known = {(row["method"], row["seed"]): row for row in runs}
    setting = experiment.prepare(config)
    with progress_bar(len(names) * num_seeds, unit="run") as bar:
        for name, mine in configs.items():
            program = experiment.compile_program(mine, setting)
            make = _compiled(program)
            for seed in range(num_seeds):
                bar.set_description(f"{name}, seed {seed}")
                if (name, seed) not in known:
                    mine.seed = seed
                    found = _followed(mine, setting, program, make)
                    known[name, seed] = {"method": name, "seed": seed, **found}
                    rounds.write(path, config, list(known.values()))
                bar.update()
    return [known[name, seed] for name in names for seed in range(num_seeds)]


def _with(config: ConfigDict, name: str) -> ConfigDict:
    mine = config.copy_and_resolve_references()
    mine.method = name
    experiment.check(mine)
    if not make_method(mine).shared:
        raise ValueError(f"{name} has no model for all whose changes could be compared")
    return mine


def _compiled(program: Program) -> rounds.Make:
    """A round, and what its clients lose at their first and over all steps.

    The first is a step at a rate of zero.
    """

    @functools.cache
    def make(size: int) -> Callable[..., Any]:
        recipe = program.recipe._replace(clients_per_chunk=size)
        begin = recipe._replace(training=recipe.training._replace(steps=1, epochs=0))

        def step(federation: Federation, *given: Any) -> tuple[Federation, tuple[jax.Array, ...]]:
            data, cohort, seed, rate = given
            first = train_cohort(begin, federation, data, cohort, seed, 0.0)
            after, metrics, _ = run_round(recipe, federation, data, cohort, seed, rate)
            return after, (jnp.nanmean(first.loss), jnp.nanmean(metrics.client_loss))

        return jax.jit(step)

    return make


def _followed(
    config: ConfigDict, setting: Setting, program: Program, make: rounds.Make
) -> dict[str, Any]:
    """A run, looked at after each round."""
    state = experiment.first_state(config, setting, program.method)
    begin = last = kernels(state.server)
    change: Kernels | None = None
    cosines, losses = [], []
    for federation, found in rounds.each(config, state, make):
        losses.append([float(x) for x in found])
        if not np.isfinite(losses[-1]).all():
            raise FloatingPointError(
                f"{config.method} diverged under seed {config.seed}, round {len(losses) - 1}: "
                "clients lose no finite number. Try a smaller config.local.learning_rate or "
                "config.local.clip_norm; the runs before it are kept"
            )
        now = kernels(federation.server)
        moved = {path: now[path] - last[path] for path in now}
        if change is not None:
            cosines.append(cosine(change, moved))
        change, last = moved, now
    whole = [directions(last[path] - begin[path]) for path in begin]
    first, every = zip(*losses, strict=True)
    return {
        "cosines": cosines,
        "first_loss": first,
        "loss": every,
        "directions": float(np.mean(whole)),
    }


def kernels(server: Server) -> Kernels:
    """The adapted kernels of the server's model, `[d_in, d_out]`, float64."""
    dense, scale = lora.kernels(server.backbone), np.float64(server.scale)
    found = {}
    for path, (a, b) in server.trainable.adapters.items():
        product = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        found[path] = np.asarray(dense[path], np.float64).reshape(product.shape) + scale * product
    return found


def cosine(one: Kernels, other: Kernels) -> float:
    """Between all entries of two trees; NaN where one is zero."""
    sizes = [np.sqrt(sum(np.sum(x**2) for x in tree.values())) for tree in (one, other)]
    product = sum(np.sum(one[path] * other[path]) for path in one)
    return float(product / np.prod(sizes)) if all(sizes) else float("nan")


def directions(kernel: np.ndarray) -> int:
    """The number of leading singular values that hold 99% of the sum of squares."""
    energy = np.cumsum(np.linalg.svd(kernel, compute_uv=False) ** 2)
    return int(np.searchsorted(energy, ENERGY * energy[-1]) + 1) if energy[-1] else 0


def page(runs: Sequence[dict[str, Any]]) -> str:
    """The table, in Markdown, a line a method, as mean ± sample standard deviation over seeds."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in runs:
        by_method.setdefault(row["method"], []).append(row)
    last = len(runs[0]["loss"])
    shown = sorted({min(index, last) for index in (1, 2, (last + 1) // 2, last)})
    head = ["method", "cosine of consecutive changes"]
    head += [f"first loss, round {index}" for index in shown]
    head += [f"loss, round {index}" for index in shown] + ["directions of the whole change"]

    def line(name: str, seeds: list[dict[str, Any]]) -> list[str]:
        cosines = [float(np.mean(row["cosines"])) for row in seeds] if last > 1 else []
        return [
            name,
            report.spread(cosines, 3) if cosines else "-",
            *(report.spread([row["first_loss"][i - 1] for row in seeds], 2) for i in shown),
            *(report.spread([row["loss"][i - 1] for row in seeds], 2) for i in shown),
            report.spread([row["directions"] for row in seeds], 1),
        ]

    rows = [line(name, seeds) for name, seeds in by_method.items()]
    return report.aligned(head, rows, "github") + "\n"


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
    _OUT = flags.DEFINE_string("out", None, "Directory for the results.", required=True)
    _METHODS = flags.DEFINE_list(
        "methods", ["fedit"], "Methods, or all; a method that --config names must be among them."
    )
    _SEEDS = flags.DEFINE_integer(
        "seeds",
        2,
        "Number of seeds: 0, 1, ...; a --config.seed must be one of them.",
        lower_bound=1,
    )
    flags.mark_flag_as_required("config")
    run(main)
