"""What a run leaves behind: metrics, TensorBoard events, checkpoints and adapters."""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tensorboardX import SummaryWriter

from fedlora_jax.lora import Adapters
from fedlora_jax.lowrank import Factors

METRICS = "metrics.jsonl"
CONFIG = "config.json"


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rounds recorded in a work directory; a line cut short by a kill is left out."""
    return read_lines(workdir / METRICS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON file up to one that was cut short; none if there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsWriter:
    """Appends one line a round to `metrics.jsonl`, and the numbers in it to TensorBoard events.

    A line is on disk before the round's checkpoint is begun, so that what is lost in a kill is
    never a line but at most a checkpoint; `first_round` then drops the lines of the rounds that
    are to be run again.

    Args:
      workdir: Where to write.
      first_round: The first round to be written.
    """

    def __init__(self, workdir: Path, first_round: int):
        kept = [row for row in read_metrics(workdir) if row["round"] < first_round]
        write_atomically(workdir / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(workdir / METRICS, "a", buffering=1)
        self._events = SummaryWriter(str(workdir), purge_step=first_round)

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes a round's metrics: numbers, strings, and lists and dicts of them."""
        self._file.write(json.dumps(row) + "\n")
        for name, value in _numbers(row):
            self._events.add_scalar(name, value, row["round"])
        self._events.flush()

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._events.close()


def _numbers(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "round":
            found.append((prefix + name, float(value)))
    return found


class Checkpoints:
    """The last states of a run by number of finished rounds, written while the next one runs."""

    def __init__(self, workdir: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(workdir.absolute() / "checkpoints", options=options)

    def restore(self, like: Any) -> tuple[Any, int]:
        """The newest state and its number of finished rounds; `(like, 0)` if there is none.

        Raises:
          ValueError: If the newest checkpoint has another structure or other shapes than `like`.
        """
        step = self._manager.latest_step()
        if step is None:
            return like, 0
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the checkpoint in {self._manager.directory} is of another model or method: "
                "choose another work directory, or remove this one"
            ) from error
        return state, step

    def oldest(self) -> int:
        """The number of finished rounds of the oldest state that is there for good; 0 without."""
        return min(self._manager.all_steps(), default=0)

    def save(self, rounds: int, state: Any) -> None:
        """Starts to write the state after so many rounds."""
        self._manager.save(rounds, args=ocp.args.StandardSave(state))

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.close()


def save_adapters(path: Path, adapters: Adapters) -> None:
    """Writes an adapter tree as one `.npz`: an array a factor, named `layer/path.a` or `.b`."""
    arrays: dict[str, Any] = {
        f"{layer}.{side}": np.asarray(getattr(factors, side))
        for layer, factors in adapters.items()
        for side in factors._fields
    }
    with replacing(path) as file:
        np.savez(file, **arrays)


def load_adapters(path: Path) -> Adapters:
    """The adapter tree that `save_adapters` wrote.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is not such a file.
    """
    layers: dict[str, dict[str, Any]] = {}
    try:
        with np.load(path) as arrays:
            for name in arrays:
                layer, _, side = name.rpartition(".")
                layers.setdefault(layer, {})[side] = jnp.asarray(arrays[name])
        return {layer: Factors(**sides) for layer, sides in layers.items()}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no adapters: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that a kill leaves either old or new."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes its place when all is written."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        yield file
    os.replace(temporary, path)


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
