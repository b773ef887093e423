"""Rounds one by one, for studies that look at more than metrics, and what they have found."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fedlora_jax.experiment import State, records
from fedlora_jax.experiment.program import schedule
from fedlora_jax.federated import cohort
from fedlora_jax.federated.round import Federation


def each(
    config: ConfigDict, state: State, step: Callable[..., tuple[Federation, Any]]
) -> Iterator[tuple[Federation, Any]]:
    """The federation after each round, and what else `step` returns.

    Args:
      config: With the seed of the run.
      state: From `experiment.first_state`, under that seed.
      step: `(federation, data, cohort, seed, learning_rate) -> (federation, anything)`, as
        `run_round` takes them.
    """
    key, rate_of, federation = jax.random.key(config.seed), schedule(config), state.federation
    sizes = {"num_clients": len(state.ranks), "cohort_size": state.cohort_size}
    for index in range(config.rounds):
        members = cohort.sample(key, index, **sizes)
        rate = jnp.float32(rate_of(index))
        federation, found = step(federation, state.data, members, key, rate)
        yield federation, found


def read(path: Path, config: ConfigDict) -> list[dict[str, Any]]:
    """The runs that `write` has written; none if there is no such file.

    Raises:
      ValueError: If they are of another configuration.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if found["config"] != _shared(config):
        raise ValueError(f"{path} is of another configuration: choose another --out, or remove it")
    return found["runs"]


def write(path: Path, config: ConfigDict, runs: Sequence[dict[str, Any]]) -> None:
    """Writes the runs of a study, each a JSON object, with the configuration that all share."""
    text = json.dumps({"config": _shared(config), "runs": runs}, indent=1)
    records.write_atomically(path, text + "\n")


def _shared(config: ConfigDict) -> Any:
    """The configuration, but for what a study sets itself and where things lie."""
    mine = config.to_dict()
    for name in ("method", "seed", "backbone_dir", "mesh"):
        mine.pop(name, None)
    return json.loads(json.dumps(mine, default=list))
