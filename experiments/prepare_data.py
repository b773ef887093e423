"""Downloads a public data set and writes it as ArrayRecord files, once.

    pip install 'fedlora-jax[prepare]'
    python -m experiments.prepare_data --dataset=cifar100

Writing images takes TensorFlow; reading them afterwards does not. The embedded data sets need none
of this: they are made when they are first read.
"""

import os

from absl import flags

from experiments.shared.apps import run

_DATASET = flags.DEFINE_string(
    "dataset", None, "A data set of TFDS, with its config: cifar100, domainnet/real.", required=True
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    os.environ.get("FEDLORA_DATA_DIR"),
    "Where to write; by default FEDLORA_DATA_DIR, or the directory of TFDS.",
)


def main() -> None:
    """Prepares the data set."""
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        raise ValueError(
            "preparing a public data set takes TensorFlow: pip install 'fedlora-jax[prepare]'"
        ) from None
    import tensorflow_datasets as tfds

    builder = tfds.builder(_DATASET.value, data_dir=_DATA_DIR.value, file_format="array_record")
    builder.download_and_prepare()
    sizes = {name: split.num_examples for name, split in builder.info.splits.items()}
    print(f"{_DATASET.value} is in {builder.data_dir}: {sizes}")


if __name__ == "__main__":
    run(main)
