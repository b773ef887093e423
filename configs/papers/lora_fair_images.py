"""LoRA-FAIR on images: DomainNet and NICO++, ViT-B/16 and Mixer-B/16, feature and label skew.

    python -m experiments.prepare_data --dataset=domainnet
    python -m experiments.compare --seeds=1 --workdir=runs/domainnet_vit \\
        --methods=ffa_lora,fedit,flora,flexlora,lora_fair,central \\
        --config=configs/papers/lora_fair_images.py:data=domainnet,model=vit,skew=feature

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement"
(ICCV 2025, arXiv:2411.14961), its tables 1 and 2: accuracy in percent after the last round, plain
mean over the domains' test images.

    |           |       | skew              | FFA   | FedIT | FLoRA | FlexLoRA | FAIR  | central |
    | DomainNet | ViT   | feature           | 72.82 | 75.75 | 75.53 | 76.02    | 77.07 | 77.77   |
    | DomainNet | Mixer | feature           | 58.40 | 64.37 | 64.38 | 64.79    | 65.87 | 66.64   |
    | NICO++    | ViT   | feature           | 90.28 | 90.58 | 90.93 | 90.60    | 91.24 | 91.51   |
    | NICO++    | Mixer | feature           | 80.05 | 82.51 | 82.29 | 83.08    | 83.56 | 84.50   |
    | DomainNet | ViT   | feature and label |       | 73.89 | 74.26 | 74.25    | 74.99 |         |
    | NICO++    | ViT   | feature and label |       | 89.48 | 89.60 | 89.65    | 90.04 |         |

Stated: the data (DomainNet's first 100 classes, NICO++'s 60), models pretrained on ImageNet-21k,
six clients of one domain each, or 30, five a domain, with Dirichlet(0.5) over labels, of which 18
take part; rank 16, SGD 0.01 with momentum 0.9, weight decay 1e-5, clipping at 10, batches of 128;
input 224, bicubic, statistics of CLIP, no augmentation; the head is trained and averaged.

Ours, because it is not stated: 50 rounds of one epoch, a constant learning rate, adapters on query,
key and value (ViT) and on all layers of the MLPs (Mixer), scale 1 (alpha = rank), and NICO++'s test
split (`docs/data_sets.md`).

`source` is where the weights are: by default the ViT of the hub, and for the Mixer
`Mixer-B_16.npz` of the original release for ImageNet-21k in the current directory. Expected on one
H200: 70 GB; an hour a method for DomainNet, half for NICO++ (`docs/papers.md` says how that is
reckoned). `runlocal` makes it a matter of seconds, with a small model that is made on the spot.
"""

import ml_collections

from configs import digits
from configs.common import parse_arg
from fedlora_jax.names import lookup

_CLASSES = {"domainnet": 100, "nico_pp": 60}
_DOMAINS = 6
_MODELS = {
    "vit": ("vit_b16", "google/vit-base-patch16-224-in21k", ("attention/(query|key|value)$",)),
    "mixer": ("mixer_b16", "Mixer-B_16.npz", ("(token|channel)_mlp/fc[12]$",)),
}
_SMALL = {
    "vit": ("vit_digits", {"width": 16, "depth": 1, "num_heads": 2, "patch_size": 8}),
    "mixer": ("mixer_s16", {"width": 16, "depth": 1, "patch_size": 8}),
}
_SKEWS = {"feature": (1, 6), "feature_label": (5, 18)}  # clients of a domain, and of a round


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `data=NAME,model=NAME,skew=NAME` and any of those below."""
    args = parse_arg(
        arg,
        data="domainnet",
        model="vit",
        skew="feature",
        method="lora_fair",
        source="",
        runlocal=False,
    )
    small = args["runlocal"]
    classes = lookup(_CLASSES, args["data"], "data set of the paper")
    name, source, targets = lookup(_MODELS, args["model"], "model of the paper")
    clients_per_domain, cohort = lookup(_SKEWS, args["skew"], "skew")
    config = digits.get_config(f"method={args['method']}{',runlocal' * small}")
    config.rounds = 2 if small else 50
    config.clients_per_round = 2 if small else cohort

    config.data.name = args["data"]
    config.data.splits = {"train": "train", "test": "test"}
    config.data.size = 32 if small else 224
    config.data.classes = classes
    config.data.statistics = "clip"
    config.data.partition = "by_domain" if args["skew"] == "feature" else "domain_dirichlet"
    config.data.partition_options = {"clients_per_domain": clients_per_domain}
    if args["skew"] == "feature_label":
        config.data.partition_options.alpha = 0.5

    if small and not args["source"]:
        config.model.name, options = _SMALL[args["model"]]
        config.model.options = {"num_classes": classes, **options}
        config.pretraining.split = "train"
        config.pretraining.options.update(steps=2, batch_size=8)
    else:
        del config.pretraining
        config.model.name = name
        config.model.options = {"num_classes": classes, "remat": False}
        config.pretrained = ml_collections.ConfigDict()
        config.pretrained.source = args["source"] or source
        config.pretrained.new = "^head$"

    config.lora.rank = 2 if small else 16
    config.lora.scale = 1.0
    config.lora.targets = targets
    config.local.update(
        steps=1 if small else 0,
        epochs=0 if small else 1,
        batch_size=4 if small else 128,
        optimizer="sgd",
        learning_rate=0.01,
        momentum=0.9,
        weight_decay=1e-5,
        clip_norm=10.0,
        schedule="constant",
    )
    config.clients_per_chunk = "all" if small else "2"
    return config
