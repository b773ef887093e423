"""Images of your own: a folder `root/class/*.png`, or `root/domain/class/*.png`.

    python -m experiments.train --config=configs/image_folder.py:root=images --workdir=runs/images
    python -m experiments.train --workdir=runs/vit \\
        --config=configs/image_folder.py:root=images,size=224,source=google/vit-base-patch16-224

With a source (a directory with weights and their `config.json`, or a model of the hub) that model
is adapted, with a new head. Without, a small ViT is first trained on a share of the images, as for
the demo. Clients hold images of one domain, labels skewed; `docs/your_own_data.md` walks through
it. `runlocal` makes it a matter of seconds.
"""

import ml_collections

from configs import digits
from configs.common import parse_arg
from fedlora_jax.data import image_folder


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The configuration; `arg` is `root=PATH` and any of the others below."""
    args = parse_arg(arg, root="", size=32, clients=12, source="", method="fedit", runlocal=False)
    if not args["root"]:
        raise ValueError("which folder? --config=configs/image_folder.py:root=DIR")
    small = ",runlocal" if args["runlocal"] else ""
    config = digits.get_config(f"method={args['method']}{small}")
    classes = image_folder.class_names(args["root"])
    domains = image_folder.class_names(args["root"], "domain")

    config.data.name = "image_folder"
    config.data.root = args["root"]
    config.data.size = args["size"]
    # Shares of the images; the rest is federated.
    config.data.held_out = {"validation": 0.1, "test": 0.2}
    skew = {"alpha": 0.5}
    if domains:
        each = max(1, args["clients"] // len(domains))
        config.data.partition = "domain_dirichlet"
        config.data.partition_options = {"clients_per_domain": each, **skew}
        clients = each * len(domains)
    else:
        config.data.partition = "dirichlet"
        config.data.partition_options = {"num_clients": args["clients"], **skew}
        clients = args["clients"]
    config.clients_per_round = max(1, clients // 2)

    if args["source"]:
        del config.pretraining
        config.model.name = "pretrained"
        config.model.options = {"num_classes": len(classes), "remat": False}
        config.pretrained = ml_collections.ConfigDict({"source": args["source"], "new": "^head$"})
    else:
        config.data.held_out.pretrain = 0.3
        config.model.options = {
            "num_classes": len(classes),
            "patch_size": _patch_size(args["size"]),
        }
    return config


def _patch_size(size: int) -> int:
    """The largest patches that tile an image, eight or more along its side."""
    return max(side for side in range(1, max(2, size // 8 + 1)) if size % side == 0)
