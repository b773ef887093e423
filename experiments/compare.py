"""Compares methods over the same federation, seeds and cohorts.

    python -m experiments.compare --config=configs/digits.py --workdir=runs/digits \\
        --methods=fedit,lora_fair --seeds=3

Prints a table; leaves `report.md` with plots in the work directory, and a directory for each
method and seed as `experiments.train` does. Run again after a kill, it goes on from the last
finished round.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import report
from experiments.apps import command, progress_bar, run
from fedlora_jax.federated import experiment

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, e.g. configs/digits.py or configs/digits.py:runlocal."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for all that is written.", required=True)
_METHODS = flags.DEFINE_list(
    "methods", ["local", "fedit", "lora_fair", "flora_na", "central"], "Methods to compare."
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds: 0, 1, ...", lower_bound=1)


def main() -> None:
    """Runs all methods under all seeds, then writes the report."""
    compare(_CONFIG.value, Path(_WORKDIR.value), _METHODS.value, _SEEDS.value)


def compare(config: ConfigDict, workdir: Path, names: Sequence[str], num_seeds: int) -> report.Runs:
    """Runs the methods `names` under seeds 0, 1, ... and writes the report into `workdir`."""
    configs = {name: config.copy_and_resolve_references() for name in names}
    for name, mine in configs.items():
        mine.method = name
        experiment.check(mine)
    setting = experiment.prepare(config)
    runs: dict[str, list[report.Rounds]] = {}
    with progress_bar(len(names) * num_seeds * config.rounds) as bar:
        for name, mine in configs.items():
            program = experiment.compile_program(mine, setting)
            runs[name] = []
            for seed in range(num_seeds):
                mine.seed = seed
                bar.set_description(f"{name}, seed {seed}")
                rounds = experiment.run(
                    mine, setting, program, workdir / name / f"seed_{seed}", bar.update
                )
                runs[name].append(rounds)
                if bar.disable:
                    print(f"{name}, seed {seed}: {100 * rounds[-1]['accuracy']:.1f}%", flush=True)
    counts = experiment.partition_counts(config, setting)
    path = report.write(workdir, runs, counts, setting.domains, command())
    print(f"\n{report.render(runs)}\n\nReport with plots: {path}")
    return runs


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run(main)
