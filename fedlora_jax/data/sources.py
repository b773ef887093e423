"""Data sets by name, read from ArrayRecord files into NumPy arrays, without TensorFlow.

One way in for all of them: TFDS finds the files and decodes the examples (images through OpenCV or
Pillow). The embedded data sets are made on first use; a public one is downloaded and prepared once,
beforehand, by `experiments/prepare_data.py`.
"""

import contextlib
import difflib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fedlora_jax.data import builders
from fedlora_jax.data.digits_domains import DigitsDomains
from fedlora_jax.names import lookup

_CHUNK = 256  # records read at a time

_EMBEDDED: dict[str, type[tfds.core.DatasetBuilder]] = {"digits_domains": DigitsDomains}


def load(
    name: str, split: str, data_dir: str | os.PathLike[str] | None = None
) -> dict[str, np.ndarray]:
    """Reads a split of a data set into memory.

    Args:
      name: A data set, `"cifar100"`, or one with its config, `"domainnet/real"`.
      split: A split in the language of TFDS, `"train"` or `"train[:10%]"`.
      data_dir: Where prepared data sets are. By default the environment variable
        `FEDLORA_DATA_DIR`, or else the directory of TFDS.

    Returns:
      One array a feature, all with the same leading axis of examples in the order of the files:
      `image` uint8 `[M, H, W, C]`, `label` int32 `[M]`, `domain` int32 `[M]` where there is one,
      and whatever other numbers the data set has. Text is left out.

    Raises:
      ValueError: If there is no such data set or split, or if it has features of unequal shapes.
      FileNotFoundError: If it is not prepared; the message says which command prepares it.
    """
    source = _builder(name, data_dir).as_data_source(split)
    return _stack(source.__getitems__(range(len(source))), name)


def records(
    name: str, split: str, data_dir: str | os.PathLike[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a split as TFDS decodes them, text as bytes, each with a name for messages.

    Raises:
      ValueError: If there is no such data set or split.
      FileNotFoundError: As `load`.
    """
    builder = _builder(name, data_dir)
    source = builder.as_data_source(split)
    for start in range(0, len(source), _CHUNK):
        places = range(start, min(start + _CHUNK, len(source)))
        for place, record in zip(places, source.__getitems__(places)):
            yield f"{builder.info.full_name}:{split}:{place}", record


def info(name: str, data_dir: str | os.PathLike[str] | None = None) -> tfds.core.DatasetInfo:
    """What TFDS knows of a prepared data set: its features, splits and version.

    Raises:
      ValueError: If there is no such data set.
      FileNotFoundError: As `load`.
    """
    return _builder(name, data_dir).info


def full_name(name: str, data_dir: str | os.PathLike[str] | None = None) -> str:
    """The name of a data set with its config and version, `"digits_domains/2.0.0"`.

    Raises:
      ValueError: If there is no such data set.
      FileNotFoundError: As `load`.
    """
    return info(name, data_dir).full_name


def class_names(
    name: str, feature: str = "label", data_dir: str | os.PathLike[str] | None = None
) -> list[str]:
    """Names of the classes of an integer feature, such as `"label"` or `"domain"`, in order.

    Raises:
      ValueError: If the data set has no such feature or it has no classes.
      FileNotFoundError: As `load`.
    """
    features = info(name, data_dir).features
    classes = {key: value for key, value in features.items() if hasattr(value, "names")}
    return list(lookup(classes, feature, f"class feature of {name!r}").names)


def directory_of(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where prepared data sets are, as for `load`."""
    return Path(
        data_dir or os.environ.get("FEDLORA_DATA_DIR") or tfds.core.constants.DATA_DIR
    ).expanduser()


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> tfds.core.DatasetBuilder:
    directory = directory_of(data_dir)
    if name in _EMBEDDED:
        _prepare(_EMBEDDED[name], directory)
    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=directory)
    except tfds.core.DatasetNotFoundError:
        _check_known(name.partition("/")[0])
        raise FileNotFoundError(
            f"data set {name!r} is not prepared in {directory}. Prepare it once with\n"
            "  pip install 'fedlora-jax[prepare]'\n"
            f"  python -m experiments.prepare_data --dataset={name} --data_dir={directory}"
        ) from None


def _check_known(name: str) -> None:
    known = {*_EMBEDDED, *builders.names()}
    if name in known:
        return
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(
        f"unknown data set {name!r}.{hint} Embedded are {', '.join(_EMBEDDED)}; others are those "
        "of the TFDS catalogue and whatever has been prepared in the data directory."
    )


def _prepare(builder_type: type[tfds.core.DatasetBuilder], directory: Path) -> None:
    """Makes an embedded data set unless it is there.

    TFDS writes to a directory beside it and renames that at the end: a kill leaves no half data
    set.
    """
    builder = builder_type(data_dir=directory, file_format="array_record")
    if builder.data_path.exists():
        return
    try:
        with _quiet():
            builder.download_and_prepare()
    except OSError:
        # Another process may have made it meanwhile; then the renaming fails, and all is well.
        if not builder.data_path.exists():
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves TFDS its progress bars on a terminal, and nothing anywhere else."""
    if sys.stderr.isatty():
        yield
        return
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def _stack(examples: Sequence[dict[str, Any]], name: str) -> dict[str, np.ndarray]:
    """Stacks examples feature by feature, with integers as int32, the type JAX has them in."""
    if not examples:
        raise ValueError(f"the split of data set {name!r} is empty")
    arrays = {}
    for key in examples[0]:
        try:
            array = np.stack([np.asarray(example[key]) for example in examples])
        except ValueError:
            raise ValueError(
                f"the examples of data set {name!r} differ in the shape of {key!r}"
            ) from None
        if array.dtype.kind in "biuf":
            arrays[key] = array.astype(np.int32) if array.dtype == np.int64 else array
    return arrays
