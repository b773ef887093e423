"""NICO++: photographs of sixty classes in six contexts.

Published by Zhang et al., *NICO++: Towards Better Benchmarking for Domain Generalization*, CVPR
2023, arXiv:2204.08040. The archive `track_1.zip`, of its track on domain generalisation, holds
`public_dg_0416/train/<context>/<class>/*.jpg`, 88,866 images with labels.
"""

from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from fedlora_jax.data.builders._image_files import ImageFile, ImageFiles
from fedlora_jax.data.held_out import split_of
from fedlora_jax.names import lookup

CONTEXTS = ("autumn", "dim", "grass", "outdoor", "rock", "water")
CLASSES = (
    *("airplane", "bear", "bicycle", "bird", "bus", "butterfly", "cactus", "car", "cat", "chair"),
    *("clock", "corn", "cow", "crab", "crocodile", "dog", "dolphin", "elephant", "fishing rod"),
    *("flower", "football", "fox", "frog", "giraffe", "goose", "gun", "hat", "helicopter", "horse"),
    *("hot air balloon", "kangaroo", "lifeboat", "lion", "lizard", "mailbox", "monkey"),
    *("motorcycle", "ostrich", "owl", "pineapple", "pumpkin", "rabbit", "racket", "sailboat"),
    *("scooter", "seal", "sheep", "ship", "shrimp", "spider", "squirrel", "sunflower", "tent"),
    *("tiger", "tortoise", "train", "truck", "umbrella", "wheat", "wolf"),
)
TEST_SHARE = 0.2
_FOLDER = "public_dg_0416/train"


class NicoPp(ImageFiles):
    """TFDS builder; the published test images have no labels, so a fifth is held out.

    Which fifth depends on a hash of each file, so that equal images are in one split. The papers
    that train on it publish no split: this one is ours.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download track_1.zip of NICO++ (https://nicochallenge.com/dataset) and unpack it here, so "
        f"that there is {_FOLDER}/autumn/airplane with images."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            homepage="https://nicochallenge.com/dataset",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                    "domain": tfds.features.ClassLabel(names=CONTEXTS),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            metadata=tfds.core.MetadataDict(),
        )

    def _files(self, dl_manager: tfds.download.DownloadManager) -> Sequence[ImageFile]:
        root = _root(Path(dl_manager.manual_dir))
        files = []
        for path in sorted(root.glob("*/*/*.jpg")):
            context, label, _ = name = path.relative_to(root).parts
            lookup(dict.fromkeys(CONTEXTS), context, f"context in {root}:")
            lookup(dict.fromkeys(CLASSES), label, f"class in {root / context}:")
            files.append(ImageFile(path, "/".join(name), {"label": label, "domain": context}))
        missing = sorted(set(CONTEXTS) - {str(file.features["domain"]) for file in files})
        if missing:
            raise FileNotFoundError(f"no image of {', '.join(missing)} in {root}/<context>/<class>")
        return files

    def _split_of(self, file: ImageFile, content: bytes) -> str:
        return "test" if split_of(content, {"test": TEST_SHARE}) == "test" else "train"


def _root(manual: Path) -> Path:
    """The folder of contexts, with or without the one that the archive is named after."""
    for root in (manual / _FOLDER, manual / "track_1" / _FOLDER):
        if root.is_dir():
            return root
    raise FileNotFoundError(
        f"no folder {_FOLDER} in {manual}. {NicoPp.MANUAL_DOWNLOAD_INSTRUCTIONS}"
    )
