"""What clients remember between rounds, on disk: time and memory of a round know no N.

A round leaves a file, `clients/ROUND.npy`, with a record for each client of its cohort: its
identity, the round, and its state, field by field, as NumPy reads it. A client's state is the
newest that there is; a client that never took part has the first state, which all have in common.
Of several hosts each writes the states that are on its own devices, the second one into
`clients/ROUND.1.npy`.

Nothing is ever changed, and a round counts once its checkpoint is there, so that what was true
after any round can be read again. A file of which every record has a newer one is removed once no
checkpoint needs it. Few would come to that: of clients drawn at random some come late. So a round
also writes again what is left in the files that have least, with the round that it is of, a quarter
of a cohort at most: files hold about twice the N states, and the cohorts that checkpoints need,
where they would hold five times as many.
After the records, where NumPy does not look, a file has their SHA-256, which is compared when a run
goes on.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from fedlora_jax import checksums
from fedlora_jax.checksums import Damaged
from fedlora_jax.experiment import hosts
from fedlora_jax.experiment.records import NOT_NUMPY, replacing

PyTree: TypeAlias = Any

DIRECTORY = "clients"
_IDENTITY, _ROUND = "identity", "after_round"
# States that are written again: so many beside a cohort, from files that have so few left.
_AGAIN, _SPARSE = 1 / 4, 1 / 5
_PIECE = 2**24  # bytes
_NAME = re.compile(r"(\d+)(?:\.(\d+))?\.npy")


class ClientStore:
    """The states of N clients. In memory are three integers a client, on disk its newest state.

    Args:
      workdir: Of a run; the files are in `clients/` below it.
      first: The state of a client before its first round.
      num_clients: N.
      rounds: How many rounds are finished. What is there of later ones is not read, and written
        again.

    Raises:
      ValueError: If a file of those rounds is of another model or method.
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
        self._record = np.dtype([(_IDENTITY, np.int32), (_ROUND, np.int32), *record])
        self._older_record = np.dtype([(_IDENTITY, np.int32), *record])
        # Of each client the round that its state is of, and the file and place where that is.
        self._round, self._file = np.full((2, num_clients), -1, np.int32)
        self._place = np.zeros(num_clients, np.int32)
        # Of each file its path, where its records begin, how many states it has, how many of them
        # are newest, whether those are few, and the round since when there are none.
        self._files, self._paths = 0, dict[int, Path]()
        self._offsets: dict[int, int] = {}
        self._counts: dict[int, int] = {}
        self._living: dict[int, int] = {}
        self._sparse: set[int] = set()
        self._dead: dict[int, int] = {}
        self._damaged: list[str] = []
        found = self._found() if self._fields else []
        # What hosts that were killed may have left of a round that is not finished.
        self._unfinished = {(index, host) for index, host in found if index >= rounds}
        for index, host in found:
            if index < rounds:
                file = self._add(index, host)
                try:
                    _check(self._paths[file])
                except Damaged as error:
                    # What was in it may be newer elsewhere, see `expect`.
                    self._damaged.append(str(error))
                    self._dead[file] = rounds - 1
                    continue
                records = self._open(file)
                self._enter(file, records[_IDENTITY], records[_ROUND], index)

    def expect(self, rounds: np.ndarray) -> None:
        """Compares the newest states with what they should be.

        Args:
          rounds: The round that each client's state is of, `[N]`; -1 for the first state.

        Raises:
          Damaged: If a state is not there, or its file is not what was written.
        """
        other = np.flatnonzero(self._round != rounds)
        if self._fields and len(other):
            lost = ", ".join(str(index) for index in np.unique(rounds[other]).tolist())
            raise Damaged(
                "; ".join(self._damaged)
                or f"{self._directory} lacks the states that {len(other)} clients had after round "
                f"{lost}"
            )

    def read(self, identities: np.ndarray, wanted: np.ndarray | None = None) -> PyTree:
        """The states of these clients, stacked along `[K]`, on the host; of -1 the first state.

        Args:
          identities: Whose states.
          wanted: Which of them, bool `[K]`; by default all. The other rows are undefined.
        """
        leaves, structure = jax.tree.flatten(self._first)
        stacked = [np.empty((len(identities), *x.shape), x.dtype) for x in leaves]
        files = np.where(identities < 0, -1, self._file[identities])
        wanted = np.ones(len(files), bool) if wanted is None else wanted
        for file in np.unique(files[wanted]).tolist():
            here = np.flatnonzero((files == file) & wanted)
            if file < 0:
                for first, values in zip(leaves, stacked, strict=True):
                    values[here] = first
                continue
            records = self._open(file, self._place[identities[here]])
            for field, values in zip(self._fields, stacked, strict=True):
                values[here] = records[field].view(values.dtype)
        return jax.tree.unflatten(structure, stacked)

    def write(
        self,
        round_index: int,
        identities: np.ndarray,
        states: PyTree,
        host_of: np.ndarray | None = None,
    ) -> None:
        """Keeps the states after a round. All hosts call it, and wait for each other afterwards.

        Args:
          round_index: The round.
          identities: Whose they are, `[K]`, without repetition.
          states: Arrays `[K, ...]` in this host's memory, of which it needs those rows that it
            writes.
          host_of: Which host writes each of them, int `[K]`; by default the first one all.
        """
        if not self._fields:
            return
        host_of = np.zeros(len(identities), np.int32) if host_of is None else host_of
        again, count = self._left_over(identities), int(host_of.max()) + 1
        files = [self._add(round_index, host) for host in range(count)]
        # Who is new in each file, and who is there again; of those the rounds, as they are now.
        parts = [(np.flatnonzero(host_of == i), again[i::count]) for i in range(count)]
        rounds = [self._round[old] for _, old in parts]
        self._remove_unfinished(round_index, count)
        if (host := jax.process_index()) < count:
            new, old = parts[host]
            records = np.empty(len(new) + len(old), self._record)
            self._put_states(records[: len(new)], round_index, identities, states, new)
            self._put_newest(records[len(new) :], old)
            _save(self._paths[files[host]], records)
        for file, (new, old), made in zip(files, parts, rounds, strict=True):
            self._enter(file, identities[new], round_index, round_index)
            self._enter(file, old, made, round_index, len(new))

    def forget(self, rounds: int) -> None:
        """Removes what no checkpoint after so many rounds, or more, needs."""
        for file in [file for file, newer in self._dead.items() if newer < rounds]:
            if hosts.is_first():
                self._paths[file].unlink(missing_ok=True)
            self._counts.pop(file, None)
            self._offsets.pop(file, None)
            del self._dead[file], self._paths[file]

    def _left_over(self, cohort: np.ndarray) -> np.ndarray:
        """Whose states are written again: what a cohort leaves in the files that have least."""
        room, again = int(_AGAIN * len(cohort)), np.zeros(0, np.int32)
        # All hosts in the same order.
        for file in sorted(self._sparse, key=lambda file: (self._living[file], file)):
            members = np.array(self._open(file)[_IDENTITY])
            left = np.setdiff1d(members[self._file[members] == file], cohort)
            if len(again) + len(left) > room:
                break
            again = np.append(again, left)
        return again

    def _put_states(
        self,
        records: np.ndarray,
        round_index: int,
        identities: np.ndarray,
        states: PyTree,
        part: np.ndarray,
    ) -> None:
        records[_IDENTITY], records[_ROUND] = identities[part], round_index
        for field, values in zip(self._fields, jax.tree.leaves(states), strict=True):
            records[field] = values.view(self._record[field].base)[part]

    def _put_newest(self, records: np.ndarray, identities: np.ndarray) -> None:
        """Records as they are on disk."""
        files = self._file[identities]
        for file in np.unique(files).tolist():
            here = np.flatnonzero(files == file)
            records[here] = self._open(file, self._place[identities[here]])

    def _add(self, index: int, host: int) -> int:
        """A new file's number."""
        self._files += 1
        self._paths[self._files] = self._path(index, host)
        return self._files

    def _path(self, index: int, host: int) -> Path:
        name = f"{index:06d}.{host}.npy" if host else f"{index:06d}.npy"
        return self._directory / name

    def _enter(
        self,
        file: int,
        identities: np.ndarray,
        rounds: np.ndarray | int,
        index: int,
        first_place: int = 0,
    ) -> None:
        """Notes that a file, written in a round, has the newest states of these clients."""
        before = self._file[identities]
        found, counts = np.unique(before[before >= 0], return_counts=True)
        for old, count in zip(found.tolist(), counts.tolist(), strict=True):
            self._living[old] -= count
            if not self._living[old]:
                del self._living[old]
                self._sparse.discard(old)
                self._dead[old] = index
            elif self._living[old] <= _SPARSE * self._counts[old]:
                self._sparse.add(old)
        self._round[identities], self._file[identities] = rounds, file
        self._place[identities] = first_place + np.arange(len(identities))
        if len(identities):
            self._living[file] = self._living.get(file, 0) + len(identities)
            self._counts[file] = self._living[file]

    def _found(self) -> list[tuple[int, int]]:
        """Round and host of each file that is there, in their order."""
        names = (_NAME.fullmatch(path.name) for path in self._directory.glob("*.npy"))
        return sorted((int(name[1]), int(name[2] or 0)) for name in names if name)

    def _remove_unfinished(self, round_index: int, count: int) -> None:
        """Removes what more than so many hosts have left of a round, where nothing replaces it."""
        for index, host in sorted(self._unfinished):
            if index == round_index and host >= count and hosts.is_first():
                self._path(index, host).unlink(missing_ok=True)
        self._unfinished = {(i, host) for i, host in self._unfinished if i != round_index}

    def _open(self, file: int, places: np.ndarray | slice = slice(None)) -> np.ndarray:
        path = self._paths[file]
        if file in self._offsets:
            # Without the header, whose parsing takes longer than a few records.
            offset, count = self._offsets[file], self._counts[file]
            return np.memmap(path, self._record, "r", offset, count)[places]
        whole = np.load(path, mmap_mode="r", allow_pickle=False)
        if whole.dtype == self._record:
            self._offsets[file] = whole.offset
        records = whole[places]
        if records.dtype == self._older_record:
            # All were of the round that wrote them.
            known = np.empty(len(records), self._record)
            known[_ROUND] = int(path.stem)
            for name in (_IDENTITY, *self._fields):
                known[name] = records[name]
            return known
        if records.dtype != self._record:
            raise ValueError(
                f"{path} holds clients of another model or method: choose another work directory, "
                "or remove this one"
            )
        return records


def _save(path: Path, records: np.ndarray) -> None:
    if not path.parent.exists():
        path.parent.mkdir(exist_ok=True)
        checksums.force(path.parent.parent)
    with replacing(path) as file:
        np.save(file, records)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").digest()
        file.seek(0, os.SEEK_END)
        file.write(digest)


def _check(path: Path) -> None:
    """Raises Damaged if a file is not what was written; older versions wrote no checksum."""
    if _has_its_checksum(path):
        return
    try:
        records = np.load(path, mmap_mode="r", allow_pickle=False)
    except NOT_NUMPY as error:
        raise Damaged(f"{path} is damaged: {error}") from None
    # Who wrote the round of each state wrote a checksum.
    older = _ROUND not in (records.dtype.names or ())
    if not older or records.offset + records.nbytes != path.stat().st_size:
        raise Damaged(f"{path} is damaged: it is not what was written")


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
