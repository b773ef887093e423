"""From a configuration to a finished run: what touches configuration, disk, clock or screen.

`prepare` reads data and backbone, once for all runs; `compile_program` builds the jitted functions
of one method, once for all seeds; `run` trains one method under one seed, or goes on with it.
"""

from fedlora_jax.experiment.finished import judge_untouched
from fedlora_jax.experiment.loop import Progress, check_workdir, run
from fedlora_jax.experiment.partitions import partition_counts
from fedlora_jax.experiment.program import Program, check, compile_program, steps, with_step
from fedlora_jax.experiment.setting import (
    Setting,
    prepare,
    prepare_on_all_hosts,
    training_examples,
)
from fedlora_jax.experiment.state import State, first_state

__all__ = [
    "Program",
    "Progress",
    "Setting",
    "State",
    "check",
    "check_workdir",
    "compile_program",
    "first_state",
    "judge_untouched",
    "partition_counts",
    "prepare",
    "prepare_on_all_hosts",
    "run",
    "steps",
    "training_examples",
    "with_step",
]
