"""What a round has left is on the disk, and not only with the operating system, before the next."""

import os
import stat

import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax import checksums
from fedlora_jax.experiment import checkpoints, records
from fedlora_jax.experiment.checkpoints import Checkpoints
from fedlora_jax.experiment.client_store import ClientStore


@pytest.fixture
def forced(monkeypatch):
    """By inode, how large a file, or what in a directory, was when it was last forced to disk."""
    found, fsync = {}, os.fsync

    def recording(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        listed = stat.S_ISDIR(status.st_mode)
        found[status.st_ino] = os.listdir(descriptor) if listed else status.st_size

    monkeypatch.setattr(os, "fsync", recording)
    return found


def is_forced(path, forced):
    status = path.stat()
    return path.is_file() and forced.get(status.st_ino) == status.st_size


def is_listed(path, forced):
    """Whether its name is on the disk too."""
    return path.exists() and path.name in forced.get(path.parent.stat().st_ino, ())


def test_lines_and_states_of_a_round_are_on_the_disk(tmp_path, forced):
    store = ClientStore(tmp_path, {"b": np.zeros(3, np.float32)}, 5)
    writer = records.MetricsWriter(tmp_path, 0)
    for index in range(2):
        store.write(index, np.array([0, 2]), {"b": np.ones((2, 3), np.float32)})
        states = tmp_path / "clients" / f"{index:06d}.npy"
        assert is_forced(states, forced) and is_listed(states, forced)
        assert is_listed(states.parent, forced)
        writer.write({"round": index})
        assert is_forced(tmp_path / records.METRICS, forced)
        assert is_forced(tmp_path / records.BACKUP, forced)
        assert is_listed(tmp_path / records.METRICS, forced)
    writer.close()


def test_a_checkpoint_is_on_the_disk_when_it_is_there(tmp_path, forced):
    kept = Checkpoints(tmp_path)
    kept.save(1, {"a": jnp.arange(6.0)})
    kept.close()
    directory = tmp_path / checkpoints.DIRECTORY / "1"
    files = [path for path in directory.rglob("*") if path.is_file()]
    later = [directory / name for name in checksums._LATER]
    assert all(path in files for path in later)
    assert len(files) > 3
    assert [path for path in files if not is_forced(path, forced) and path not in later] == []
    # Orbax's own notes may be cut short by a power cut: it reads the state without them.
    for path in later:
        path.write_bytes(b"")
    checkpoints.check(tmp_path, 1)
    found = Checkpoints(tmp_path).restore(1, {"a": jnp.zeros(6)})
    np.testing.assert_array_equal(found["a"], np.arange(6.0))


def test_what_replaces_a_file_is_on_the_disk_before(tmp_path, forced):
    records.write_sealed(tmp_path / "config.json", {"rounds": 3})
    assert is_forced(tmp_path / "config.json", forced)
    assert is_listed(tmp_path / "config.json", forced)


def test_a_checkpoint_has_its_name_before_the_next_but_one_goes(tmp_path, forced):
    kept = Checkpoints(tmp_path)
    for rounds in (1, 2):
        kept.save(rounds, {"a": jnp.arange(6.0)})
    kept.close()
    assert is_listed(tmp_path / checkpoints.DIRECTORY / "1", forced)
