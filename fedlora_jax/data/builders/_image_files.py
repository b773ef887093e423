"""What builders of image files have in common: every file is tried before anything is written."""

import abc
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from tqdm import tqdm

from fedlora_jax.data import bad_records
from fedlora_jax.data.decoding import decode

_PER_SHARD = 2000


class ImageFile(NamedTuple):
    """An image that is to become an example.

    Attributes:
      path: The file.
      name: What it is called in the data set, for messages and as the feature `file_name`.
      features: All other features, such as the label.
      split: In which split it is; None where the content decides.
    """

    path: Path
    name: str
    features: Mapping[str, Any]
    split: str | None = None


class ImageFiles(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes image files as the bytes they are; needs no TensorFlow, whatever the size.

    In a split, images are in the order of a hash of their bytes, so that every part of it holds
    all classes, and the same files give the same data set.
    """

    url_infos: dict[str, Any] = {}  # no checksums for TFDS to look up

    def __init__(self, *, on_bad_record: str = "stop", **kwargs: Any):
        """Builds it.

        Args:
          on_bad_record: `'stop'` at a file that is no image, or `'skip'` such files.
          **kwargs: Those of TFDS.
        """
        bad_records.check_policy(on_bad_record)
        self.on_bad_record = on_bad_record
        super().__init__(**kwargs)

    @abc.abstractmethod
    def _files(self, dl_manager: tfds.download.DownloadManager) -> Sequence[ImageFile]:
        """All image files, downloaded."""

    def _split_of(self, file: ImageFile, content: bytes) -> str:
        """The split of an image."""
        assert file.split is not None
        return file.split

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, list[Callable[[], Iterator[Any]]]]:
        files = self._files(dl_manager)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            tried = tqdm(
                pool.map(self._try, files),
                desc="Reading images",
                total=len(files),
                disable=not sys.stderr.isatty(),
            )
            found = list(bad_records.good(tried, self.on_bad_record))
        self.info.metadata["skipped"] = len(files) - len(found)
        splits: dict[str, list[ImageFile]] = {}
        for split, _, file in sorted(found, key=lambda each: each[:2]):
            splits.setdefault(split, []).append(file)
        return {
            split: [
                functools.partial(_examples, members[start : start + _PER_SHARD])
                for start in range(0, len(members), _PER_SHARD)
            ]
            for split, members in splits.items()
        }

    def _try(self, file: ImageFile) -> tuple[str, bytes, ImageFile] | bad_records.BadRecord:
        """Where the image goes: its split, its place in that, and itself."""
        try:
            content = file.path.read_bytes()
            decode(content)
        except (ValueError, OSError) as error:
            return bad_records.BadRecord(f"{file.path}: {error}")
        # The name tells equal images apart.
        place = hashlib.sha256(content).digest() + file.name.encode()
        return self._split_of(file, content), place, file


def _examples(files: Sequence[ImageFile]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        yield file.name, {"image": str(file.path), "file_name": file.name, **file.features}
