"""Images of one's own: a folder `root/class/image.png`, or `root/domain/class/image.png`.

What is an image the end of its name says. Other files are passed over, and a warning counts them.
"""

import functools
import hashlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from fedlora_jax.data import bad_records, decoding
from fedlora_jax.data.bad_records import BadRecord
from fedlora_jax.data.held_out import split_by
from fedlora_jax.data.stored import Stored
from fedlora_jax.names import lookup

_NO_WARNING = {"desktop.ini", "thumbs.db"}  # nor hidden files
# Clocks of file systems are this coarse, ns: what was written within may change unnoticed.
_MOMENT = 2 * 10**9


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
    found = _files(Path(root))
    results = (
        file if isinstance(file, BadRecord) else _read(file, size)
        for file in _of_split(split, found, held_out)
    )
    files, images = [], []
    for file, image in bad_records.good(results, on_bad_record):
        files.append(file)
        images.append(image)
    columns = _columns(files, found, split, root)
    return {"image": np.stack(images), **columns}


def stored(
    split: str, root: str | os.PathLike[str], *, size: int, held_out: Mapping[str, float]
) -> Stored:
    """What `load` gives, with images that are decoded one by one when they are wanted.

    A file that is no image is found when it is wanted.

    Args:
      split: As for `load`.
      root: As for `load`.
      size: As for `load`.
      held_out: As for `load`.

    Raises:
      FileNotFoundError: As `load`.
      ValueError: If there is no such split, or nothing in it, or a file cannot be read or lies
        elsewhere than the others.
    """
    found = _files(Path(root))
    files = list(bad_records.good(_of_split(split, found, held_out), "stop"))

    def image(index: int) -> np.ndarray:
        result = _read(files[index], size)
        if isinstance(result, BadRecord):
            raise result
        return result[1]

    return Stored(_columns(files, found, split, root), image)


def _of_split(
    split: str, found: Sequence[_File], held_out: Mapping[str, float]
) -> Iterator[_File | BadRecord]:
    """The files of a split, and in each split what cannot be read, such as a link to nothing."""
    lookup(dict.fromkeys(["federated", *held_out]), split, "split")
    for file in found:
        content = _sha256(file.path)
        if isinstance(content, BadRecord):
            yield content
        elif split_by(content, held_out) == split:
            yield file


def _columns(
    files: Sequence[_File], found: Sequence[_File], split: str, root: str | os.PathLike[str]
) -> dict[str, np.ndarray]:
    """The number of each file's class, and of its domain if there are any."""
    if not files:
        raise ValueError(f"no image of {root} is in the split {split!r}")
    labels = {name: number for number, name in enumerate(_names(found, "label"))}
    domains = {name: number for number, name in enumerate(_names(found, "domain"))}
    columns = {"label": np.array([labels[file.label] for file in files], np.int32)}
    if domains:
        columns["domain"] = np.array([domains[file.domain or ""] for file in files], np.int32)
    return columns


def class_names(root: str | os.PathLike[str], feature: str = "label") -> list[str]:
    """Names of the classes, or of the domains, sorted; none where there are no domains.

    Args:
      root: The folder.
      feature: `'label'` or `'domain'`.

    Raises:
      FileNotFoundError: As `load`.
      ValueError: As `load`.
    """
    return _names(_files(Path(root)), feature)


def _names(files: Sequence[_File], feature: str) -> list[str]:
    names = {"label": (f.label for f in files), "domain": (f.domain for f in files)}
    return sorted({name for name in lookup(names, feature, "feature") if name is not None})


def digest(root: str | os.PathLike[str]) -> str:
    """A name that changes with the files: their places and contents."""
    found = hashlib.sha256()
    root = Path(root).expanduser()
    for file in _files(root):
        found.update(f"{file.path.relative_to(root).as_posix()}\0".encode())
        content = _sha256(file.path)
        found.update(b"" if isinstance(content, BadRecord) else content)
    return found.hexdigest()[:12]


def _sha256(path: Path) -> bytes | BadRecord:
    """Of what is in a file, which is read once as long as it does not change."""
    try:
        now = path.stat()
        if time.time_ns() - now.st_mtime_ns < _MOMENT:
            return hashlib.sha256(path.read_bytes()).digest()
        return _sha256_of(str(path), now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
    except OSError as error:
        return BadRecord(f"{path} cannot be read: {error.strerror}")


@functools.lru_cache(maxsize=1 << 20)
def _sha256_of(path: str, *state: int) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def _files(root: Path) -> list[_File]:
    root = root.expanduser()
    found: list[Path] = []
    others: list[Path] = []
    for path in sorted(_walk(root)) if root.is_dir() else ():
        (found if path.suffix.lower() in decoding.suffixes() else others).append(path)
    others = [path for path in others if not _is_by_the_way(path.relative_to(root))]
    if not found:
        endings = ", ".join(sorted({path.suffix.lower() or "nothing" for path in others}))
        raise FileNotFoundError(
            f"no image in {root}{', only files ending in ' * bool(others)}{endings}: expected "
            "root/class/image.png or root/domain/class/image.png"
        )
    if others:
        warnings.warn(
            f"{len(others)} file{'s'[: len(others) > 1]} in {root} passed over, no images by their "
            f"names, first {others[0]}",
            stacklevel=1,  # one place, so that it is said once
        )
    depth = len(found[0].relative_to(root).parts)
    for path in found:
        if (own := len(path.relative_to(root).parts)) not in (2, 3):
            raise ValueError(
                f"{path} lies elsewhere than expected: {root}/CLASS/{path.name} or "
                f"{root}/DOMAIN/CLASS/{path.name}"
            )
        if own != depth:
            raise ValueError(
                f"{path} lies elsewhere than {found[0]}: expected all images in root/class/ or all "
                f"in root/domain/class/, where root is {root}"
            )
    return [
        _File(path, path.parent.name, path.parent.parent.name if depth == 3 else None)
        for path in found
    ]


def _walk(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All files below a folder, also by links to folders, but for those that lead back above."""
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(Path(entry.path), above | {here})
            else:
                yield Path(entry.path)


def _is_by_the_way(path: Path) -> bool:
    return path.name.lower() in _NO_WARNING or any(part.startswith(".") for part in path.parts)


def _read(file: _File, size: int) -> tuple[_File, np.ndarray] | BadRecord:
    content = file.path.read_bytes()
    try:
        with decoding.opened(content) as image:
            ImageOps.exif_transpose(image, in_place=True)
            upright = decoding.eight_bits(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        return BadRecord(f"{file.path} is not an image that can be read: {error}")
    return file, np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC))
