"""A federation whose optimum is known in closed form: a linear regression, seconds a run.

    python -m experiments.linear --config=configs/linear.py --workdir=runs/linear
    python -m experiments.linear --config=configs/linear.py:runlocal --workdir=runs/tiny

Ten clients, one kernel of 24 x 24, rank 4, twenty rounds of sixteen steps; every dial is turned for
itself, and both steps are chosen again at each of its values. `runlocal` makes it a matter of a
minute, to see whether all runs. What came of it is in `experiments/results/linear`.
"""

import ml_collections

from configs.common import method_options, parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `runlocal`."""
    small = parse_arg(arg, runlocal=False)["runlocal"]
    config = ml_collections.ConfigDict()
    config.rounds = 3 if small else 20
    config.seeds = 2 if small else 5  # 0, 1, ...
    # All points of the grid are tried under the first, the best few of them under the others too.
    config.tuning_seeds = (100,) if small else (100, 101)
    config.confirming_seeds = (102,) if small else (102, 103)
    config.finalists = 1 if small else 2

    # Of experiments.linear_study.problem.draw, beside the dials.
    config.problem = ml_collections.ConfigDict()
    config.problem.inputs = 24
    config.problem.outputs = 24
    config.problem.examples = 48  # of each client
    config.problem.noise = 0.1
    config.problem.decay = 1.0  # of the spectrum of what is to be learned
    config.problem.shift = 0.3  # of clients' inputs, at a heterogeneity of 1

    # The base setting, and what each dial is turned to while the others stay there.
    config.base = ml_collections.ConfigDict()
    config.base.heterogeneity = 1.0
    config.base.clients = 10
    config.base.rank = 4
    config.base.local_steps = 16
    config.base.momentum = 0.0  # of the server's step
    config.dials = ml_collections.ConfigDict()
    config.dials.heterogeneity = (1.0,) if small else (0.0, 0.5, 1.0, 2.0)
    config.dials.clients = (10,) if small else (2, 5, 10, 20)
    config.dials.rank = (2, 4) if small else (1, 2, 4, 8)
    config.dials.local_steps = (16,) if small else (1, 4, 16, 64)
    config.dials.momentum = (0.0,) if small else (0.0, 0.5)

    config.lora = ml_collections.ConfigDict()
    config.lora.scale = 2.0
    config.local = ml_collections.ConfigDict()
    config.local.batch_size = 12
    config.local.optimizer = "sgd"  # or "adamw"
    config.local.learning_rate = 1.0  # times those of the grid
    config.local.momentum = 0.0  # of sgd
    config.local.weight_decay = 0.0
    config.local.clip_norm = 2.0  # largest norm of a gradient; 0: any
    config.local.schedule = "cosine"  # over rounds; or "constant"

    # The grid, the same for all methods.
    config.learning_rates = (0.02, 0.06) if small else (0.02, 0.04, 0.08, 0.16, 0.32)
    config.server_steps = (1.0, 2.0) if small else (0.5, 1.0, 2.0)
    config.runs_at_once = 6

    config.options = method_options(config.get_ref("rounds"))
    # Beside the methods of the library, by a name of their own.
    config.variants = ml_collections.ConfigDict()
    config.variants.lora_fair_lambda_0 = {
        "method": "lora_fair",
        "options": {"regularization": 0.0},
    }
    config.variants.lora_fair_closed_form = {
        "method": "lora_fair",
        "options": {"similarity": "frobenius", "solver": "closed_form", "regularization": 0.0},
    }
    return config
