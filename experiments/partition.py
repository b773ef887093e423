"""Shows whose the training examples are, before anything is trained.

    python -m experiments.partition --config=configs/digits.py --workdir=runs/fair
    python -m experiments.partition --config=configs/digits.py --seeds=3 --workdir=runs/partitions

Prints a table, and leaves `partition.json`, `partition.csv` and `partition.png` in the work
directory; with several seeds in one directory each. No backbone is read or made. A run in the same
directory uses the `partition.json`; `docs/partitions.md` says what is in it.
"""

import textwrap
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments.shared import clients, plots, report
from experiments.shared.apps import check_seed, run
from fedlora_jax import bounds, experiment
from fedlora_jax.data import partition
from fedlora_jax.experiment import partitions

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, e.g. configs/digits.py."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for all that is written.", required=True)
_SEEDS = flags.DEFINE_integer(
    "seeds",
    None,
    "Number of seeds: 0, 1, ..., each in WORKDIR/seed_N; a --config.seed must be one of them. By "
    "default that of the configuration alone.",
    lower_bound=1,
)


def main() -> None:
    """Splits the training examples under each seed."""
    config, workdir = _CONFIG.value.copy_and_resolve_references(), Path(_WORKDIR.value)
    bounds.check_config(config.to_dict())
    if _SEEDS.value is not None:
        check_seed(config, _SEEDS.value)
    partition.check_options(config.data.partition, config.data.partition_options)
    train, domains = experiment.training_examples(config)
    if _SEEDS.value is None:
        show(config, train, domains, workdir)
        return
    for seed in range(_SEEDS.value):
        config.seed = seed
        show(config, train, domains, workdir / f"seed_{seed}")


def show(
    config: ConfigDict, train: partitions.Examples, domains: tuple[str, ...], workdir: Path
) -> None:
    """Writes and prints the partition under the seed of the configuration."""
    found = partitions.of_run(config, train, workdir)
    overview = partitions.overview(train, domains, found.parts)
    workdir.mkdir(parents=True, exist_ok=True)
    path = partitions.write(found, workdir)
    clients.write_csv(workdir / "partition.csv", overview)
    plots.save(workdir, {"partition": plots.partition(overview)})
    table = report.aligned(*clients.table(overview), "simple")
    title = f"Partition {config.data.partition!r} of {found.origin['data']['name']}"
    legend = textwrap.fill(clients.legend(overview), 100)
    print(f"{title}, seed {config.seed}\n\n{table}\n\n{legend}\n\n{path}\n")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run(main)
