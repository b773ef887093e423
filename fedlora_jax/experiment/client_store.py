"""What clients remember between rounds, on disk: time and memory of a round know no N.

A round leaves one file, `clients/ROUND.npy`, with a record for each client of its cohort: its
identity and its state, field by field, as NumPy reads it. A client's state is the newest that there
is; a client that never took part has the first state, which all have in common. Nothing is ever
changed, so a kill leaves either a whole round or none, and what was true after any round can be
read again. A file of which every record has a newer one is removed once no checkpoint needs it.
After the records, where NumPy does not look, a file has their SHA-256, which is compared when a run
goes on.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from fedlora_jax.checksums import Damaged
from fedlora_jax.experiment import hosts
from fedlora_jax.experiment.records import NOT_NUMPY, replacing

PyTree: TypeAlias = Any

DIRECTORY = "clients"
_IDENTITY = "identity"
_PIECE = 2**24  # bytes


class ClientStore:
    """The states of N clients. In memory are three integers a client, on disk its newest state.

    Args:
      workdir: Of a run; the files are in `clients/` below it.
      first: The state of a client before its first round.
      num_clients: N.
      rounds: How many rounds are finished. What is there of later ones is not read, and written
        again.

    Raises:
      Damaged: If a file of those rounds is not what was written.
      ValueError: If one is of another model or method.
    """

    def __init__(self, workdir: Path, first: PyTree, num_clients: int, rounds: int = 0):
        self._directory = workdir / DIRECTORY
        leaves = jax.tree_util.tree_leaves_with_path(first)
        self._first = jax.tree.map(np.asarray, first)
        # A state that is one bare array has no path, and a field needs a name.
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        self._fields = [path or "." for path in paths]
        arrays = jax.tree.leaves(self._first)
        fields = zip(self._fields, arrays, strict=True)
        record = [(name, _stored(x.dtype), x.shape) for name, x in fields]
        self._record = np.dtype([(_IDENTITY, np.int32), *record])
        self._round = np.full(num_clients, -1, np.int32)
        self._place = np.zeros(num_clients, np.int32)
        self._living: dict[int, int] = {}
        self._dead: dict[int, int] = {}
        for index in range(rounds if self._fields else 0):
            if self._path(index).exists():
                self._check(index)
                self._enter(index, self._open(index)[_IDENTITY])

    def expect(self, rounds: np.ndarray) -> None:
        """Raises Damaged unless the newest states are of these rounds, `[N]`; -1 for the first."""
        other = np.flatnonzero(self._round != rounds)
        if self._fields and len(other):
            lost = ", ".join(str(index) for index in np.unique(rounds[other]).tolist())
            raise Damaged(
                f"{self._directory} lacks the states that {len(other)} clients had after round "
                f"{lost}"
            )

    def read(self, identities: np.ndarray) -> PyTree:
        """The states of these clients, stacked along `[K]`, on the host; of -1 the first state."""
        leaves, structure = jax.tree.flatten(self._first)
        stacked = [np.repeat(x[None], len(identities), axis=0) for x in leaves]
        if not leaves:
            return self._first
        rounds = np.where(identities < 0, -1, self._round[identities])
        for index in np.unique(rounds[rounds >= 0]).tolist():
            here = np.flatnonzero(rounds == index)
            records = self._open(index)[self._place[identities[here]]]
            for field, values in zip(self._fields, stacked, strict=True):
                values[here] = records[field].view(values.dtype)
        return jax.tree.unflatten(structure, stacked)

    def write(self, round_index: int, identities: np.ndarray, states: PyTree) -> None:
        """Keeps the states after a round, `[K, ...]`; of several hosts the first one writes.

        Args:
          round_index: The round.
          identities: Whose they are, `[K]`, without repetition.
          states: Arrays on the host.
        """
        if not self._fields:
            return
        if hosts.is_first():
            self._save(round_index, identities, states)
        self._enter(round_index, identities)

    def forget(self, rounds: int) -> None:
        """Removes what no checkpoint after so many rounds, or more, needs."""
        for index in [i for i, newer in self._dead.items() if newer < rounds]:
            if hosts.is_first():
                self._path(index).unlink(missing_ok=True)
            del self._dead[index]

    def _save(self, round_index: int, identities: np.ndarray, states: PyTree) -> None:
        rows = np.empty(len(identities), self._record)
        rows[_IDENTITY] = identities
        for field, values in zip(self._fields, jax.tree.leaves(states), strict=True):
            rows[field] = values.view(self._record[field].base)
        path = self._path(round_index)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            np.save(file, rows)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").digest()
            file.seek(0, os.SEEK_END)
            file.write(digest)

    def _enter(self, index: int, identities: np.ndarray) -> None:
        before = self._round[identities]
        for old, count in zip(*np.unique(before[before >= 0], return_counts=True), strict=True):
            self._living[int(old)] -= int(count)
            if not self._living[int(old)]:
                self._dead[int(old)] = index
        self._round[identities], self._place[identities] = index, np.arange(len(identities))
        self._living[index] = len(identities)

    def _path(self, index: int) -> Path:
        return self._directory / f"{index:06d}.npy"

    def _check(self, index: int) -> None:
        """Raises Damaged if a file is not what was written; older versions wrote no checksum."""
        path = self._path(index)
        if _has_its_checksum(path):
            return
        try:
            records = np.load(path, mmap_mode="r", allow_pickle=False)
        except NOT_NUMPY as error:
            raise Damaged(f"{path} is damaged: {error}") from None
        if records.offset + records.nbytes != path.stat().st_size:
            raise Damaged(f"{path} is damaged: it is not what was written")

    def _open(self, index: int) -> np.ndarray:
        path = self._path(index)
        records = np.load(path, mmap_mode="r", allow_pickle=False)
        if records.dtype != self._record:
            raise ValueError(
                f"{path} holds clients of another model or method: choose another work directory, "
                "or remove this one"
            )
        return records


def _stored(dtype: np.dtype) -> np.dtype:
    """The type itself where NumPy knows it, else an unsigned integer of the same bits."""
    return dtype if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")


def _has_its_checksum(path: Path) -> bool:
    """Whether the end of a file is the SHA-256 of what is before."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END) - digest.digest_size
        file.seek(0)
        while file.tell() < end:
            digest.update(file.read(min(_PIECE, end - file.tell())))
        return file.read() == digest.digest()
