"""Downloads public data sets, checks them, and writes them as ArrayRecord files, once.

    python -m experiments.prepare_data --list
    pip install -e '.[prepare]'
    python -m experiments.prepare_data --dataset=cifar100,domainnet --data_dir=data

Writing images takes TensorFlow, for the most part; reading them afterwards does not. Given again
after a kill or a full disk, the same command goes on. `docs/data_sets.md` has more.
"""

import os

from absl import flags
from tabulate import tabulate

from experiments.shared.apps import run
from fedlora_jax.data import bad_records, preparation

_DATASET = flags.DEFINE_list(
    "dataset", [], "Data sets, ours or of TFDS: cifar100, domainnet, domainnet/real."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    os.environ.get("FEDLORA_DATA_DIR"),
    "Where to write; by default FEDLORA_DATA_DIR, or the directory of TFDS.",
)
_MANUAL_DIR = flags.DEFINE_string(
    "manual_dir",
    None,
    "Where files fetched by hand are; by default downloads/manual/NAME in the data directory.",
)
_ON_BAD_RECORD = flags.DEFINE_enum(
    "on_bad_record", "stop", bad_records.POLICIES, "What to do at a file that cannot be used."
)
_CHECK_COUNTS = flags.DEFINE_boolean(
    "check_counts", True, "Whether the numbers of examples have to be the published ones."
)
_LIST = flags.DEFINE_boolean("list", False, "Prints all data sets known, and nothing else.")


def main() -> None:
    """Prepares the data sets, or lists those there are."""
    if _LIST.value:
        headers = ("data set", "what", "examples", "takes", "terms")
        print(tabulate(preparation.table(), headers, maxcolwidths=[None, 32, None, 32, 32]))
        return
    if not _DATASET.value:
        raise ValueError("--dataset names none; --list shows those there are")
    for name in _DATASET.value:
        preparation.prepare(
            name,
            _DATA_DIR.value,
            manual_dir=_MANUAL_DIR.value,
            on_bad_record=_ON_BAD_RECORD.value,
            examples=preparation.EXAMPLES if _CHECK_COUNTS.value else {},
            report=lambda line: print(line, flush=True),
        )


if __name__ == "__main__":
    run(main)
