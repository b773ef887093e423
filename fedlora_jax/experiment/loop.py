"""One method trained under one seed, from its first state to its last record."""

import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fedlora_jax import lora
from fedlora_jax.data.clients import ClientData, client_data
from fedlora_jax.data.partition import Parts
from fedlora_jax.experiment import chunking, partitions, records
from fedlora_jax.experiment.measure import make_measure
from fedlora_jax.experiment.program import Program, check, schedule
from fedlora_jax.experiment.setting import Setting, dtype_of, is_labelled
from fedlora_jax.federated import cohort, randomness, ranks
from fedlora_jax.federated.evaluation import HeldOut, held_out
from fedlora_jax.federated.round import Federation, create
from fedlora_jax.methods import Method, Server, Trainable

Progress = Callable[[], Any]


class State(NamedTuple):
    """A federation before its first round, with its data on the device."""

    federation: Federation
    data: ClientData
    test: HeldOut
    cohort_size: int


def first_state(
    config: ml_collections.ConfigDict,
    setting: Setting,
    method: Method,
    parts: Parts | None = None,
) -> State:
    """Splits the data over clients and makes the first adapters, both from `config.seed`.

    Args:
      config: As in `configs/`.
      setting: From `prepare`.
      method: What is run.
      parts: The positions of each client's examples; by default drawn.

    Raises:
      ValueError: If a round wants more clients than there are, there are not as many ranks as
        clients, or as `lora.init`.
    """
    seed = jax.random.key(config.seed)
    parts = partitions.draw(config, setting.train, config.seed) if parts is None else parts
    if not method.pooled and config.clients_per_round > len(parts):
        raise ValueError(
            f"config.clients_per_round is {config.clients_per_round}, but the partition "
            f"{config.data.partition!r} makes only {len(parts)} clients"
        )
    if method.pooled:
        parts = [np.concatenate(parts)]
    backbone, head = lora.split_head(setting.params, config.lora.head)
    adapters = lora.init(
        randomness.stream(seed, "adapters"),
        backbone,
        targets=config.lora.targets,
        rank=config.lora.rank,
    )
    server = Server(
        backbone,
        Trainable(adapters, head),
        scale=jnp.float32(config.lora.scale),
        memory=(),
        round=jnp.int32(0),
    )
    affordable = None
    if not method.pooled:
        affordable = ranks.assign(config.lora.ranks, config.lora.rank, len(parts), config.seed)
    federation = create(
        randomness.stream(seed, "method"),
        method,
        server,
        len(parts),
        affordable,
        dtype_of(config.precision.compute),
    )
    # Arrays read from a file are tied to a device, new ones are not, and a round's results are if
    # any input was: all tied from the start, a round compiles once, also after a restart.
    federation = jax.tree.map(lambda x: jax.device_put(x, x.sharding), federation)
    return State(
        federation,
        client_data(setting.train, parts),
        _held_out(config, setting, parts),
        1 if method.pooled else config.clients_per_round,
    )


def _held_out(
    config: ml_collections.ConfigDict, setting: Setting, parts: Sequence[np.ndarray]
) -> HeldOut:
    """Each client's own text where there is such; else examples of its domains and labels."""
    natural = config.data.partition == "natural"
    train, test = setting.train, setting.test
    kind = "client" if natural else "label" if is_labelled(train) else "domain"
    return held_out(
        test,
        test["domain"],
        test[kind],
        [(train["domain"][part], train[kind][part]) for part in parts],
        kinds_are_own=natural,
    )


def run(
    config: ml_collections.ConfigDict,
    setting: Setting,
    program: Program,
    workdir: Path,
    advance: Progress = lambda: None,
    announce: Callable[[str], Any] | None = None,
) -> list[dict[str, Any]]:
    """Trains one method under one seed, from the last finished round found in `workdir`.

    Writes into `workdir`:

    * `config.json`: the configuration, with the options of this method alone.
    * `partition.json`: whose the training examples are. One that is there is used.
    * `clients_per_chunk.json`: how many clients train at once, if that was left open.
    * `metrics.jsonl`: one line a round, see `docs/outputs.md`, and the same as TensorBoard events.
    * `checkpoints/`: the last two states, by Orbax.
    * `adapters.npz`: the final adapters.

    Args:
      config: As in `configs/`.
      setting: From `prepare`.
      program: From `compile_program`, for the method of the configuration.
      workdir: A directory of this run's own.
      advance: Called after each finished round, and once for each round found finished.
      announce: Called before the first round, if any is to be run, with a line that says how many
        clients train at once and what memory that needs.

    Returns:
      The metrics of all rounds.

    Raises:
      ValueError: If `workdir` holds a run of another configuration or a partition of other data, or
        if a round cannot fit the memory.
      FloatingPointError: If no client of a round sent finite values; the last good state is kept.
    """
    check(config)
    found = partitions.of_run(config, setting.train, workdir)
    start = first_state(config, setting, program.method, found.parts)
    workdir.mkdir(parents=True, exist_ok=True)
    _claim(config, workdir)
    partitions.write(found, workdir)
    checkpoints = records.Checkpoints(workdir)
    federation, first = checkpoints.restore(start.federation)
    for _ in range(first):
        advance()
    seed = jax.random.key(config.seed)
    cohorts = cohort.all_rounds(
        seed,
        config.rounds,
        num_clients=len(start.data.counts),
        cohort_size=start.cohort_size,
    )
    measure = make_measure(config, program, setting.domains, start.federation, start.test, cohorts)
    rate_of = schedule(config)
    if first < config.rounds:
        members = cohorts[first]
        arguments, trial = (
            (federation, start.data, some, seed, jnp.float32(rate_of(first)))
            for some in (members, members[: chunking.MOST])
        )
        round_function = chunking.of_run(
            config, program.make_round, arguments, trial, len(members), workdir, announce
        )
    writer = records.MetricsWriter(workdir, first)
    try:
        for index in range(first, config.rounds):
            began = time.perf_counter()
            federation, measured = round_function(
                federation, start.data, cohorts[index], seed, jnp.float32(rate_of(index))
            )
            jax.block_until_ready(federation)
            seconds = time.perf_counter() - began
            _stop_or_warn(int(measured.excluded), start.cohort_size, index, workdir)
            writer.write({**measure(index, federation, measured), "seconds": seconds})
            checkpoints.save(index + 1, federation)
            advance()
    finally:
        writer.close()
        checkpoints.close()
    records.save_adapters(workdir / "adapters.npz", federation.server.trainable.adapters)
    return records.read_metrics(workdir)


def _stop_or_warn(excluded: int, cohort_size: int, index: int, workdir: Path) -> None:
    if excluded == cohort_size:
        raise FloatingPointError(
            f"round {index}: every client of the cohort diverged (its values are not finite). The "
            f"state after round {index - 1} is kept in {workdir}; try a smaller "
            "config.local.learning_rate or config.local.clip_norm"
        )
    if excluded:
        warnings.warn(
            f"round {index}: {excluded} of {cohort_size} clients left out, their values are not "
            "finite",
            stacklevel=3,
        )


def _claim(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes the configuration, or finds that the directory's run is the same one.

    More rounds than a run had go on with it, if its rounds do not depend on how many there are.
    """
    mine = {**config.to_dict(), "options": config.options[config.method].to_dict()}
    text = json.dumps(mine, indent=2, sort_keys=True, default=list) + "\n"
    path = workdir / records.CONFIG
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = records.differences(json.loads(text), theirs, "config")
        if _same_rounds(config) and config.rounds >= theirs["rounds"]:
            changed = [line for line in changed if not line.startswith(_LENGTHS)]
        if changed:
            raise ValueError(
                f"{workdir} holds a run of another configuration ({'; '.join(changed)}). Choose "
                "another work directory, or remove this one"
            )
        if text == path.read_text():
            return
    records.write_atomically(path, text)


_LENGTHS = ("config.rounds ", "config.options.rounds ")


def _same_rounds(config: ml_collections.ConfigDict) -> bool:
    """Whether a round is the same however many follow."""
    options = config.options[config.method]
    falls = options.get("zeta_min", 0) < options.get("zeta", 0)
    return config.local.schedule == "constant" and not falls
