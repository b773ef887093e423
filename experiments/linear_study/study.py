"""What is run in the study of `experiments.linear`, in which order, and what is left out."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from experiments.linear_study import problem, report, results
from experiments.linear_study.program import (
    Dials,
    Run,
    check,
    compiled_for,
    has_step,
    make_method,
    make_runner,
    message_bytes,
)
from experiments.linear_study.results import Key, Results
from experiments.shared.apps import command, progress_bar
from fedlora_jax import bounds, locks, methods
from fedlora_jax.names import lookup

# At their defaults they do what fedex_lora and flexlora do.
_REPEATING = ("oracle", "spectral")


def method_names(config: ConfigDict, wanted: Sequence[str]) -> list[str]:
    """The methods that a flag names, each once.

    Raises:
      ValueError: On one that is unknown, with the nearest name, or has no model for all.
    """
    known = {
        name: make_method(config, name) for name in (*sorted(methods.REGISTRY), *config.variants)
    }
    common = [name for name, method in known.items() if method.shared and name not in _REPEATING]
    names = [name for each in wanted for name in (common if each == "all" else [each])]
    if not names:
        raise ValueError("--methods names none")
    for name in names:
        if not lookup(known, name, "method").shared:
            raise ValueError(
                f"{name} has no model for all, whose distance from the optimum is asked"
            )
    return list(dict.fromkeys(names))


def settings_of(config: ConfigDict) -> list[Dials]:
    """The base setting, then those with one dial turned, each once."""
    base = Dials(**config.base)
    turned = [
        base._replace(**{dial: value})
        for dial in Dials._fields
        for value in config.dials.get(dial, ())
    ]
    return list(dict.fromkeys([base, *turned]))


def points_of(config: ConfigDict, name: str) -> list[Run]:
    """The grid of a method, under no seed yet (-1)."""
    steps = config.server_steps if has_step(make_method(config, name)) else [None]
    return [Run(*point, seed=-1) for point in itertools.product(config.learning_rates, steps)]


def run_study(config: ConfigDict, workdir: Path, names: Sequence[str]) -> Path:
    """Runs methods in all settings, and writes the report.

    Args:
      config: As `configs/linear.py` has it.
      workdir: Where to write.
      names: From `method_names`.

    Returns:
      The path of the report.

    Raises:
      ValueError: If the configuration makes no sense, or is not that of the runs in `workdir`.
      Damaged: If a line of `runs.jsonl` is not what was written.
    """
    bounds.check_config(config.to_dict())
    settings, seeds = settings_of(config), list(range(config.seeds))
    tuning = (*config.tuning_seeds, *config.confirming_seeds)
    if len({*seeds, *tuning}) < len(seeds) + len(tuning):
        raise ValueError(
            f"config.tuning_seeds and config.confirming_seeds, {tuning}, repeat themselves or have "
            f"some of the seeds 0 to {config.seeds - 1} that methods are judged under"
        )
    for name in names:
        check(config, name, settings)
    with locks.held(workdir, workdir / ".lock"):
        results.check_config(workdir, config)
        found = results.read(workdir)
        rows = _run_all(config, workdir, names, settings, found)
        sizes = {name: message_bytes(config, name, settings[0]) for name in names}
        floors = {dials: _floor(config, dials) for dials in settings}
        made = report.Study(command(), settings, rows, sizes, config.dials.to_dict(), floors)
        path = report.write(workdir, made)
    print(f"\n{report.render(made, settings[0])}\n\nReport with plots: {path}")
    return path


def _floor(config: ConfigDict, dials: Dials) -> float:
    """The least error that a change of the adapters' rank can have."""
    least = []
    for seed in range(config.seeds):
        drawn = problem.draw(
            seed,
            clients=dials.clients,
            heterogeneity=dials.heterogeneity,
            **config.problem,
        )
        least.append(problem.best_of_rank(drawn, dials.rank))
    return results.geometric_mean(least)


def _run_all(
    config: ConfigDict,
    workdir: Path,
    names: Sequence[str],
    settings: Sequence[Dials],
    found: Results,
) -> list[report.Row]:
    """Runs what is missing in `found`, and says what came of each method in each setting."""
    runner, seeds, rows = make_runner(config), list(range(config.seeds)), []
    # Settings that share a program come together, those that share the base's first.
    shapes = dict.fromkeys(map(compiled_for, settings))
    together = [[x for x in settings if compiled_for(x) == shape] for shape in shapes]
    jobs = [(name, dials) for group in together for name in names for dials in group]
    grids = {name: points_of(config, name) for name in names}
    later = config.finalists * len(config.confirming_seeds) + len(seeds)
    total = sum(len(grid) * len(config.tuning_seeds) + later for grid in grids.values())
    # Fewer if training diverges everywhere, and more if it does so under a confirming seed.
    with progress_bar(total * len(settings), unit="run") as bar:

        def finish(name: str, dials: Dials, runs: Sequence[Run]) -> None:
            missing = [each for each in runs if Key(name, dials, each) not in found]
            bar.update(len(runs) - len(missing))
            for first in range(0, len(missing), config.runs_at_once):
                batch = missing[first : first + config.runs_at_once]
                outcomes = map(results.rounded, runner(name, dials, batch))
                new = {Key(name, dials, k): v for k, v in zip(batch, outcomes, strict=True)}
                results.append(workdir, new)
                found.update(new)
                bar.update(len(batch))

        for name, dials in jobs:
            said = f"{name}, {report.title(dials, settings[0])}"
            bar.set_description(said)
            best = _tuned(config, found, name, dials, grids[name], finish)
            final = [] if best is None else under([best], seeds)
            finish(name, dials, final)
            outcomes = [found[Key(name, dials, each)] for each in final]
            point = None if best is None else results.chosen(best, grids[name])
            rows.append(report.Row(name, dials, point, outcomes))
            if bar.disable:
                print(f"{said}: {report.error_of(rows[-1])}", flush=True)
    return rows


def _tuned(
    config: ConfigDict,
    found: Results,
    name: str,
    dials: Dials,
    grid: Sequence[Run],
    finish: Callable[[str, Dials, Sequence[Run]], None],
) -> Run | None:
    """The best point of the grid; None if training diverged at every one.

    All points are run under the tuning seeds, and the best of them, `config.finalists`, under the
    confirming seeds too: a point that does well under two seeds may diverge under a third. The next
    best then takes its place.
    """
    finish(name, dials, under(grid, config.tuning_seeds))
    order = results.ranked(found, name, dials, grid, config.tuning_seeds)
    everyone = (*config.tuning_seeds, *config.confirming_seeds)
    tried = 0
    while True:
        sound = results.ranked(found, name, dials, order[:tried], everyone)
        left = min(config.finalists - len(sound), len(order) - tried)
        if not left:
            return sound[0] if sound else None
        finish(name, dials, under(order[tried : tried + left], config.confirming_seeds))
        tried += left


def under(points: Sequence[Run], seeds: Sequence[int]) -> list[Run]:
    """Points of a grid, each under every one of the seeds."""
    return [point._replace(seed=seed) for point in points for seed in seeds]
