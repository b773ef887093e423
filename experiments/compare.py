"""Compares methods over the same federation, seeds and cohorts.

    python -m experiments.compare --config=configs/digits.py --workdir=runs/digits \\
        --methods=fedit,lora_fair --seeds=3
    python -m experiments.compare --config=configs/digits.py --workdir=runs/all \\
        --methods=all --seeds=5 --learning_rates=runs/tuned/learning_rates.json

Prints tables; leaves `report.md` with plots in the work directory, and a directory for each
method and seed as `experiments.train` does. A method that diverges under a seed is given up, and
one of which a run fails otherwise is left out: the report says so, and has the others. Run again
after a kill, or when what failed is mended, it goes on from the last finished round. Run twice at
the same time, the two share the runs that are left.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from experiments.shared import report
from experiments.shared.apps import (
    check_asked,
    is_of_one_run,
    method_names,
    progress_bar,
    read_learning_rates,
    read_server_steps,
    run,
    set_step,
    shared_work,
    whole_rounds,
)
from experiments.shared.plots import Rounds, Runs
from fedlora_jax import experiment, locks
from fedlora_jax.experiment import hosts

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, e.g. configs/digits.py or configs/digits.py:runlocal."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for all that is written.", required=True)
_METHODS = flags.DEFINE_list(
    "methods",
    ["local", "fedit", "lora_fair", "flora_na", "central"],
    "Methods to compare, or all; a method that --config names must be among them.",
)
_SEEDS = flags.DEFINE_integer(
    "seeds",
    3,
    "Number of seeds: 0, 1, ...; a --config.seed must be one of them.",
    lower_bound=1,
)
_LEARNING_RATES = flags.DEFINE_string(
    "learning_rates",
    None,
    "File of experiments.tune with the learning rate and the server step of each method; by "
    "default all have those of the configuration.",
)


def main() -> None:
    """Runs all methods under all seeds, then writes the report."""
    config, names = _CONFIG.value, method_names(_METHODS.value)
    check_asked(config, names, _SEEDS.value)
    steps: dict[str, float | None] = {}
    if _LEARNING_RATES.value is None:
        rates = dict.fromkeys(names, config.local.learning_rate)
    else:
        rates = read_learning_rates(Path(_LEARNING_RATES.value), names)
        steps = read_server_steps(Path(_LEARNING_RATES.value))
    compare(config, Path(_WORKDIR.value), rates, _SEEDS.value, steps)


def compare(
    config: ConfigDict,
    workdir: Path,
    learning_rates: Mapping[str, float],
    num_seeds: int,
    server_steps: Mapping[str, float | None] = MappingProxyType({}),
) -> Runs:
    """Runs methods under seeds 0, 1, ... and writes the report into `workdir`.

    Args:
      config: What the methods share.
      workdir: Where to write.
      learning_rates: The methods, in the order of the report, and the learning rate of each.
      num_seeds: The number of seeds.
      server_steps: The server's step size of those methods that do not have the configuration's.

    Returns:
      The metrics by method and seed, without methods that diverged or of which a run failed.

    Raises:
      ValueError: Before any work, if a configuration makes no sense, or the directory of a method
        and a seed holds a run of another one. If a run failed otherwise than by diverging, after
        all others have run and all is written.
      FloatingPointError: If methods diverged, and no run failed otherwise; likewise.
    """
    configs = {name: config.copy_and_resolve_references() for name in learning_rates}
    for name, mine in configs.items():
        mine.method = name
        mine.local.learning_rate = learning_rates[name]
        if name in server_steps:
            set_step(mine, server_steps[name])
    jobs = [(name, seed) for name in configs for seed in range(num_seeds)]
    with hosts.all_or_none():
        for mine in configs.values():
            experiment.check(mine)
        for name, seed in jobs:
            experiment.check_workdir(_under(configs[name], seed), _directory(workdir, name, seed))
        locks.check_writable(workdir)
    # What all methods share, the size of the cohort of the first among it.
    setting = experiment.prepare_on_all_hosts(next(iter(configs.values())))
    metric, untouched = setting.task.metrics[0], experiment.judge_untouched(config, setting)
    program = functools.lru_cache(1)(
        lambda name: experiment.compile_program(configs[name], setting)
    )
    diverged: dict[str, str] = {}
    failed: list[tuple[str, str]] = []
    with progress_bar(len(jobs) * config.rounds) as bar, whole_rounds(bar) as advance:

        def train(job: tuple[str, int]) -> Rounds:
            name, seed = job
            if name in diverged:
                bar.update(config.rounds)
                return []
            mine, before = _under(configs[name], seed), bar.n
            bar.set_description(f"{name}, seed {seed}")
            say = tqdm.write if seed == 0 and hosts.is_first() else None
            directory = _directory(workdir, name, seed)
            try:
                rounds = experiment.run(mine, setting, program(name), directory, advance, say)
            except (FloatingPointError, ValueError, OSError) as error:
                if isinstance(error, FloatingPointError):
                    diverged[name] = f"under seed {seed}, {error}"
                elif is_of_one_run(error, first=job == jobs[0]):
                    failed.append((name, f"under seed {seed}, {error}"))
                else:
                    raise
                bar.update(config.rounds - (bar.n - before))
                return []
            if bar.disable and hosts.is_first():
                shown = "-" if (last := rounds[-1][metric.name]) is None else metric.show(last)
                print(f"{name}, seed {seed}: {shown}", flush=True)
            return rounds

        found = shared_work(jobs, train)
    out = diverged.keys() | dict(failed)
    kept = [name for name in configs if name not in out]
    runs = {name: [found[name, seed] for seed in range(num_seeds)] for name in kept}
    if runs and hosts.is_first():
        first = _directory(workdir, next(iter(runs)), 0)
        steps = {name: report.step_of(configs[name]) for name in kept}
        study = (config, setting, workdir, runs, learning_rates, untouched, diverged, failed)
        report.finish(*study, first=first, steps=steps)
    if out:
        kind = ValueError if failed else FloatingPointError
        raise kind(report.left_out(diverged, failed))
    return runs


def _under(config: ConfigDict, seed: int) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.seed = seed
    return config


def _directory(workdir: Path, name: str, seed: int) -> Path:
    return workdir / name / f"seed_{seed}"


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run(main, several_hosts=True)
