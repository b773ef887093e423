"""MetaMathQA: 395,000 questions made of those that GSM8K and MATH train on, with answers."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from fedlora_jax.data import record_files

_FIELDS = ("query", "response", "type", "original_question")
_URL = "https://huggingface.co/datasets/meta-math/MetaMathQA/resolve/main/MetaMathQA-395K.json"


class Metamathqa(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of Yu et al., "MetaMath" (ICLR 2024, arXiv:2309.12284); needs no TensorFlow.

    One split, `train`, with `query`, `response`, `type` (how the question was made, of which set)
    and `original_question`, which several examples share.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    url_infos: dict[str, Any] = {}  # no checksum is published

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in _FIELDS}),
            homepage="https://huggingface.co/datasets/meta-math/MetaMathQA",
            license="MIT",
        )

    def _split_generators(self, manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        return {"train": self._generate_examples(manager.download(_URL))}

    def _generate_examples(self, path: Any) -> Iterator[tuple[int, dict[str, str]]]:
        for number, record in enumerate(record_files.read(path, kind=".json")):
            yield number, record_files.strings(record, _FIELDS)
