"""How a program is compiled of which the machine code hardly matters."""

from typing import Any

import jax


def least_effort() -> dict[str, Any]:
    """XLA's options on a CPU: a seventh of the time to compile, twice the time to run.

    For a program that is read and not run, or runs for less than it would take to be compiled well.
    """
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    if jax.__version_info__[:2] < (0, 11):  # Later there is no such option.
        options["xla_cpu_use_fusion_emitters"] = False
    return options
