"""A thousand clients of a handful of digits each, under client-level differential privacy.

    python -m experiments.compare --config=configs/digits_private.py \\
        --methods=fedit,ffa_lora,random_basis_lora --seeds=3 --workdir=runs/private
    python -m experiments.compare --config=configs/digits_private.py:noise=4 \\
        --methods=fedit,ffa_lora,random_basis_lora --seeds=3 --workdir=runs/private_4

`noise` is the noise multiplier: 1, 2 and 4 are an epsilon of 32, 7.6 and 2.8 at delta 1e-5, with 0
changes are clipped and nothing is promised. The data and the backbone are those of
`configs/digits.py`, dealt out alike; the thirty clients there are too few to hide anybody among.
"""

import ml_collections

from configs import digits
from configs.common import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `noise=Z,method=NAME,runlocal`."""
    args = parse_arg(arg, noise=2.0, method="fedit", runlocal=False)
    config = digits.get_config(f"method={args['method']}{',runlocal' * args['runlocal']}")
    config.rounds = 2 if args["runlocal"] else 30
    config.clients_per_round = 100
    config.data.partition = "iid"
    config.data.partition_options = {"num_clients": 1000}
    config.local.update(steps=0, epochs=2, batch_size=4)
    config.weights = "equal"
    config.privacy.update(clip=0.5, noise_multiplier=args["noise"])
    return config
