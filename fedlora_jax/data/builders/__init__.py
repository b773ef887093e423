"""Builders of our own, by name: data sets that TFDS does not have, written as it would."""

import difflib

import tensorflow_datasets as tfds

from fedlora_jax.data.builders.alpaca import Alpaca
from fedlora_jax.data.builders.banking77 import Banking77
from fedlora_jax.data.builders.code_feedback import CodeFeedback
from fedlora_jax.data.builders.digits_domains import DigitsDomains
from fedlora_jax.data.builders.fgvc_aircraft import FgvcAircraft
from fedlora_jax.data.builders.metamathqa import Metamathqa
from fedlora_jax.data.builders.newsgroups20 import Newsgroups20
from fedlora_jax.data.builders.nico_pp import NicoPp

BUILDERS: dict[str, type[tfds.core.DatasetBuilder]] = {
    "alpaca": Alpaca,
    "banking77": Banking77,
    "code_feedback": CodeFeedback,
    "digits_domains": DigitsDomains,
    "fgvc_aircraft": FgvcAircraft,
    "metamathqa": Metamathqa,
    "newsgroups20": Newsgroups20,
    "nico_pp": NicoPp,
}


def get(name: str) -> type[tfds.core.DatasetBuilder]:
    """What makes a data set: a builder of ours, or of TFDS.

    Args:
      name: Without a config: `"glue"`.

    Raises:
      ValueError: If there is none; it names the nearest.
    """
    # TFDS knows its older builders of text, GLUE's and GSM8K's, only when they are imported.
    import tensorflow_datasets.text.glue  # noqa: F401

    if name in BUILDERS:
        return BUILDERS[name]
    try:
        return tfds.builder_cls(name)
    except (tfds.core.DatasetNotFoundError, ValueError):  # no such name, or no name at all
        known = {*BUILDERS, *tfds.list_builders(with_community_datasets=False)}
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"unknown data set {name!r}.{hint} Ours are {', '.join(BUILDERS)}; others are those "
            "of the TFDS catalogue and whatever has been prepared in the data directory."
        ) from None
