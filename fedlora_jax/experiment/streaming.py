"""The examples of a cohort, read from files and decoded while the round before is computed."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax.data.clients import NO_PLACE, ClientData, CohortExamples
from fedlora_jax.data.stored import Stored
from fedlora_jax.experiment.program import Program
from fedlora_jax.experiment.state import State, rows
from fedlora_jax.federated import placement, visits

# Decoded images that wait for their place in a cohort, for each thread that decodes.
_WAITING = 4


class Stream:
    """Gives each round the data of its clients.

    Of data that are in files there are the examples of two rounds in memory: those that a round
    trains on, and those of the next one. Of data in memory all rounds get the same.

    Args:
      stored: The training examples; None if they are in memory.
      start: The state before the first round.
      program: Of the method.
      seed: The seed's key.
    """

    def __init__(self, stored: Stored | None, start: State, program: Program, seed: jax.Array):
        self._data, self._stored, self._mesh = start.data, stored, program.mesh
        self._ahead: dict[tuple[int, int], Future[ClientData]] = {}
        self._latest: tuple[tuple[int, int], ClientData] | None = None
        self._waited = 0.0
        if stored is None:
            return
        self._background = ThreadPoolExecutor(1)
        self._seed = seed
        self._positions, self._offsets, self._counts = (
            np.asarray(x) for x in (start.data.positions, start.data.offsets, start.data.counts)
        )
        calibration = visits.calibration_batches(program.method, start.server, start.client)
        training = program.recipe.training
        self._visits = visits.make_visits(training, calibration, int(self._counts.max()))

    def begin(self, index: int, members: np.ndarray) -> None:
        """Begins to read what a round needs, in the background.

        Args:
          index: The round.
          members: The clients of its cohort, `[K]`; -1 is nobody.
        """
        key = (index, len(members))
        if self._stored is None or key in self._ahead:
            return
        # Asked of the device before it is busy with a round.
        counts = self._counts[np.maximum(members, 0)]
        places = np.asarray(
            self._visits(self._seed, index, jnp.asarray(members), jnp.asarray(counts))
        )
        self._ahead[key] = self._background.submit(self._read, self._stored, members, places)

    def data(self, index: int, members: np.ndarray) -> ClientData:
        """What a round needs, on the device; waits until all of it is read.

        Args:
          index: The round.
          members: The clients of its cohort, `[K]`; -1 is nobody.

        Raises:
          ValueError: If a file is no image; the message says which.
        """
        if self._stored is None:
            return self._data
        key, began = (index, len(members)), time.perf_counter()
        if self._latest is None or self._latest[0] != key:
            self._latest = None
            self.begin(index, members)
            self._latest = (key, self._ahead.pop(key).result())
        self._waited = time.perf_counter() - began
        return self._latest[1]

    def waited(self) -> dict[str, float]:
        """The seconds that the last round has waited for its data, if these are in files."""
        return {} if self._stored is None else {"seconds_waiting": self._waited}

    def close(self) -> None:
        """Ends the reading; of a round that is being read, all is read before."""
        if self._stored is not None:
            self._background.shutdown(cancel_futures=True)

    def _read(self, stored: Stored, members: np.ndarray, places: np.ndarray) -> ClientData:
        there = places != NO_PLACE
        offsets = self._offsets[np.maximum(members, 0)]
        owned = self._positions[np.where(there, offsets[:, None] + places, 0)]
        examples = {name: values[owned] for name, values in stored.columns.items()}
        here = there & placement.own_rows(self._mesh, len(members))[:, None]
        examples["image"] = load_images(stored.image, owned, here)
        own = CohortExamples(examples, places)
        return self._data._replace(examples=jax.block_until_ready(rows(own, self._mesh)))


def load_images(
    image: Callable[[int], np.ndarray], indices: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """The images `[K, V, H, W, C]` with these indices `[K, V]`; zeros where none is wanted."""
    import grain

    first = image(0)
    images = np.zeros((*indices.shape, *first.shape), first.dtype)
    if wanted.any():
        threads = os.cpu_count() or 1
        loaded = (
            grain.MapDataset.source(indices[wanted].tolist())
            .map(image)
            .to_iter_dataset(grain.ReadOptions(threads, _WAITING * threads))
        )
        flat = images.reshape(-1, *first.shape)
        for place, pixels in zip(np.flatnonzero(wanted), loaded, strict=True):
            flat[place] = pixels
    return images
