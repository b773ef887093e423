"""The regimes of three papers on the six domains of digits: all clients present, SGD, one epoch.

    python -m experiments.compare --config=configs/digits_regimes.py:regime=lora_fair \\
        --methods=fedit,lora_fair,flexlora,flora,ffa_lora --seeds=5 --workdir=runs/fair
    python -m experiments.compare --config=configs/digits_regimes.py:regime=fedsmooth_lora \\
        --methods=fedit,flora,frlora,fedsmooth_lora --seeds=5 --workdir=runs/smooth
    python -m experiments.compare --config=configs/digits_regimes.py:regime=flora_na,alpha=0.3 \\
        --methods=fedit,flora_na,flexlora,fedex_lora --seeds=5 --workdir=runs/na

The federation of `configs/digits.py` has thirty clients, of whom eighteen train eight steps by
AdamW. The papers have few, all of whom train an epoch by SGD 0.01 with momentum 0.9:

* `lora_fair` (arXiv:2411.14961): six clients, one a domain; weight decay 1e-5, clipping at 10.
* `fedsmooth_lora` (arXiv:2605.29460): `clients` (5) of all domains, rank 2, scale 4 / sqrt(2), a
  cosine over rounds, gamma 256, zeta 1. With `alpha` above zero labels are split by
  Dirichlet(alpha), otherwise alike.
* `flora_na` (no such regime is stated; its fit has something to gain where updates differ in size):
  `clients` (10) of all domains. With `alpha` above zero their numbers of examples, and so of steps,
  are drawn by Dirichlet(alpha), otherwise they are equal.

The data and the backbone are those of `configs/digits.py`, batches of 16 instead of 64 and 128: a
client has hundreds of images here, not thousands.
"""

import ml_collections

from configs import digits
from configs.common import parse_arg
from fedlora_jax.names import lookup


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `regime=NAME,clients=K,alpha=A,method=NAME,runlocal`."""
    args = parse_arg(arg, regime="lora_fair", clients=0, alpha=0.0, method="fedit", runlocal=False)
    regimes = {"lora_fair": _lora_fair, "fedsmooth_lora": _fedsmooth_lora, "flora_na": _flora_na}
    change = lookup(regimes, args["regime"], "regime")
    config = digits.get_config(f"method={args['method']}{',runlocal' * args['runlocal']}")
    config.local.update(
        steps=0, epochs=1, optimizer="sgd", learning_rate=0.01, momentum=0.9, weight_decay=0.0
    )
    config.options.fedsmooth_lora.calibration_batches = 8
    change(config, args["clients"], args["alpha"])
    return config


def _lora_fair(config: ml_collections.ConfigDict, clients: int, alpha: float) -> None:
    if clients or alpha:
        raise ValueError("regime=lora_fair has six clients, one a domain: no clients=, no alpha=")
    config.clients_per_round = 6
    config.data.partition = "by_domain"
    config.data.partition_options = {"clients_per_domain": 1}
    config.local.update(weight_decay=1e-5, clip_norm=10.0, schedule="constant")


def _fedsmooth_lora(config: ml_collections.ConfigDict, clients: int, alpha: float) -> None:
    _all_present(config, clients or 5, "dirichlet", alpha)
    config.lora.update(rank=2, scale=4 / 2**0.5)
    config.local.update(clip_norm=0.0, schedule="cosine")
    config.options.fedsmooth_lora.zeta_min = 0.0 if alpha else 1.0


def _flora_na(config: ml_collections.ConfigDict, clients: int, alpha: float) -> None:
    _all_present(config, clients or 10, "quantity_skew", alpha)
    config.local.update(clip_norm=10.0, schedule="constant")


def _all_present(
    config: ml_collections.ConfigDict, clients: int, uneven: str, alpha: float
) -> None:
    """So many clients; with `alpha` above zero by the uneven partitioner, otherwise alike."""
    config.clients_per_round = clients
    config.data.partition = uneven if alpha else "iid"
    config.data.partition_options = {"num_clients": clients, **({"alpha": alpha} if alpha else {})}
