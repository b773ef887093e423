"""Maps how far methods end from an optimum that is known, over many settings of a small federation.

    python -m experiments.linear --config=configs/linear.py --workdir=runs/linear
    python -m experiments.linear --config=configs/linear.py:runlocal --workdir=runs/tiny \\
        --methods=fedit,fedex_lora

A linear regression over clients, with adapters on one frozen kernel, by the library's own rounds.
In the base setting, and wherever one dial is turned to another value, each method has its learning
rate and its server's step chosen from one grid under the tuning seeds, and is judged under others:
by its relative excess loss, `(L(W) - L(W*)) / (L(W_0) - L(W*))`, with W* in closed form.

Leaves a line a run in `runs.jsonl`, and `report.md`, `summary.json` and plots, in the work
directory. Run again after a kill, it goes on from the last batch of runs.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments.linear_study.study import method_names, run_study
from experiments.shared.apps import run

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, configs/linear.py or configs/linear.py:runlocal."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for all that is written.", required=True)
_METHODS = flags.DEFINE_list(
    "methods",
    ["all"],
    "Methods that have one model for all, or names of config.variants. `all` are these without "
    "oracle and spectral, which by default repeat fedex_lora and flexlora.",
)


def main() -> None:
    """Runs what is missing, then writes the report."""
    config = _CONFIG.value
    run_study(config, Path(_WORKDIR.value), method_names(config, _METHODS.value))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run(main)
