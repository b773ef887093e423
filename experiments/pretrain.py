"""Pretrains a small image classifier, the backbone of later federated runs.

    python -m experiments.pretrain --dataset=digits_domains --model=vit_digits --output=runs/vit

Programs that are given `configs/digits.py` make their backbone themselves; this is for other uses.
"""

from pathlib import Path

import numpy as np
from absl import flags

from experiments.shared.apps import run
from fedlora_jax import locks, models
from fedlora_jax.data import sources
from fedlora_jax.models import pretrain

_DATASET = flags.DEFINE_string("dataset", "digits_domains", "A data set of fedlora_jax.data.")
_SPLIT = flags.DEFINE_string("split", "pretrain", "Split to train on.")
_MODEL = flags.DEFINE_string("model", "vit_digits", "A backbone of fedlora_jax.models.")
_OUTPUT = flags.DEFINE_string("output", "runs/backbone", "A new directory for the parameters.")
_STEPS = flags.DEFINE_integer("steps", 1000, "Optimisation steps.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of weights, batches and distortions.")


def main() -> None:
    """Trains on the split and saves the parameters."""
    output = Path(_OUTPUT.value)
    if output.exists():
        raise ValueError(f"there is something at {output} already")
    locks.check_writable(output.absolute().parent)
    examples = sources.load(_DATASET.value, _SPLIT.value)
    num_classes = int(np.max(examples["label"])) + 1
    model = models.get(_MODEL.value, num_classes=num_classes)
    params = pretrain.pretrain(model, examples, steps=_STEPS.value, seed=_SEED.value)
    pretrain.save(output, params)
    print(f"Parameters of {_MODEL.value} ({num_classes} classes): {output}")


if __name__ == "__main__":
    run(main)
