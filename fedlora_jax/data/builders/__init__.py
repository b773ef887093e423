"""Builders of data sets that TFDS has no builder of its own for: one a file, all by name here."""

import tensorflow_datasets as tfds

from fedlora_jax.data.builders.digits_domains import DigitsDomains
from fedlora_jax.data.builders.fgvc_aircraft import FgvcAircraft
from fedlora_jax.data.builders.nico_pp import NicoPp

BUILDERS: dict[str, type[tfds.core.DatasetBuilder]] = {
    "digits_domains": DigitsDomains,
    "fgvc_aircraft": FgvcAircraft,
    "nico_pp": NicoPp,
}
