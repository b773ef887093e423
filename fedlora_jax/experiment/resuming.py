"""Where a run goes on: the newest checkpoint of which all is as it was written."""

from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from fedlora_jax.checksums import Damaged
from fedlora_jax.experiment import checkpoints, records
from fedlora_jax.experiment.client_store import ClientStore
from fedlora_jax.experiment.state import State
from fedlora_jax.federated import cohort


class Resumed(NamedTuple):
    """Where a run goes on.

    Attributes:
      rounds: How many rounds are finished; 0 if the run begins.
      clients: The states of the clients then.
      last: The last of these rounds that each client took part in, `[N]`; -1 if none.
      damaged: By the number of rounds, what is wrong with newer checkpoints.
    """

    rounds: int
    clients: ClientStore
    last: np.ndarray
    damaged: dict[int, str]


def newest(config: ml_collections.ConfigDict, start: State, workdir: Path) -> Resumed:
    """Finds the newest checkpoint that can be used, or the beginning if there was none yet.

    Raises:
      Damaged: If there are checkpoints, and all of them are damaged, or there were, and all are
        gone.
      ValueError: If they are of another model or method.
    """
    damaged: dict[int, str] = {}
    for rounds in reversed(checkpoints.finished(workdir)):
        try:
            checkpoints.check(workdir, rounds)
            return _after(rounds, config, start, workdir)._replace(damaged=damaged)
        except Damaged as error:
            damaged[rounds] = str(error)
    if damaged:
        raise Damaged(
            f"no checkpoint of {workdir} can be used: {'; '.join(damaged.values())}. Bring back a "
            "copy; or, to begin anew, choose another work directory or remove this one"
        )
    # A run makes their directory before its first round.
    directory = workdir / checkpoints.DIRECTORY
    if not directory.is_dir() and (recorded := len(records.read_metrics(workdir))):
        raise Damaged(
            f"{workdir} has the metrics of {recorded} rounds, but {directory} is gone. Bring it "
            "back from a copy; or, to begin anew, choose another work directory or remove this one"
        )
    return _after(0, config, start, workdir)


def _after(rounds: int, config: ml_collections.ConfigDict, start: State, workdir: Path) -> Resumed:
    clients = ClientStore(workdir, start.client, len(start.ranks), rounds)
    last = cohort.last_rounds(
        jax.random.key(config.seed),
        rounds,
        num_clients=len(start.ranks),
        cohort_size=start.cohort_size,
    )
    clients.expect(last)
    return Resumed(rounds, clients, last, {})


def set_aside(found: Resumed, workdir: Path) -> list[str]:
    """Moves the checkpoints that cannot be used out of the way; returns what to say of it."""
    said = []
    for rounds, why in found.damaged.items():
        kept = records.set_aside(workdir, f"{checkpoints.DIRECTORY}/{rounds}")
        said.append(
            f"{why}. The checkpoint after round {rounds - 1} is not used, and kept as {kept}; the "
            f"run goes on after round {found.rounds - 1}, with the same results"
        )
    return said
