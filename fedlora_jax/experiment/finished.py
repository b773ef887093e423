"""A finished run, or one that was cut short, read back from its work directory."""

import json
from pathlib import Path
from typing import NamedTuple

import ml_collections

from fedlora_jax.experiment import records
from fedlora_jax.experiment.loop import State, first_state
from fedlora_jax.experiment.program import Program, compile_program
from fedlora_jax.experiment.setting import Setting, prepare
from fedlora_jax.names import lookup


class Finished(NamedTuple):
    """A run as its last checkpoint has it.

    Attributes:
      config: As it was, but judged on the split that was asked for.
      setting: Data and pretrained model.
      program: The compiled functions of its method.
      state: Server and clients after the last finished round, and the data.
      rounds: How many rounds that is.
    """

    config: ml_collections.ConfigDict
    setting: Setting
    program: Program
    state: State
    rounds: int


def restore(workdir: Path, split: str = "test") -> Finished:
    """Reads the last state of a run.

    Args:
      workdir: Of `experiment.run`.
      split: A name in `config.data.splits`, on which it is to be judged.

    Raises:
      FileNotFoundError: If there is no run, or no round of it is finished.
      ValueError: If there is no such split, or the checkpoint does not fit the configuration.
    """
    config = judged_on(read_config(workdir), split)
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"{workdir}: no round of this run is finished")
    setting = prepare(config)
    program = compile_program(config, setting)
    start = first_state(config, setting, program.method)
    checkpoints = records.Checkpoints(workdir)
    try:
        federation, rounds = checkpoints.restore(start.federation)
    finally:
        checkpoints.close()
    if not rounds:
        raise FileNotFoundError(f"{workdir}: no round of this run is finished")
    return Finished(config, setting, program, start._replace(federation=federation), rounds)


def read_config(workdir: Path) -> ml_collections.ConfigDict:
    """The configuration of the run in a work directory.

    Raises:
      FileNotFoundError: If there is no run.
    """
    path = workdir / records.CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"there is no run in {workdir}: no {records.CONFIG}")
    stored = json.loads(path.read_text())
    # Of the methods' options only those of its own are kept.
    stored["options"] = {stored["method"]: stored["options"]}
    return ml_collections.ConfigDict(stored)


def judged_on(config: ml_collections.ConfigDict, split: str) -> ml_collections.ConfigDict:
    """The configuration with another split in the place of the test split.

    Raises:
      ValueError: If it names no such split.
    """
    config = config.copy_and_resolve_references()
    config.data.splits.test = lookup(config.data.splits.to_dict(), split, "split")
    return config
