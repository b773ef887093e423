"""The last states of a run, by Orbax: without what whoever goes on has at hand, and checksummed."""

import weakref
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from fedlora_jax import checksums
from fedlora_jax.experiment import hosts

PyTree: TypeAlias = Any

DIRECTORY = "checkpoints"


def finished(workdir: Path) -> list[int]:
    """The checkpoints of a run by number of finished rounds, ascending."""
    directory = workdir / DIRECTORY
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def check(workdir: Path, rounds: int) -> None:
    """Raises Damaged if the checkpoint after so many rounds is not what was written."""
    checksums.check(workdir / DIRECTORY / str(rounds))


class Checkpoints:
    """The last states of a run by number of finished rounds, written while the next one runs.

    Each holds the checksums of its files from the moment on at which it is there.

    Args:
      workdir: Of a run.
      given: Arrays that whoever goes on with the run reads from elsewhere, such as a pretrained
        backbone. Of those in a state that are these very objects a fingerprint is kept instead.
      read_only: Nothing is to be written, nor is what another process has not finished removed.
    """

    def __init__(self, workdir: Path, given: PyTree = (), *, read_only: bool = False):
        self._directory = workdir.absolute() / DIRECTORY
        # What a method merges into is not held here, when the run has gone on from it.
        self._given = weakref.WeakValueDictionary({id(x): x for x in jax.tree.leaves(given)})
        self._fingerprints: dict[int, jax.Array] = {}
        self._waiting: tuple[int, PyTree] | None = None
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=2,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
            )
        self._manager = ocp.CheckpointManager(
            self._directory, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def _add_checksums(self) -> None:
        """Called when all is written and not yet in its place."""
        if not hosts.is_first():
            return
        for each in self._directory.iterdir():
            if each.is_dir() and not (each / checksums.CHECKSUMS).exists():
                checksums.write(each)
        # The one before has its name for good, when the one before that is removed.
        checksums.force(self._directory)

    def restore(self, rounds: int, like: PyTree) -> PyTree:
        """The state after so many rounds, with arrays of `like` for those that were given.

        Raises:
          ValueError: If the checkpoint has another structure or other shapes than `like`, or an
            array of `like` is not the one that was given.
        """
        leaves, structure = jax.tree.flatten(like)
        try:
            given = self._given_then(rounds, like)
            expected = [fingerprint(x) if name else x for x, name in zip(leaves, given)]
            abstract = [ocp.utils.to_shape_dtype_struct(x) for x in expected]
            wanted = ocp.args.StandardRestore(jax.tree.unflatten(structure, abstract))
            found = self._manager.restore(rounds, args=wanted)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the checkpoint in {self._directory} is of another model or method: "
                "choose another work directory, or remove this one"
            ) from error
        restored = jax.tree.leaves(found)
        for name, mine, theirs in zip(given, expected, restored):
            if name and int(mine) != int(theirs):
                raise ValueError(
                    f"{name} is not what the run in {self._directory.parent} began with, and its "
                    "checkpoints are without it: bring back the files that were "
                    "config.pretrained.source then, or choose another work directory"
                )
        state = [mine if name else theirs for name, mine, theirs in zip(given, leaves, restored)]
        return jax.tree.unflatten(structure, state)

    def _given_then(self, rounds: int, like: PyTree) -> list[str | None]:
        """The names of the arrays that a checkpoint has fingerprints of, None for all others."""
        there = ocp.tree.to_flat_dict(self._manager.item_metadata(rounds).tree)
        here = ocp.tree.to_flat_dict(like)
        return [
            "/".join(path) if tuple(there[path].shape) == () != jnp.shape(leaf) else None
            for path, leaf in here.items()
        ]

    def oldest(self) -> int:
        """The number of finished rounds of the oldest state that is on the disk; 0 without."""
        # Orbax counts what it is writing, and no more what it removes when that is written.
        return min(finished(self._directory.parent), default=0)

    def save(self, rounds: int, state: PyTree) -> None:
        """Starts to write the state after so many rounds."""
        self._waiting = None
        kept = jax.tree.map(self._kept, state)
        self._manager.save(rounds, args=ocp.args.StandardSave(kept))

    def wait_with(self, rounds: int, state: PyTree) -> None:
        """Leaves the state after so many rounds to `save_waiting`, or to the next one."""
        self._waiting = rounds, state

    def save_waiting(self) -> None:
        """Starts to write the state that was left, if that is the last one."""
        if self._waiting is not None:
            self.save(*self._waiting)

    def _kept(self, leaf: Any) -> Any:
        # By its shape a fingerprint is known, and so a scalar is written as it is.
        if id(leaf) not in self._given or not leaf.ndim:
            return leaf
        if id(leaf) not in self._fingerprints:
            self._fingerprints[id(leaf)] = fingerprint(leaf)
        return self._fingerprints[id(leaf)]

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.close()


@jax.jit
def fingerprint(array: jax.Array) -> jax.Array:
    """A number that another array of this shape most likely has not, uint32 `[]`.

    The sum of an array's words, each times an odd number of its own, modulo 2^32: a change of one
    number alone is always seen.
    """
    word = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32).ravel()
    odd = 2 * jax.lax.iota(jnp.uint32, words.size) + 1
    return jnp.sum(words * odd, dtype=jnp.uint32)
