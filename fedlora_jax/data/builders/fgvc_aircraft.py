"""FGVC-Aircraft: photographs of aircraft in 100 variants.

Published by Maji et al., *Fine-Grained Visual Classification of Aircraft*, 2013, arXiv:1306.5151:
`fgvc-aircraft-2013b/data` with `images/*.jpg`, `variants.txt`, and `images_variant_<split>.txt`,
whose lines are the name of an image, a space, and its variant.
"""

from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from fedlora_jax.data.builders._archive import check
from fedlora_jax.data.builders._image_files import ImageFile, ImageFiles

URL = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"
MD5 = "d4acdd33327262359767eeaa97a4f732"  # as its authors publish it
SPLITS = {"train": "train", "validation": "val", "test": "test"}  # from ours to the files'


class FgvcAircraft(ImageFiles):
    """TFDS builder of the published splits, labels at the level of variants.

    The lowest 20 rows of each image say who took it; they are part of the image, as published.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            homepage="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(num_classes=100),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            metadata=tfds.core.MetadataDict(),
        )

    def _files(self, dl_manager: tfds.download.DownloadManager) -> Sequence[ImageFile]:
        archive = Path(dl_manager.download(URL))
        check(archive, "md5", MD5)
        root = Path(dl_manager.extract(archive)) / "fgvc-aircraft-2013b" / "data"
        variants = (root / "variants.txt").read_text().splitlines()
        self.info.features["label"].names = variants
        files = []
        for split, suffix in SPLITS.items():
            listing = root / f"images_variant_{suffix}.txt"
            for number, line in enumerate(listing.read_text().splitlines(), start=1):
                name, _, variant = line.partition(" ")
                if variant not in variants:
                    raise ValueError(f"{listing}:{number}: {variant!r} is not in variants.txt")
                path = root / "images" / f"{name}.jpg"
                files.append(ImageFile(path, path.name, {"label": variant}, split))
        return files
