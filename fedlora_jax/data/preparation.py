"""Preparing public data sets: downloaded, checked, and written as ArrayRecord files, once.

TFDS does the work. What is added here: each step is either done or not there, whatever ends it;
what is written is counted against the published numbers; and what goes wrong is told with what
mends it.
"""

import contextlib
import errno
import fcntl
import functools
import importlib.util
import inspect
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import load_url_infos
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.extractor import ExtractError

from fedlora_jax.data import bad_records, builders, sources

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CAUSES = 10  # of an exception, at most so many are followed


class DataSet(NamedTuple):
    """What one has to know before a data set is prepared.

    Attributes:
      what: What is in it.
      terms: What its publishers ask.
      tensorflow: Whether preparing it takes TensorFlow. Reading never does.
      manual: What has to be fetched by hand, if anything.
    """

    what: str
    terms: str
    tensorflow: bool = True
    manual: str = ""


DATA_SETS: dict[str, DataSet] = {
    "cifar10": DataSet("32 x 32 photographs, 10 classes", "no licence stated; cite it"),
    "cifar100": DataSet("32 x 32 photographs, 100 classes", "no licence stated; cite it"),
    "domainnet": DataSet(
        "six domains, from photographs to sketches, 345 classes; the cleaned version",
        "collected from the web; its page has a fair use notice: research",
    ),
    "nico_pp": DataSet(
        "photographs in six contexts, 60 classes; a fifth held out by us",
        "the terms of its page, which you accept to download it",
        tensorflow=False,
        manual="track_1.zip from https://nicochallenge.com/dataset, unpacked",
    ),
    "food101": DataSet(
        "dishes, 101 classes, labels of `train` with noise",
        "pictures of Foodspotting: beyond scientific fair use ask their owners",
    ),
    "oxford_flowers102": DataSet("flowers, 102 classes", "no licence stated; cite it"),
    "oxford_iiit_pet": DataSet("cats and dogs, 37 breeds", "CC BY-SA 4.0"),
    "cars196": DataSet(
        "cars, 196 models",
        "non-commercial research",
        manual="if the server does not answer: the four files of the message, from a mirror",
    ),
    "fgvc_aircraft": DataSet("aircraft, 100 variants", "non-commercial research"),
    "digits_domains": DataSet(
        "16 x 16 handwritten digits in six styles", "CC BY 4.0 (UCI)", tensorflow=False
    ),
    "glue": DataSet(
        "tasks on one text or two: glue/cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli",
        "those of each task, on its page",
    ),
    "newsgroups20": DataSet(
        "postings to 20 news groups, split by date", "no licence stated; cite it", tensorflow=False
    ),
    "banking77": DataSet("customers' questions, 77 intents", "CC BY 4.0", tensorflow=False),
    "gsm8k": DataSet("school mathematics, worked out", "MIT", tensorflow=False),
    "metamathqa": DataSet(
        "questions of GSM8K and MATH, reworded and answered", "MIT", tensorflow=False
    ),
    "code_feedback": DataSet("conversations about code", "Apache-2.0", tensorflow=False),
    "alpaca": DataSet("instructions, answered by a model", "CC BY-NC 4.0", tensorflow=False),
    "databricks_dolly": DataSet(
        "instructions in eight categories, answered by people", "CC BY-SA 3.0", tensorflow=False
    ),
}

# Published numbers of examples by split, in the language of TFDS.
EXAMPLES: dict[str, dict[str, int]] = {
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "domainnet/clipart": {"train": 33_525, "test": 14_604},
    "domainnet/infograph": {"train": 36_023, "test": 15_582},
    "domainnet/painting": {"train": 50_416, "test": 21_850},
    "domainnet/quickdraw": {"train": 120_750, "test": 51_750},
    "domainnet/real": {"train": 120_906, "test": 52_041},
    "domainnet/sketch": {"train": 48_212, "test": 20_916},
    "nico_pp": {"train+test": 88_866},
    "food101": {"train": 75_750, "validation": 25_250},
    "oxford_flowers102": {"train": 1_020, "validation": 1_020, "test": 6_149},
    "oxford_iiit_pet": {"train": 3_680, "test": 3_669},
    "cars196": {"train": 8_144, "test": 8_041},
    "fgvc_aircraft": {"train": 3_334, "validation": 3_333, "test": 3_333},
    "digits_domains": {"pretrain": 600, "federated": 4_782, "validation": 1_200, "test": 1_200},
    "glue/cola": {"train": 8_551, "validation": 1_043, "test": 1_063},
    "glue/sst2": {"train": 67_349, "validation": 872, "test": 1_821},
    "glue/mrpc": {"train": 3_668, "validation": 408, "test": 1_725},
    "glue/qqp": {"train": 363_846, "validation": 40_430, "test": 390_965},
    "glue/stsb": {"train": 5_749, "validation": 1_500, "test": 1_379},
    "glue/mnli": {
        "train": 392_702,
        "validation_matched": 9_815,
        "validation_mismatched": 9_832,
        "test_matched": 9_796,
        "test_mismatched": 9_847,
    },
    "glue/qnli": {"train": 104_743, "validation": 5_463, "test": 5_463},
    "glue/rte": {"train": 2_490, "validation": 277, "test": 3_000},
    "glue/wnli": {"train": 635, "validation": 71, "test": 146},
    "newsgroups20": {"train": 11_314, "test": 7_532},
    "banking77": {"train": 10_003, "test": 3_080},
    "gsm8k": {"train": 7_473, "test": 1_319},
    "metamathqa": {"train": 395_000},
    "code_feedback": {"train": 66_383},
    "alpaca": {"train": 52_002},
    "databricks_dolly": {"train": 15_011},
}


def prepare(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    manual_dir: str | os.PathLike[str] | None = None,
    on_bad_record: str = "stop",
    examples: Mapping[str, Mapping[str, int]] = EXAMPLES,
    report: Callable[[str], None] = print,
) -> None:
    """Downloads a data set and writes it, unless it is there and whole.

    Downloads are kept, and so is what is whole; what an earlier call left unfinished is removed.

    Args:
      name: A data set, ours or of TFDS; `"domainnet"` is all its domains, `"domainnet/real"` one.
      data_dir: Where to write, as `sources.load`.
      manual_dir: Where files fetched by hand are; by default `downloads/manual/NAME` in `data_dir`.
      on_bad_record: `'stop'` at a file that cannot be used, or `'skip'` and count such files; of
        the builders that try every file, those of `builders`.
      examples: Numbers of examples to expect, from name and split.
      report: Is told each step.

    Raises:
      ValueError: If there is no such data set, a checksum or a number of examples is another than
        published, a record is bad, or another process prepares it already.
      FileNotFoundError: If files have to be fetched by hand first; it says which and where to.
      ImportError: If it takes TensorFlow, which is not there.
      OSError: If a download failed or the disk is full.
    """
    bad_records.check_policy(on_bad_record)
    directory = sources.directory_of(data_dir)
    base, _, config = name.partition("/")
    kind: Callable[..., tfds.core.DatasetBuilder] = builders.get(base)
    sources.check_part(builders.get(base), config)
    options = {"on_bad_record": on_bad_record}
    if "on_bad_record" not in inspect.signature(kind).parameters:
        options = {}
        if on_bad_record == "skip":
            report(f"{base}: files are not tried here; bad records are found on reading")
    downloads = directory / "downloads"
    manual = Path(manual_dir).expanduser() if manual_dir else downloads / "manual" / base
    if base in DATA_SETS:
        report(f"{base}: {DATA_SETS[base].what}. Terms: {DATA_SETS[base].terms}.")
    with _locked(downloads / base / ".lock", base):
        for part in [config] if config else sources.DOMAINS.get(base, (None,)):
            make = functools.partial(
                kind, config=part, data_dir=directory, file_format="array_record", **options
            )
            full = f"{base}/{part}" if part else base
            builder = make()
            if builder.data_path.exists() and not _is_whole(builder, full, report):
                # First renamed, so that a kill leaves nothing that may be taken for whole.
                path = Path(builder.data_path)
                path.rename(path.with_name(f"incomplete.{path.name}"))
                builder = make()
            if not builder.data_path.exists():
                _check_requirements(builder, base, manual)
                _remove_unfinished(builder, downloads)
                report(f"{full}: downloading and writing to {builder.data_path}")
                _download_and_write(builder, full, directory, manual)
            _check_counts(builder, full, examples.get(full, {}))
            report(
                f"{full}: {_counts(builder)}; {builder.info.dataset_size} in {builder.data_path}"
            )


def table() -> list[tuple[str, str, str, str, str]]:
    """All data sets known here: name, content, examples, how it is prepared, terms."""
    rows = []
    for name, known in DATA_SETS.items():
        parts = [counts for key, counts in EXAMPLES.items() if key.partition("/")[0] == name]
        total = sum(sum(counts.values()) for counts in parts)
        how = [known.manual] * bool(known.manual) + ["TensorFlow"] * known.tensorflow
        rows.append((name, known.what, f"{total:,}", "; ".join(how) or "nothing", known.terms))
    return rows


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Keeps other processes from the same data set; the end of this one frees it, however."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{name} is being prepared by another process ({path})") from None
        yield


def _is_whole(builder: tfds.core.DatasetBuilder, name: str, report: Callable[[str], None]) -> bool:
    report(f"{name}: is there, reading all of it")
    damage = sources.damage(builder.data_path)
    if damage is not None:
        report(f"{name}: {damage.splitlines()[0]}: all of it is removed and made anew")
    return damage is None


def _check_requirements(builder: tfds.core.DatasetBuilder, base: str, manual: Path) -> None:
    known = DATA_SETS.get(base)
    needs = known.tensorflow if known else base not in builders.BUILDERS
    if needs and importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            f"preparing {base} takes TensorFlow: pip install -e '.[prepare]'. "
            "Reading it afterwards does not"
        )
    wanted = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if wanted and not (manual.is_dir() and any(manual.iterdir())):
        raise FileNotFoundError(
            f"{base} has to be fetched by hand. {' '.join(wanted.split())} Here is {manual}; "
            "--manual_dir names another place"
        )


def _remove_unfinished(builder: tfds.core.DatasetBuilder, downloads: Path) -> None:
    """Removes what a killed process left; the lock says that it is gone."""
    left = [
        *Path(builder.data_path).parent.glob("incomplete.*"),
        *(downloads / builder.name).rglob("*.tmp.*"),
        *(downloads / "extracted" / builder.name).glob("incomplete.*"),
    ]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)


def _download_and_write(
    builder: tfds.core.DatasetBuilder, name: str, directory: Path, manual: Path
) -> None:
    downloads = directory / "downloads"
    config = tfds.download.DownloadConfig(
        manual_dir=manual,
        extract_dir=downloads / "extracted" / builder.name,
        try_download_gcs=False,
    )
    try:
        with sources.quiet():
            builder.download_and_prepare(download_dir=downloads, download_config=config)
    except Exception as error:
        explained = _explained(error, builder, name, directory, manual)
        if explained is None:
            raise
        raise explained from error


def _explained(
    error: Exception,
    builder: tfds.core.DatasetBuilder,
    name: str,
    directory: Path,
    manual: Path,
) -> Exception | None:
    """What went wrong, with what mends it; None for an error that says it itself."""
    if _is_full(error):
        free = shutil.disk_usage(directory).free / 2**30
        return OSError(
            errno.ENOSPC,
            f"the disk of {directory} is full ({free:.1f} GiB left) or a limit is reached: {error} "
            f"Downloads, and data sets that are whole, are kept. Make room, and prepare {name} "
            "with the same command again",
        )
    if isinstance(error, NonMatchingChecksumError | ExtractError):
        return ValueError(
            f"{error}\nDelete that file, and prepare {name} again: it is fetched anew"
        )
    if isinstance(error, OSError | tfds.download.DownloadError) and not isinstance(
        error, FileNotFoundError
    ):
        files = _known_files(builder)
        hint = (
            f" If its server does not answer any more, fetch {', '.join(files)} from elsewhere and "
            f"put them in {manual}: their checksums are known."
            if files
            else ""
        )
        return OSError(
            f"{name} could not be downloaded or written: {error}. What is whole is kept.{hint}"
        )
    return None


def _known_files(builder: tfds.core.DatasetBuilder) -> list[str]:
    """Names of the files to download whose checksums TFDS knows."""
    known = builder.url_infos
    listing = tfds.core.tfds_path() / "url_checksums" / f"{builder.name}.txt"
    if known is None and listing.exists():  # where the older builders have theirs
        known = load_url_infos(listing)
    return [info.filename for info in (known or {}).values() if info.filename]


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk, a quota or a limit is behind an error, in Python or a C++ library."""
    for _ in range(_CAUSES):
        if error is None:
            return False
        message = str(error)
        if getattr(error, "errno", None) in _FULL or "Not enough disk space" in message:
            return True
        if any(os.strerror(number) in message for number in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_counts(
    builder: tfds.core.DatasetBuilder, name: str, expected: Mapping[str, int]
) -> None:
    found = {split: builder.info.splits[split].num_examples for split in expected}
    skipped = _skipped(builder)
    if sum(found.values()) + skipped == sum(expected.values()):
        if skipped or found == expected:
            return
    raise ValueError(
        f"{name} has {_numbers(found)} examples, published are {_numbers(expected)}"
        + f" ({skipped} were skipped)" * bool(skipped)
        + f". If the files are as they shall be, --nocheck_counts accepts them; else delete "
        f"{builder.data_path} and its downloads, and prepare it again"
    )


def _skipped(builder: tfds.core.DatasetBuilder) -> int:
    return (builder.info.metadata or {}).get("skipped", 0)


def _counts(builder: tfds.core.DatasetBuilder) -> str:
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    skipped = _skipped(builder)
    return f"{_numbers(counts)} examples" + f", {skipped} skipped" * bool(skipped)


def _numbers(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{split} {count:,}" for split, count in counts.items())
