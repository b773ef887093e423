"""Builders of data sets that TFDS has no builder of its own for: one a file, all by name here."""

import tensorflow_datasets as tfds

from fedlora_jax.data.builders.digits_domains import DigitsDomains

BUILDERS: dict[str, type[tfds.core.DatasetBuilder]] = {
    "digits_domains": DigitsDomains,
}
