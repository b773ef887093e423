"""Rounds one by one, for studies that look at more than metrics, and what they have found."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fedlora_jax.experiment import State, chunking, records
from fedlora_jax.experiment.program import schedule
from fedlora_jax.experiment.setting import is_streamed
from fedlora_jax.federated import cohort
from fedlora_jax.federated.round import Federation

Make: TypeAlias = Callable[[int], Callable[..., tuple[Federation, Any]]]


def check(config: ConfigDict) -> None:
    """Raises ValueError if the configuration wants what `each` cannot: devices, data in files."""
    wanted = config.get("mesh", {})
    if any(wanted.get(axis, 1) != 1 for axis in ("clients", "model")):
        raise ValueError(
            "this study runs on one device: set config.mesh.clients=1 and config.mesh.model=1"
        )
    if is_streamed(config):
        raise ValueError("this study holds its data in memory: set config.data.streaming=False")


def each(
    config: ConfigDict, state: State, make: Make, *first: Any
) -> Iterator[tuple[Federation, Any]]:
    """The federation after each round, and what else the round returns.

    Args:
      config: With the seed of the run, and how many clients are to train at once.
      state: From `experiment.first_state`, under that seed.
      make: From a number of clients at once to a jitted `(*first, federation, data, cohort, seed,
        learning_rate) -> (federation, anything)`; the same function for the same number.
      *first: What the round is given besides.
    """
    key, rate_of, federation = jax.random.key(config.seed), schedule(config), state.federation
    sizes = {"num_clients": len(state.ranks), "cohort_size": state.cohort_size}

    def inputs(index: int) -> tuple[Any, ...]:
        members = cohort.sample(key, index, **sizes)
        return *first, federation, state.data, members, key, jnp.float32(rate_of(index))

    chosen = chunking.choose(config, make, inputs(0), inputs(0), state.cohort_size)
    step = make(chosen.size)
    for index in range(config.rounds):
        federation, found = step(*inputs(index))
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
