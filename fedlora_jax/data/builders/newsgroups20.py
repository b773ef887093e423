"""20 Newsgroups: 11,314 messages of twenty groups, and 7,532 later ones for testing."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from fedlora_jax.data.builders._archive import check

CLASSES = (
    "alt.atheism comp.graphics comp.os.ms-windows.misc comp.sys.ibm.pc.hardware "
    "comp.sys.mac.hardware comp.windows.x misc.forsale rec.autos rec.motorcycles "
    "rec.sport.baseball rec.sport.hockey sci.crypt sci.electronics sci.med sci.space "
    "soc.religion.christian talk.politics.guns talk.politics.mideast talk.politics.misc "
    "talk.religion.misc"
).split()

# The archive and the digest that scikit-learn's `fetch_20newsgroups` has.
_URL = "https://ndownloader.figshare.com/files/5975967"
SHA256 = "8f1b2514ca22a5ade8fbb9cfa5727df95fa587f4c87b786e15c759fa66d95610"


class Newsgroups20(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of Lang's 20 Newsgroups, split by date; needs no TensorFlow.

    Splits `train` and `test`, with `text`, a whole message with its headers, and `label`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    url_infos: dict[str, Any] = {}  # TFDS's own check wants the size too, which is not published

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                }
            ),
            supervised_keys=("text", "label"),
            homepage="http://qwone.com/~jason/20Newsgroups/",
        )

    def _split_generators(self, manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        archive = Path(manager.download(_URL))
        check(archive, "sha256", SHA256)
        return {split: self._generate_examples(archive, split) for split in ("train", "test")}

    def _generate_examples(self, archive: Path, split: str) -> Iterator[tuple[str, dict[str, str]]]:
        with tarfile.open(archive) as messages:
            for entry in messages:
                folder, _, rest = entry.name.partition("/")
                if folder != f"20news-bydate-{split}" or not entry.isfile():
                    continue
                content = messages.extractfile(entry)
                assert content is not None  # it is a file
                text = content.read().decode("latin-1")
                yield rest, {"text": text, "label": rest.partition("/")[0]}
