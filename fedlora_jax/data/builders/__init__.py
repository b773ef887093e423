"""Builders of data sets that TFDS has no builder of its own for: one a file, all by name here."""

import tensorflow_datasets as tfds

from fedlora_jax.data.builders.alpaca import Alpaca
from fedlora_jax.data.builders.banking77 import Banking77
from fedlora_jax.data.builders.code_feedback import CodeFeedback
from fedlora_jax.data.builders.metamathqa import Metamathqa
from fedlora_jax.data.builders.newsgroups20 import Newsgroups20

BUILDERS: dict[str, type[tfds.core.DatasetBuilder]] = {
    "alpaca": Alpaca,
    "banking77": Banking77,
    "code_feedback": CodeFeedback,
    "metamathqa": Metamathqa,
    "newsgroups20": Newsgroups20,
}


def names() -> list[str]:
    """Data sets that can be prepared: ours, and those of the TFDS catalogue."""
    _register()
    return sorted({*BUILDERS, *tfds.list_builders(with_community_datasets=False)})


def get(name: str) -> type[tfds.core.DatasetBuilder]:
    """What makes a data set: a builder of ours, or of TFDS.

    Args:
      name: Without a config: `"glue"`.

    Raises:
      tfds.core.DatasetNotFoundError: If there is none.
    """
    if name in BUILDERS:
        return BUILDERS[name]
    _register()
    return tfds.builder_cls(name)


def _register() -> None:
    """TFDS knows its older builders of text, GLUE's and GSM8K's, only when they are imported."""
    import tensorflow_datasets.text.glue  # noqa: F401
