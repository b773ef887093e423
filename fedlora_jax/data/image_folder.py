"""Images of one's own: a folder `root/class/image.png`, or `root/domain/class/image.png`."""

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from fedlora_jax.data import bad_records
from fedlora_jax.data.bad_records import BadRecord
from fedlora_jax.data.held_out import split_of
from fedlora_jax.names import lookup

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class _File(NamedTuple):
    path: Path
    label: str
    domain: str | None


def load(
    split: str,
    root: str | os.PathLike[str],
    *,
    size: int,
    held_out: Mapping[str, float],
    on_bad_record: str = "stop",
) -> dict[str, np.ndarray]:
    """The images of a split.

    Args:
      split: `'federated'` or one that is held out.
      root: The folder.
      size: Side of the square that all images become: the middle of the image, resized.
      held_out: From split to the share of all images in it, chosen by a hash of the files; the
        rest is federated.
      on_bad_record: On a file that is no image: `'stop'`, or `'skip'` it, and warn.

    Returns:
      `image` uint8 `[M, size, size, 3]`, `label` int32 `[M]`, and `domain` int32 `[M]` if folders
      of classes lie in folders of domains.

    Raises:
      FileNotFoundError: If there is no image in the folder.
      ValueError: If there is no such split, or nothing in it, or a file is no image or lies
        elsewhere than the others.
    """
    lookup(dict.fromkeys(["federated", *held_out]), split, "split")
    labels, domains = class_names(root), class_names(root, "domain")
    contents = ((file, file.path.read_bytes()) for file in _files(Path(root)))
    results = (
        _read(file, content, size)
        for file, content in contents
        if split_of(content, held_out) == split
    )
    images, numbers, kinds = [], [], []
    for file, image in bad_records.good(results, on_bad_record):
        images.append(image)
        numbers.append(labels.index(file.label))
        kinds.append(domains.index(file.domain) if file.domain is not None else 0)
    if not images:
        raise ValueError(f"no image of {root} is in the split {split!r}")
    arrays = {"image": np.stack(images), "label": np.array(numbers, np.int32)}
    return {**arrays, "domain": np.array(kinds, np.int32)} if domains else arrays


def class_names(root: str | os.PathLike[str], feature: str = "label") -> list[str]:
    """Names of the classes, or of the domains, sorted; none where there are no domains.

    Args:
      root: The folder.
      feature: `'label'` or `'domain'`.

    Raises:
      FileNotFoundError: As `load`.
      ValueError: As `load`.
    """
    files = _files(Path(root))
    names = {"label": (f.label for f in files), "domain": (f.domain for f in files)}
    return sorted({name for name in lookup(names, feature, "feature") if name is not None})


def digest(root: str | os.PathLike[str]) -> str:
    """A name that changes with the files: their places and contents."""
    found = hashlib.sha256()
    root = Path(root).expanduser()
    for file in _files(root):
        found.update(f"{file.path.relative_to(root).as_posix()}\0".encode())
        found.update(hashlib.sha256(file.path.read_bytes()).digest())
    return found.hexdigest()[:12]


def _files(root: Path) -> list[_File]:
    root = root.expanduser()
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise FileNotFoundError(
            f"no image in {root}: expected root/class/image.png or root/domain/class/image.png"
        )
    depth = len(found[0].relative_to(root).parts)
    for path in found:
        if len(path.relative_to(root).parts) != depth or depth not in (2, 3):
            raise ValueError(
                f"{path} lies elsewhere than {found[0]}: expected all images in root/class/ or all "
                f"in root/domain/class/, where root is {root}"
            )
    return [
        _File(path, path.parent.name, path.parent.parent.name if depth == 3 else None)
        for path in found
    ]


def _read(file: _File, content: bytes, size: int) -> tuple[_File, np.ndarray] | BadRecord:
    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        return BadRecord(f"{file.path} is not an image that can be read: {error}")
    return file, np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC))
