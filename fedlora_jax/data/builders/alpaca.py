"""Stanford Alpaca: 52,002 instructions with answers of a language model."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from fedlora_jax.data import record_files

_FIELDS = ("instruction", "input", "output")
_URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"


class Alpaca(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of Taori et al., "Stanford Alpaca" (2023); needs no TensorFlow.

    One split, `train`, with `instruction`, `input`, which is often empty, and `output`. A few
    outputs are empty too.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    url_infos: dict[str, Any] = {}  # no checksum is published

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in _FIELDS}),
            homepage="https://github.com/tatsu-lab/stanford_alpaca",
            license="CC BY-NC 4.0",
        )

    def _split_generators(self, manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        return {"train": self._generate_examples(manager.download(_URL))}

    def _generate_examples(self, path: Any) -> Iterator[tuple[int, dict[str, str]]]:
        for number, record in enumerate(record_files.read(path, kind=".json")):
            yield number, record_files.strings(record, _FIELDS)
