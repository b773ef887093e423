"""What a run leaves behind beside its checkpoints: metrics, TensorBoard events and adapters."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import sys
import tokenize
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fedlora_jax import checksums
from fedlora_jax.checksums import Damaged
from fedlora_jax.experiment import checkpoints
from fedlora_jax.lowrank import Factors
from fedlora_jax.methods import Trainable

METRICS = "metrics.jsonl"
BACKUP = "metrics.backup"
CONFIG = "config.json"
DAMAGED = "damaged"
_SHA256 = "sha256"
_MERGED = "merged"
# What NumPy may raise on a file that is not its own.
NOT_NUMPY = (
    *(ValueError, TypeError, KeyError, EOFError, SyntaxError, NotImplementedError),
    *(tokenize.TokenError, zipfile.BadZipFile),
)


def read_metrics(workdir: Path, rounds: int = 0) -> list[dict[str, Any]]:
    """The rounds recorded in a work directory; a line cut short by a kill is left out.

    A line that is damaged or missing in `metrics.jsonl` is taken from `metrics.backup`.

    Args:
      workdir: Of a run.
      rounds: How many there must be at least.

    Raises:
      Damaged: If a round is missing in both; the message says which.
    """
    rows = _sound_rows(workdir)
    expected = range(max(rounds, max(rows, default=-1) + 1))
    missing = [index for index in expected if index not in rows]
    if missing:
        first, last = missing[0], missing[-1]
        which = f"round {first}" if first == last else f"{len(missing)} of rounds {first} to {last}"
        raise Damaged(
            f"{workdir / METRICS} is damaged: the line of {which} is missing or cannot be read, "
            f"and {BACKUP} does not have it. Bring it back from a copy, or choose another work "
            "directory to begin anew; nothing was changed here"
        )
    return [rows[index] for index in expected]


def _sound_rows(workdir: Path) -> dict[int, dict[str, Any]]:
    """By round: lines of `metrics.jsonl` that are as they were written, and else their backup."""
    lines, sealed = _lines(workdir / METRICS), _lines(workdir / BACKUP)
    pairs = [line.partition(b" ")[::2] for line in sealed]
    known = {seal for seal, _ in pairs}
    rows = {}
    for line in [line for seal, line in pairs if seal == _seal(line)]:
        row = json.loads(line)
        rows[row["round"]] = row
    for place, line in enumerate(lines):
        try:
            row = json.loads(line)
            index = row["round"]
        except (ValueError, KeyError, TypeError):
            continue
        # One without a seal is of an older version, or damaged, and then its backup is there; what
        # is damaged may be its number.
        if _seal(line) in known or (index == place and index not in rows):
            rows[index] = row
    return rows


def _seal(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest()[:16].encode()


def _lines(path: Path) -> list[bytes]:
    """The lines that have an end."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON file but one that was cut short; none if there is no file.

    Raises:
      Damaged: If a line is no JSON object; the message says which.
    """
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise Damaged(
                f"line {number} of {path} is damaged: {error}. Bring it back from a copy, or "
                "remove this line to have its work done again"
            ) from None
    return rows


class MetricsWriter:
    """Appends one line a round to `metrics.jsonl`, and the numbers in it to TensorBoard events.

    A line is on disk before the round's checkpoint is begun, so that what is lost in a kill or a
    power cut is never a line but at most a checkpoint; `first_round` then drops the lines of the
    rounds that are to be run again. `metrics.backup` has the same lines, each after a checksum.

    Args:
      workdir: Where to write.
      first_round: The first round to be written.

    Raises:
      Damaged: If a line of a round before is lost.
    """

    def __init__(self, workdir: Path, first_round: int):
        writer = _summary_writer()
        kept = [json.dumps(row) for row in read_metrics(workdir, first_round)[:first_round]]
        _mend(workdir / METRICS, [line.encode() for line in kept])
        _mend(workdir / BACKUP, [_sealed(line).encode() for line in kept])
        self._file = open(workdir / METRICS, "a", buffering=1)
        self._backup = open(workdir / BACKUP, "a", buffering=1)
        self._events = writer(str(workdir), purge_step=first_round)

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes a round's metrics: numbers, strings, and lists and dicts of them."""
        line = json.dumps(row)
        for file, text in ((self._file, line), (self._backup, _sealed(line))):
            file.write(text + "\n")
            # A checkpoint without the lines before it would be of no use after a power cut.
            os.fsync(file.fileno())
        for name, value in _numbers(row):
            self._events.add_scalar(name, value, row["round"])
        self._events.flush()

    def close(self) -> None:
        """Closes all files."""
        self._file.close()
        self._backup.close()
        self._events.close()


def _summary_writer() -> Any:
    """TensorBoard's writer, without torch.

    tensorboardX imports that wherever it is installed: seconds, and threads in the way of JAX's.
    """
    absent = "torch" not in sys.modules
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if absent:
            del sys.modules["torch"]
    return SummaryWriter


def _sealed(line: str) -> str:
    return f"{_seal(line.encode()).decode()} {line}"


def _mend(path: Path, lines: list[bytes]) -> None:
    """Has a file begin with these lines and end there; what was damaged is kept elsewhere."""
    there = _lines(path)
    if path.exists() and there[: len(lines)] != lines:
        kept = set_aside(path.parent, path.name)
        warnings.warn(f"{path} was damaged and is mended; as it was it is {kept}", stacklevel=4)
    write_atomically(path, b"".join(line + b"\n" for line in lines).decode())


def set_aside(workdir: Path, name: str) -> Path:
    """Moves what is damaged into `damaged/`, where nothing is read; returns where it is then."""
    path, directory = workdir / name, workdir / DAMAGED
    directory.mkdir(exist_ok=True)
    kept = name.replace("/", "_")
    paths = (directory / f"{kept}.{number}" for number in itertools.count(1))
    target = next(each for each in paths if not each.exists())
    return path.rename(target)


def _numbers(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "round":
            found.append((prefix + name, float(value)))
    return found


def save_trainable(path: Path, trainable: Trainable, merged: Sequence[str] = ()) -> None:
    """Writes what was trained as one `.npz`.

    An array a factor is named `layer/path.a` or `.b`, an array of the head by its path.

    Args:
      path: Of the file.
      trainable: Adapters and head.
      merged: Layers whose frozen kernel has changed too, which is not written: these have
        `layer/path.merged`.
    """
    arrays: dict[str, Any] = {
        f"{layer}.{side}": np.asarray(getattr(factors, side))
        for layer, factors in trainable.adapters.items()
        for side in factors._fields
    }
    for name, array in traverse_util.flatten_dict(dict(trainable.head), sep="/").items():
        arrays[name] = np.asarray(array)
    arrays |= {f"{layer}.{_MERGED}": np.True_ for layer in merged}
    with replacing(path) as file:
        np.savez(file, **arrays)


def merged_layers(path: Path) -> list[str]:
    """The layers of which `save_trainable` was told that their kernel has changed."""
    with zipfile.ZipFile(path) as file:
        names = [name.removesuffix(".npy").rpartition(".") for name in file.namelist()]
    return [layer for layer, _, side in names if side == _MERGED]


def load_trainable(path: Path) -> Trainable:
    """What `save_trainable` wrote.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is not such a file.
    """
    layers: dict[str, dict[str, Any]] = {}
    head = {}
    # From memory, where a place before its beginning is a wrong value and no error of the system.
    content = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(content) as file:
            for entry in file.namelist():
                name = entry.removesuffix(".npy")
                # Read to its end, for there its checksum is compared.
                array = jnp.asarray(np.lib.format.read_array(io.BytesIO(file.read(entry))))
                layer, dot, side = name.rpartition(".")
                if dot and side in Factors._fields:
                    layers.setdefault(layer, {})[side] = array
                elif side != _MERGED:
                    head[name] = array
        if not layers:
            raise ValueError("no array has the name of a layer and .a or .b")
        adapters = {layer: Factors(**sides) for layer, sides in layers.items()}
        return Trainable(adapters, traverse_util.unflatten_dict(head, sep="/"))
    except NOT_NUMPY as error:
        raise ValueError(f"{path} holds no adapters: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that a kill leaves either old or new."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[io.BufferedRandom]:
    """A file to write to, which takes its place, for good, when all is written and on the disk."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    checksums.force(path.parent)


def write_sealed(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record as JSON, with its `sha256`, atomically."""
    plain = json.loads(json.dumps(record, default=list))
    text = json.dumps({**plain, _SHA256: _digest(plain)}, indent=2, sort_keys=True)
    write_atomically(path, text + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what `write_sealed` wrote, or a JSON object without `sha256` as it is.

    Raises:
      FileNotFoundError: If there is no such file.
      Damaged: If it is not what was written.
    """
    try:
        record = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise Damaged(f"{path} is damaged: {error}. Bring it back from a copy") from None
    seal = record.pop(_SHA256, None)
    if seal not in (None, _digest(record)):
        raise Damaged(
            f"{path} is not what was written: its {_SHA256} is another. Bring it back from a copy; "
            f"or, if you changed it on purpose, remove its field {_SHA256}"
        )
    return record


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def check_not_gone(path: Path) -> None:
    """Checks that a file which a run writes before its first round is there after it.

    Raises:
      Damaged: If rounds of the run are finished, and the file is not there.
    """
    if path.exists():
        return
    workdir = path.parent
    # The file is looked for again: another process may begin the run meanwhile.
    begun = _lines(workdir / METRICS) or _lines(workdir / BACKUP) or checkpoints.finished(workdir)
    if begun and not path.exists():
        raise Damaged(
            f"{path} is gone, and rounds of its run are finished. Bring it back from a copy; or, "
            "to begin anew, choose another work directory or remove this one"
        )


def differences(mine: Any, theirs: Any, path: str) -> list[str]:
    """What differs between two nested dicts, each as `path.to.it is ... there, ... here`.

    Args:
      mine: What is here.
      theirs: What is there.
      path: What to begin the names with.
    """
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = sorted(mine.keys() | theirs.keys())
        return [
            line
            for key in keys
            for line in differences(mine.get(key), theirs.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if mine == theirs else [f"{path} is {theirs} there, {mine} here"]
