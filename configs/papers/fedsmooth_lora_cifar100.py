"""FedSmoothLoRA on CIFAR-100: ViT-S, five clients, IID and Dirichlet.

    python -m experiments.prepare_data --dataset=cifar100
    python -m experiments.compare --methods=fedit,flora,frlora,fedsmooth_lora --seeds=3 \\
        --config=configs/papers/fedsmooth_lora_cifar100.py:skew=iid --workdir=runs/cifar100_iid

Wang et al., "FedSmoothLoRA: Toward Smoother and Faster Convergence in Federated Low-Rank
Adaptation" (arXiv:2605.29460). Its table is not repeated here: it could not be read where this was
written.

Stated by the paper or the authors' code: five clients that all take part, 10 rounds of one epoch,
SGD 0.01 with momentum 0.9, batches of 64, cosine over rounds; adapters of rank 2 on query, key and
value, alpha 4, scale alpha / sqrt(rank); gamma 256, 512 calibration samples, zeta 1 (IID) or
falling from 1 to 0 (otherwise), singular values split evenly.

Ours: images at 224 with pixels in -1 .. 1, weights of the ViT-S/16 for ImageNet-21k, a head that is
trained and averaged, and alpha = 0.1 of the Dirichlet, the value to which the authors' code falls
back.

`source` is where the weights are. Expected on one H200: 35 GB, a few minutes a method
(`docs/papers.md` says how that is reckoned). `runlocal` makes it a matter of seconds, with a small
model that is made on the spot.
"""

import ml_collections

from configs import digits
from configs.common import parse_arg
from fedlora_jax.names import lookup

_SKEWS = {"iid": ("iid", {}), "dirichlet": ("dirichlet", {"alpha": 0.1})}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `skew=NAME,method=NAME,source=DIR,runlocal`."""
    args = parse_arg(
        arg,
        skew="iid",
        method="fedsmooth_lora",
        source="timm/vit_small_patch16_224.augreg_in21k",
        runlocal=False,
    )
    small = args["runlocal"]
    partition, options = lookup(_SKEWS, args["skew"], "skew")
    config = digits.get_config(f"method={args['method']}{',runlocal' * small}")
    config.rounds = 2 if small else 10
    config.clients_per_round = 5

    config.data.name = "cifar100"
    config.data.splits = {"train": "train", "test": "test"}
    config.data.size = 32 if small else 224
    config.data.partition = partition
    config.data.partition_options = {"num_clients": 5, **options}

    if small:
        config.model.options = {"num_classes": 100, "width": 16, "depth": 1, "num_heads": 2}
        config.model.options.patch_size = 8
        config.pretraining.split = "train"
        config.pretraining.options.update(steps=2, batch_size=8)
    else:
        del config.pretraining
        config.model.name = "vit_s16"
        config.model.options = {"num_classes": 100, "remat": False}
        config.pretrained = ml_collections.ConfigDict()
        config.pretrained.source = args["source"]
        config.pretrained.new = "^head$"

    config.lora.rank = 2
    config.lora.scale = 4 / 2**0.5
    config.lora.targets = ("attention/(query|key|value)$",)
    config.local.update(
        steps=1 if small else 0,
        epochs=0 if small else 1,
        batch_size=4 if small else 64,
        optimizer="sgd",
        learning_rate=0.01,
        momentum=0.9,
        weight_decay=0.0,
        clip_norm=0.0,
        schedule="cosine",
    )
    smooth = config.options.fedsmooth_lora
    smooth.gamma = 256.0
    smooth.calibration_batches = 1 if small else 8
    smooth.split = "balanced"
    smooth.zeta_min = 1.0 if args["skew"] == "iid" else 0.0
    return config
