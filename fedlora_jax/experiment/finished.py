"""What a run has come to, read back from its work directory, or what it starts from."""

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from fedlora_jax.experiment import checkpoints, partitions, records, resuming
from fedlora_jax.experiment.client_store import ClientStore
from fedlora_jax.experiment.measure import in_words
from fedlora_jax.experiment.program import Program, compile_program
from fedlora_jax.experiment.setting import Setting, prepare
from fedlora_jax.experiment.state import State, first_state
from fedlora_jax.federated.evaluation import panel_states
from fedlora_jax.federated.task import metrics_of
from fedlora_jax.names import lookup

# Of all methods the one that does least: a model for all, and nothing else.
LEAST = "fedit"


class Finished(NamedTuple):
    """A run as its last checkpoint has it, or before its first round.

    Attributes:
      config: As it was, but judged on the split, and by the metrics, that were asked for.
      setting: Data and pretrained model.
      program: The compiled functions of its method.
      state: The server after the last finished round, and the data.
      clients: The states of the clients then.
      rounds: How many rounds that is.
    """

    config: ml_collections.ConfigDict
    setting: Setting
    program: Program
    state: State
    clients: ClientStore
    rounds: int

    def measure(self) -> dict[str, Any]:
        """The metrics on held-out examples, as a line of `metrics.jsonl` has them."""
        server, test = self.state.server, self.state.test
        states = panel_states(self.program.method, self.clients.read, test)
        found = self.program.evaluate(server, states, test)
        return in_words(self.program.metrics, found, self.setting.domains)


def untrained(config: ml_collections.ConfigDict, setting: Setting) -> Finished:
    """What every run of a configuration starts from: the model for all, and nothing trained."""
    config = config.copy_and_resolve_references()
    config.method = LEAST
    program = compile_program(config, setting)
    state = first_state(config, setting, program.method, mesh=program.mesh)
    clients = ClientStore(Path(), state.client, len(state.ranks))
    return Finished(config, setting, program, state, clients, 0)


def judge_untouched(config: ml_collections.ConfigDict, setting: Setting) -> dict[str, Any] | None:
    """The metrics of the model before any training; None if it has a new head to be trained."""
    return None if config.lora.head else untrained(config, setting).measure()


def restore(workdir: Path, split: str = "test", metrics: Sequence[str] = ()) -> Finished:
    """Reads the last state of a run.

    Args:
      workdir: Of `experiment.run`.
      split: A name in `config.data.splits`, on which it is to be judged.
      metrics: By which; those of the run if there are none.

    Raises:
      FileNotFoundError: If there is no run, or no round of it is finished.
      ValueError: If there is no such split or metric, the checkpoint does not fit the
        configuration, or the data are others than then.
    """
    config = judged_on(read_config(workdir), split, metrics)
    if not checkpoints.finished(workdir):
        raise FileNotFoundError(f"{workdir}: no round of this run is finished")
    setting = prepare(config)
    program = compile_program(config, setting)
    parts = partitions.of_run(config, setting.train, workdir).parts
    start = first_state(config, setting, program.method, parts, program.mesh)
    found = resuming.newest(config, start, workdir)
    for why in found.damaged.values():
        warnings.warn(f"{why}. The state after {found.rounds} rounds is taken", stacklevel=2)
    with contextlib.closing(checkpoints.Checkpoints(workdir, read_only=True)) as kept:
        server = kept.restore(found.rounds, start.server)
    start = start._replace(server=server)
    return Finished(config, setting, program, start, found.clients, found.rounds)


def read_config(workdir: Path) -> ml_collections.ConfigDict:
    """The configuration of the run in a work directory.

    Raises:
      FileNotFoundError: If there is no run.
      Damaged: If its configuration is not what was written.
    """
    path = workdir / records.CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"there is no run in {workdir}: no {records.CONFIG}")
    stored = records.read_sealed(path)
    # Of the methods' options only those of its own are kept.
    stored["options"] = {stored["method"]: stored["options"]}
    return ml_collections.ConfigDict(stored)


def judged_on(
    config: ml_collections.ConfigDict, split: str, metrics: Sequence[str] = ()
) -> ml_collections.ConfigDict:
    """The configuration with another split in the place of the test split, and other metrics.

    Args:
      config: To be judged otherwise.
      split: A name in `config.data.splits`.
      metrics: Names of metrics; if there are none, those that it has stay.

    Raises:
      ValueError: If there is no such split, or no such metric of its task.
    """
    config = config.copy_and_resolve_references()
    config.data.splits.test = lookup(config.data.splits.to_dict(), split, "split")
    if metrics:
        config.metrics = tuple(metric.name for metric in metrics_of(config.task, metrics))
    return config
