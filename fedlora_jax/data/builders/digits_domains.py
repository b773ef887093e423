"""Handwritten digits in six domains: a small, real, offline stand-in for DomainNet.

The images are the 1,797 of scikit-learn's `load_digits` (UCI "Optical Recognition of Handwritten
Digits", Alpaydin and Kaynak, 1998), so the data set is made on any machine without a download. Each
8 x 8 digit is enlarged to 12 x 12 by cubic interpolation and centred on 16 x 16 pixels, which gives
geometry and strokes room; then each domain draws the same digit in its own way:

  original     bright strokes on black
  inverted     contrast: dark strokes on white
  transposed   geometry: mirrored along the diagonal
  sheared      geometry: slanted by 42 degrees
  outlined     strokes: only their edges
  noisy        noise: half the contrast, on grey, with Gaussian noise of standard deviation 0.08
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from scipy import ndimage

IMAGE_SIZE = 16
MARGIN = 2  # pixels left free on each side of the enlarged digit
SPLIT_SIZES = {"pretrain": 600, "federated": 797, "validation": 200, "test": 200}  # source images
SEED = 0

Image = np.ndarray  # [16, 16], float, 0 (black) to 1 (white)


def _invert(image: Image, _: np.random.Generator) -> Image:
    return 1 - image


def _transpose(image: Image, _: np.random.Generator) -> Image:
    return image.T


def _shear(image: Image, _: np.random.Generator) -> Image:
    slant, centre = 0.9, (IMAGE_SIZE - 1) / 2
    return ndimage.affine_transform(
        image, [[1, 0], [slant, 1]], offset=[0, -slant * centre], order=1
    )


def _outline(image: Image, _: np.random.Generator) -> Image:
    return np.hypot(ndimage.sobel(image, 0), ndimage.sobel(image, 1)) / 3


def _add_noise(image: Image, generator: np.random.Generator) -> Image:
    return 0.4 + 0.5 * image + generator.normal(0, 0.08, image.shape)


DOMAINS: dict[str, Callable[[Image, np.random.Generator], Image]] = {
    "original": lambda image, _: image,
    "inverted": _invert,
    "transposed": _transpose,
    "sheared": _shear,
    "outlined": _outline,
    "noisy": _add_noise,
}


class DigitsDomains(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the six domains; writes ArrayRecord files and needs no TensorFlow.

    Splits are disjoint in source images and stratified by label:

      pretrain    600 images, in the domain `original` only
      federated   797 images, each in all six domains (4,782 examples)
      validation  200 images, each in all six domains (1,200 examples): to choose settings on
      test        200 images, each in all six domains (1,200 examples)

    An example holds `image` (uint8 `[16, 16, 1]`) and the integers `label`, `domain` and
    `image_id`, the position in `load_digits` of the image it was made from.
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {
        "2.0.0": "A split `validation`, taken out of `federated`; the other splits stay the same.",
        "1.0.0": "First release.",
    }
    url_infos: dict[str, Any] = {}  # nothing to download; TFDS need not look for a list of it

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    # Not features.Image: that one needs TensorFlow to encode.
                    "image": tfds.features.Tensor(
                        shape=(IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.uint8
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "domain": tfds.features.ClassLabel(names=list(DOMAINS)),
                    "image_id": np.int64,
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, _: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        from sklearn.datasets import load_digits  # a second of imports, needed once

        digits = load_digits()
        return {
            split: _examples(
                digits, image_ids, ["original"] if split == "pretrain" else list(DOMAINS)
            )
            for split, image_ids in _split(digits.target).items()
        }

    def _generate_examples(self) -> None:
        """Unused: `_split_generators` returns the examples themselves."""


def _examples(digits: Any, image_ids: np.ndarray, domains: list[str]) -> Iterator[tuple[str, dict]]:
    """Yields `(key, example)` for every source image in every one of the domains."""
    for image_id in image_ids.tolist():
        image = _enlarge(digits.images[image_id] / 16)
        for domain in domains:
            yield (
                f"{domain}_{image_id}",
                {
                    "image": draw(image, domain, image_id),
                    "label": int(digits.target[image_id]),
                    "domain": domain,
                    "image_id": image_id,
                },
            )


def draw(image: Image, domain: str, image_id: int) -> np.ndarray:
    """Draws an enlarged digit in a domain.

    Args:
      image: `[16, 16]`, 0 to 1.
      domain: A key of `DOMAINS`.
      image_id: Seeds what is random in the domain, so that an image never changes.

    Returns:
      uint8 `[16, 16, 1]`.
    """
    drawn = DOMAINS[domain](image, np.random.default_rng([SEED, image_id]))
    return np.rint(255 * np.clip(drawn, 0, 1)).astype(np.uint8)[..., None]


def _enlarge(image: Image) -> Image:
    """Enlarges a digit and frames it with black, `[8, 8] -> [16, 16]`."""
    scale = (IMAGE_SIZE - 2 * MARGIN) / image.shape[0]
    enlarged = ndimage.zoom(image, scale, order=3, mode="nearest", grid_mode=True)
    return np.pad(np.clip(enlarged, 0, 1), MARGIN)


def _split(labels: np.ndarray) -> dict[str, np.ndarray]:
    """The positions of the source images of each split."""
    sizes = SPLIT_SIZES
    # `validation` comes out of `federated` in a second step, so that `pretrain` and `test` hold
    # the images of version 1: no backbone pretrained then has seen an image it is tested on.
    pretrain, others, test = _stratified_split(
        labels, [sizes["pretrain"], sizes["federated"] + sizes["validation"], sizes["test"]], SEED
    )
    federated, validation = (
        others[part]
        for part in _stratified_split(
            labels[others], [sizes["federated"], sizes["validation"]], SEED
        )
    )
    return {"pretrain": pretrain, "federated": federated, "validation": validation, "test": test}


def _stratified_split(labels: np.ndarray, sizes: list[int], seed: int) -> list[np.ndarray]:
    """Splits positions `0 .. len(labels) - 1` into parts of these sizes, alike in their labels."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    # Every label is one run of `by_label`; a part takes positions spread evenly over all runs.
    owner = np.repeat(np.arange(len(sizes)), sizes)
    phase = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    owner = owner[np.argsort(phase, kind="stable")]
    return [np.sort(by_label[owner == part]) for part in range(len(sizes))]
