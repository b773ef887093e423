"""Trains one method under one seed.

    python -m experiments.train --config=configs/digits.py:method=lora_fair --workdir=runs/lora_fair

Leaves its configuration, metrics, TensorBoard events, checkpoints, final adapters and a report in
the work directory. Run again after a kill, it goes on from the last finished round.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from experiments.shared import report
from experiments.shared.apps import progress_bar, run, traced, whole_rounds
from fedlora_jax import experiment, locks
from fedlora_jax.experiment import hosts

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, e.g. configs/digits.py:method=lora_fair."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for all that is written.", required=True)
_PROFILE = flags.DEFINE_integer(
    "profile",
    0,
    "Rounds of which jax.profiler leaves a trace in WORKDIR/profile, after the first one, which "
    "compiles: for xprof (`xprof --logdir=WORKDIR/profile`), and in *.trace.json.gz for "
    "https://ui.perfetto.dev.",
    lower_bound=0,
)


def main() -> None:
    """Runs the configuration."""
    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    with hosts.all_or_none():
        experiment.check(config)
        experiment.check_workdir(config, workdir)
        locks.check_writable(workdir)
    setting = experiment.prepare_on_all_hosts(config)
    with (
        progress_bar(config.rounds, config.method) as bar,
        whole_rounds(bar) as counted,
        traced(_PROFILE.value, workdir / "profile", counted) as (begin, advance),
    ):

        def announce(line: str) -> None:
            begin()
            if hosts.is_first():
                tqdm.write(line)

        program = experiment.compile_program(config, setting)
        rounds = experiment.run(config, setting, program, workdir, advance, announce)
    rates = {config.method: config.local.learning_rate}
    if hosts.is_first():
        report.finish(config, setting, workdir, {config.method: [rounds]}, rates, first=workdir)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run(main, several_hosts=True)
