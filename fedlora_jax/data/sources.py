"""Data sets by name, read from ArrayRecord files into NumPy arrays, without TensorFlow.

One way in for all of them: TFDS finds the files and reads the examples, Pillow decodes the images.
The embedded data sets are made on first use; a public one is downloaded and prepared once,
beforehand, by `experiments/prepare_data.py`.
"""

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from fedlora_jax.data import bad_records, builders
from fedlora_jax.data.bad_records import BadRecord
from fedlora_jax.data.decoding import decode
from fedlora_jax.data.stored import Stored
from fedlora_jax.names import lookup

EMBEDDED = ("digits_domains",)
# Data sets whose configs in TFDS are domains with the same classes.
DOMAINS = {
    "domainnet": ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
}
_CHUNK = 256  # records read at a time, before they are decoded

Directory = str | os.PathLike[str] | None


class _Reading(NamedTuple):
    """What is made of each record."""

    features: dict[str, Any]
    size: int | None
    classes: int | None
    images: bool = True


def load(
    name: str,
    split: str,
    data_dir: Directory = None,
    *,
    size: int | None = None,
    classes: int | None = None,
    on_bad_record: str = "stop",
) -> dict[str, np.ndarray]:
    """Reads a split of a data set into memory.

    Args:
      name: A data set, `"cifar100"`, or one with its config, `"domainnet/real"`. `"domainnet"` is
        all of its six domains, one after the other, with a feature `domain`.
      split: A split in the language of TFDS, `"train"` or `"train[:10%]"`; of each domain.
      data_dir: Where prepared data sets are. By default the environment variable
        `FEDLORA_DATA_DIR`, or else the directory of TFDS.
      size: Side of the square that images are resized to, whole, by bicubic interpolation; None
        for images that are all of one size.
      classes: How many classes to keep, the first ones; None for all.
      on_bad_record: On an image that cannot be decoded or a label that is no class: `"stop"`, or
        `"skip"` such records, and warn with their number.

    Returns:
      One array a feature, all with the same leading axis of examples in the order of the files:
      `image` uint8 `[M, H, W, C]`, `label` int32 `[M]`, `domain` int32 `[M]` where there is one,
      and whatever other numbers the data set has. Text and other pictures are left out.

    Raises:
      ValueError: If there is no such data set or split, if it has features of unequal shapes, if
        it is of a version that this code does not know, or on a bad record or damaged file; the
        message says which, and what mends it.
      FileNotFoundError: If it is not prepared; the message says which command prepares it.
    """
    bad_records.check_policy(on_bad_record)
    parts = _builders(name, data_dir)
    features = dict(next(iter(parts.values())).info.features)
    _check_wanted(name, features, size, classes)
    reading = _Reading(features, size, classes)
    results = itertools.chain.from_iterable(
        _read(part, split, reading, {"domain": number} if domain else {})
        for number, (domain, part) in enumerate(parts.items())
    )
    return _stack(filter(None, bad_records.good(results, on_bad_record)), name)


def stored(
    name: str,
    split: str,
    data_dir: Directory = None,
    *,
    size: int | None = None,
    classes: int | None = None,
) -> Stored:
    """What `load` gives, with images that are decoded one by one when they are wanted.

    Every record is read once, for what it holds besides its image.

    Args:
      name: As for `load`.
      split: As for `load`.
      data_dir: As for `load`.
      size: As for `load`.
      classes: As for `load`.

    Raises:
      ValueError: As `load`, but of images when they are wanted; or if the data set has none.
      FileNotFoundError: As `load`.
    """
    parts = _builders(name, data_dir)
    features = dict(next(iter(parts.values())).info.features)
    _check_wanted(name, features, size, classes)
    if "image" not in features:
        raise ValueError(f"data set {name!r} has no images that could be read one by one")
    reading = _Reading(features, size, classes, images=False)
    images: list[_Images] = []
    kept: list[tuple[int, int]] = []

    def scan() -> Iterator[dict[str, Any]]:
        for number, (domain, part) in enumerate(parts.items()):
            encoded = ["image"] if _is_encoded(features["image"]) else []
            images.append(_Images(part, split, _source(part, split, encoded), reading))
            results = _read(part, split, reading, {"domain": number} if domain else {})
            for index, example in enumerate(bad_records.good(results, "stop")):
                if example:
                    kept.append((number, index))
                    yield example

    columns = _stack(scan(), name)
    places = np.array(kept)
    shape = _image(images[places[0, 0]], int(places[0, 1])).shape

    def image(index: int) -> np.ndarray:
        number, place = places[index].tolist()
        pixels = _image(images[number], place)
        if pixels.shape != shape:
            raise ValueError(_unequal(name, "image", pixels.shape, shape))
        return pixels

    return Stored(columns, image)


class _Images(NamedTuple):
    """The images of a part of a data set."""

    builder: tfds.core.DatasetBuilder
    split: str
    source: Sequence[dict[str, Any]]
    reading: _Reading


def _image(images: _Images, index: int) -> np.ndarray:
    """The image of a record."""
    try:
        found, feature = images.source[index]["image"], images.reading.features["image"]
        if not _is_encoded(feature):
            return np.asarray(found)
        return decode(found, channels=feature.shape[-1], size=images.reading.size)
    except Exception as error:  # also what a C++ library raises on bytes that are not its own
        place = index
        for file in images.builder.info.splits[images.split].file_instructions:
            if place < file.take:
                where = f"{file.filename}: record {file.skip + place} of split {images.split!r}"
                raise BadRecord(f"{where}: {error}") from error
            place -= file.take
        raise


def records(
    name: str, split: str, data_dir: Directory = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a split as TFDS decodes them, text as bytes, each with the place where it is.

    Raises:
      ValueError: If there is no such data set or split, or a file is damaged.
      FileNotFoundError: As `load`.
    """
    for builder in _builders(name, data_dir).values():
        yield from _records(builder, split)


def info(name: str, data_dir: Directory = None) -> tfds.core.DatasetInfo:
    """What TFDS knows of a prepared data set, or of its first domain: features, splits, version.

    Raises:
      ValueError: If there is no such data set.
      FileNotFoundError: As `load`.
    """
    return next(iter(_builders(name, data_dir).values())).info


def full_name(name: str, data_dir: Directory = None) -> str:
    """The name of a data set with its config and version, `"digits_domains/2.0.0"`.

    Raises:
      ValueError: If there is no such data set.
      FileNotFoundError: As `load`.
    """
    found = info(name, data_dir)
    return f"{name}/{found.version}" if name in DOMAINS else found.full_name


def class_names(name: str, feature: str = "label", data_dir: Directory = None) -> list[str]:
    """Names of the classes of an integer feature, such as `"label"` or `"domain"`, in order.

    Raises:
      ValueError: If the data set has no such feature or it has no classes.
      FileNotFoundError: As `load`.
    """
    if name in DOMAINS and feature == "domain":
        return list(DOMAINS[name])
    features = info(name, data_dir).features
    classes = {key: value for key, value in features.items() if hasattr(value, "names")}
    return list(lookup(classes, feature, f"class feature of {name!r}").names)


def directory_of(data_dir: Directory = None) -> Path:
    """Where prepared data sets are: `data_dir`, or `FEDLORA_DATA_DIR`, or TFDS's own."""
    return Path(
        data_dir or os.environ.get("FEDLORA_DATA_DIR") or tfds.core.constants.DATA_DIR
    ).expanduser()


def damage(directory: str | os.PathLike[str]) -> str | None:
    """Reads all records of a prepared data set; says what is wrong with its files, or None.

    Args:
      directory: `DATA_DIR/NAME/[CONFIG/]VERSION`.

    Raises:
      ValueError: If the files are not ArrayRecord files.
    """
    try:
        builder = tfds.core.read_only_builder.builder_from_directory(directory)
    except Exception as error:  # whatever TFDS raises on a file that is missing or cut short
        return f"{directory} cannot be read: {error}"
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{directory} holds files of another format, {builder.info.file_format}: choose "
            "another --data_dir"
        )
    try:
        for split in builder.info.splits:
            for _ in _records(builder, split, raw=True):
                pass
    except ValueError as error:
        return str(error)
    return None


def _builders(name: str, data_dir: Directory) -> dict[str, tfds.core.DatasetBuilder]:
    """The parts of a data set by the domain that each is; one called '' where there are none."""
    directory = directory_of(data_dir)
    parts = {domain: f"{name}/{domain}" for domain in DOMAINS.get(name, ())} or {"": name}
    return {domain: _builder(part, directory) for domain, part in parts.items()}


def _builder(name: str, directory: Path) -> tfds.core.DatasetBuilder:
    base = name.partition("/")[0].partition(":")[0]
    if name in EMBEDDED:
        with _named_damage(name, directory):
            _prepare(builders.BUILDERS[name], directory)
    found = _found(name, directory)
    try:
        known = builders.get(base)
    except ValueError:
        if found is None:
            raise
        return found  # made by other code: nothing is known of its versions
    if found is None:
        check_part(known, name.partition(":")[0].partition("/")[2])
        raise FileNotFoundError(
            f"data set {name!r} is not prepared in {directory}. Prepare it once with\n"
            f"{_command(name, directory)}"
        )
    configs = {config.name: config for config in known.BUILDER_CONFIGS}
    own = configs.get(name.partition(":")[0].partition("/")[2])
    newest = own.version if own is not None and own.version else known.VERSION
    older = (own.supported_versions if own is not None else None) or known.SUPPORTED_VERSIONS
    versions = [str(newest), *map(str, older)]
    if str(found.version) in versions:
        return found
    for version in versions:
        if ":" not in name and (other := _found(f"{name}:{version}", directory)):
            return other
    raise ValueError(
        f"data set {name!r} is prepared in {directory} in version {found.version}, but this code "
        f"knows {', '.join(dict.fromkeys(versions))}. Prepare it in that version, beside the "
        f"other, with\n{_command(name, directory)}"
    )


def check_part(kind: type[tfds.core.DatasetBuilder], part: str) -> None:
    """Checks that a data set has a part of this name; without a name, that it is one whole.

    Args:
      kind: Its builder.
      part: The name of a config, `"sst2"`, or empty.

    Raises:
      ValueError: If not; it names the nearest part.
    """
    known = dict.fromkeys(f"{kind.name}/{each.name}" for each in kind.BUILDER_CONFIGS)
    if known and (part or kind.name not in DOMAINS):
        lookup(known, f"{kind.name}/{part}", f"part of {kind.name}")


def _found(name: str, directory: Path) -> tfds.core.DatasetBuilder | None:
    with _named_damage(name, directory):
        try:
            return tfds.core.read_only_builder.builder_from_files(name, data_dir=directory)
        except tfds.core.DatasetNotFoundError:
            return None
        except ValueError:
            if name and _place(name, directory).is_dir():
                raise
            return None  # no name of a data set


def _place(name: str, directory: Path) -> Path:
    return directory / name.partition(":")[0]


@contextlib.contextmanager
def _named_damage(name: str, directory: Path) -> Iterator[None]:
    """Names the data set whose description TFDS cannot read, on which it raises what comes."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, tfds.core.dataset_info.DatasetInfoFileError)
        place = _place(name, directory)
        if not place.is_dir() or (isinstance(error, OSError) and not known):
            raise
        raise ValueError(
            f"data set {name!r} is damaged: {error}. Remove {place}, and make it anew with\n"
            f"{_command(name, directory)}"
        ) from error


def _command(name: str, directory: str | os.PathLike[str]) -> str:
    """What prepares a data set."""
    name = name.partition(":")[0]
    base = name.partition("/")[0]
    return (
        f"  pip install -e '.[prepare]'\n"
        f"  python -m experiments.prepare_data --dataset={base if base in DOMAINS else name} "
        f"--data_dir={directory}"
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
        with quiet():
            builder.download_and_prepare()
    except OSError:
        # Another process may have made it meanwhile; then the renaming fails, and all is well.
        if not builder.data_path.exists():
            raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


def _check_wanted(
    name: str, features: dict[str, Any], size: int | None, classes: int | None
) -> None:
    if size is not None and not _is_encoded(features.get("image")):
        raise ValueError(f"data set {name!r} has no image files that could be resized to {size}")
    if classes is not None:
        most = getattr(features.get("label"), "num_classes", 0)
        if not 0 < classes <= most:
            raise ValueError(f"{classes} classes are wanted of data set {name!r}, which has {most}")


def _is_encoded(feature: Any) -> bool:
    """Whether a feature is an image file of bytes, as which Pillow reads it."""
    return isinstance(feature, tfds.features.Image) and feature.np_dtype == np.uint8


def _read(
    builder: tfds.core.DatasetBuilder, split: str, reading: _Reading, more: dict[str, int]
) -> Iterator[dict[str, Any] | BadRecord]:
    """The examples of a split; an empty one in place of each that is not wanted."""
    encoded = [key for key, feature in reading.features.items() if _is_encoded(feature)]

    def finish(record: tuple[str, dict[str, Any]]) -> dict[str, Any] | BadRecord:
        place, example = record
        pictures = {key: example.pop(key) for key in encoded}
        if not reading.images:
            example.pop("image", None)
        try:
            _check_classes(example, reading.features)
            if reading.classes is not None and example["label"] >= reading.classes:
                return {}
            if "image" in pictures and reading.images:
                channels = reading.features["image"].shape[-1]
                example["image"] = decode(pictures["image"], channels=channels, size=reading.size)
        except ValueError as error:
            return BadRecord(f"{place}: {error}")
        return {**example, **more}

    records = _records(builder, split, undecoded=encoded)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(itertools.islice(records, _CHUNK)):
            yield from pool.map(finish, chunk)


def _check_classes(example: dict[str, Any], features: dict[str, Any]) -> None:
    for key, feature in features.items():
        if isinstance(feature, tfds.features.ClassLabel):
            if not 0 <= example[key] < feature.num_classes:
                raise ValueError(
                    f"{key} {example[key]} is not a class, 0 to {feature.num_classes - 1}"
                )


def _records(
    builder: tfds.core.DatasetBuilder,
    split: str,
    *,
    undecoded: Sequence[str] = (),
    raw: bool = False,
) -> Iterator[tuple[str, Any]]:
    """The records of a split, each with the file and place in it where it is.

    Raises:
      ValueError: If there is no such split, or a file is damaged.
    """
    source = _source(builder, split, undecoded, raw=raw)
    start = 0
    for file in builder.info.splits[split].file_instructions:
        _check_length(builder, Path(file.filename), file.examples_in_shard)
        for first in range(0, file.take, _CHUNK):
            chunk = range(first, min(first + _CHUNK, file.take))
            try:
                records = source.__getitems__([start + i for i in chunk])
            except Exception as error:  # what a C++ library raises on bytes that are not its own
                raise ValueError(_damaged(builder, file.filename, str(error))) from error
            for i, record in zip(chunk, records, strict=True):
                yield f"{file.filename}: record {file.skip + i} of split {split!r}", record
        start += file.take


def _source(
    builder: tfds.core.DatasetBuilder, split: str, undecoded: Sequence[str], *, raw: bool = False
) -> Any:
    """The records of a split by their number."""
    decoders = {key: tfds.decode.SkipDecoding() for key in undecoded}
    methods = tfds.decode.DeserializeMethod
    method = methods.RAW_BYTES if raw else methods.DESERIALIZE_AND_DECODE
    try:
        return builder.as_data_source(split, decoders=decoders, deserialize_method=method)
    except NotImplementedError as error:  # written by TFDS as TFRecord files
        raise ValueError(str(error)) from error


def _check_length(builder: tfds.core.DatasetBuilder, path: Path, expected: int) -> None:
    from array_record.python import array_record_module

    if not path.exists():
        raise ValueError(_damaged(builder, path, "the file is missing"))
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise ValueError(_damaged(builder, path, str(error))) from error
    if found != expected:
        raise ValueError(_damaged(builder, path, f"{found} records instead of {expected}"))


def _damaged(builder: tfds.core.DatasetBuilder, path: str | Path, why: str) -> str:
    config = builder.builder_config
    name = f"{builder.name}/{config.name}" if config else builder.name
    directory = Path(builder.data_dir).parents[2 if config else 1]
    return f"{path} is truncated or damaged: {why}. Make it anew with\n{_command(name, directory)}"


def _stack(examples: Iterable[dict[str, Any]], name: str) -> dict[str, np.ndarray]:
    """Stacks examples feature by feature, with integers as int32, the type JAX has them in.

    Each feature grows in one buffer, so that no example is held twice.
    """
    buffers: dict[str, bytearray] = {}
    kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for example in examples:
        for key, value in example.items():
            array = np.asarray(value)
            if array.dtype.kind not in "biuf":
                continue
            kind = (array.dtype, array.shape)
            if kinds.setdefault(key, kind) != kind:
                raise ValueError(_unequal(name, key, array.shape, kinds[key][1]))
            buffers.setdefault(key, bytearray()).extend(array.tobytes())
    if not buffers:
        raise ValueError(f"the split of data set {name!r} is empty")
    arrays = {}
    for key, (dtype, shape) in kinds.items():
        array = np.frombuffer(buffers[key], dtype).reshape(-1, *shape)
        arrays[key] = array.astype(np.int32) if dtype == np.int64 else array
    return arrays


def _unequal(name: str, key: str, shape: tuple[int, ...], other: tuple[int, ...]) -> str:
    return (
        f"the examples of data set {name!r} differ in the shape of {key!r}: {shape} and {other}. "
        "Images become equal with config.data.size"
    )
