"""One method trained under one seed, from its first state to its last record."""

import functools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fedlora_jax.experiment import chunking, hosts, partitions, records
from fedlora_jax.experiment.client_store import ClientStore
from fedlora_jax.experiment.measure import Participation, make_measure
from fedlora_jax.experiment.program import Program, check, schedule
from fedlora_jax.experiment.setting import Setting
from fedlora_jax.experiment.state import everywhere, first_state, rows
from fedlora_jax.experiment.streaming import Stream
from fedlora_jax.federated import cohort, communication, placement
from fedlora_jax.federated.evaluation import panel_states

Progress = Callable[[], Any]


def run(
    config: ml_collections.ConfigDict,
    setting: Setting,
    program: Program,
    workdir: Path,
    advance: Progress = lambda: None,
    announce: Callable[[str], Any] | None = None,
    *,
    until: int | None = None,
) -> list[dict[str, Any]]:
    """Trains one method under one seed, from the last finished round found in `workdir`.

    Writes into `workdir`:

    * `config.json`: the configuration, with the options of this method alone.
    * `partition.json`: whose the training examples are. One that is there is used.
    * `clients_per_chunk.json`: how many clients train at once, if that was left open.
    * `metrics.jsonl`: one line a round, see `docs/outputs.md`, and the same as TensorBoard events.
    * `checkpoints/`: the last two states of the server, by Orbax.
    * `clients/`: the states of clients that keep one, see `client_store`.
    * `adapters.npz`: the final adapters.

    Args:
      config: As in `configs/`.
      setting: From `prepare`.
      program: From `compile_program`, for the method of the configuration.
      workdir: A directory of this run's own.
      advance: Called after each finished round, and once for each round found finished.
      announce: Called before the first round, if any is to be run, with a line that says how many
        clients train at once and what memory that needs.
      until: How many rounds are to be finished, as if killed then; all of the configuration by
        default. A run with more of them finished stays as it is.

    Returns:
      The metrics of all rounds.

    Raises:
      ValueError: If `workdir` holds a run of another configuration or a partition of other data, or
        if a round cannot fit the memory.
      FloatingPointError: If no client of a round sent finite values; the last good state is kept.
    """
    check(config)
    mesh, last_round = program.mesh, min(until or config.rounds, config.rounds)
    found = partitions.of_run(config, setting.train, workdir)
    start = first_state(config, setting, program.method, found.parts, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    with hosts.first_before_others("claimed"):
        _claim(config, workdir)
        partitions.write(found, workdir)
    checkpoints = records.Checkpoints(workdir)
    server, first = checkpoints.restore(start.server)
    store = ClientStore(workdir, start.client, len(start.ranks), first)
    for _ in range(first):
        advance()
    seed = jax.random.key(config.seed)
    sizes = {"num_clients": len(start.data.counts), "cohort_size": start.cohort_size}
    draw = functools.partial(cohort.sample, seed, **sizes)
    last = cohort.last_rounds(seed, first, **sizes)
    measure = make_measure(config, program, setting.domains, start)
    rate_of = schedule(config)
    stream = Stream(setting.stored, start, program, seed)

    def inputs(index: int, chosen: np.ndarray) -> tuple[Any, ...]:
        """What a round of these clients gets besides the server's state."""
        members = placement.padded(chosen, mesh)
        states = rows(store.read(members), mesh)
        shared = everywhere((seed, jnp.float32(rate_of(index))), mesh)
        data = stream.data(index, members)
        return states, start.ranks, data, rows(members, mesh), *shared

    if first < last_round:
        chosen, devices = np.asarray(draw(first)), placement.devices(mesh)
        some = chosen[: chunking.MOST * devices]
        trial, arguments = ((server, *inputs(first, who)) for who in (some, chosen))
        each = -(-len(chosen) // devices)
        round_function = chunking.of_run(
            config, program.make_round, arguments, trial, each, workdir, announce
        )
        del arguments, trial  # They hold the examples of a round.
    writer = records.MetricsWriter(workdir, first) if hosts.is_first() else None
    try:
        for index in range(first, last_round):
            chosen = np.asarray(draw(index))
            who = Participation(chosen, communication.absences(last, chosen, index))
            last[chosen] = index
            began = time.perf_counter()
            given = inputs(index, chosen)
            if index + 1 < last_round:
                stream.begin(index + 1, placement.padded(np.asarray(draw(index + 1)), mesh))
            server, states, measured = round_function(server, *given)
            states, measured = hosts.gathered(states), jax.device_get(measured)
            seconds = time.perf_counter() - began
            _stop_or_warn(int(measured.excluded), start.cohort_size, index, workdir)
            with hosts.first_before_others("states written"):
                store.write(index, chosen, _first(states, start.cohort_size))
            judged = panel_states(program.method, store.read, start.test)
            row = {**measure(index, who, server, judged, measured), **stream.waited()}
            if writer is not None:
                writer.write({**row, "seconds": seconds})
            checkpoints.save(index + 1, server)
            store.forget(checkpoints.oldest())
            advance()
    finally:
        stream.close()
        if writer is not None:
            writer.close()
        checkpoints.close()
    with hosts.first_before_others("finished"):
        if hosts.is_first():
            records.save_adapters(workdir / "adapters.npz", server.trainable.adapters)
    return records.read_metrics(workdir)


def _first(tree: Any, count: int) -> Any:
    """The first so many rows of each array."""
    return jax.tree.map(lambda x: x[:count], tree)


def _stop_or_warn(excluded: int, cohort_size: int, index: int, workdir: Path) -> None:
    if excluded == cohort_size:
        raise FloatingPointError(
            f"round {index}: every client of the cohort diverged (its values are not finite). "
            + (f"The state after round {index - 1} is kept in {workdir}; try" if index else "Try")
            + " a smaller config.local.learning_rate or config.local.clip_norm"
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
    # The same run, on whatever devices.
    mine.pop("mesh", None)
    text = json.dumps(mine, indent=2, sort_keys=True, default=list) + "\n"
    path = workdir / records.CONFIG
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = records.differences(json.loads(text), theirs, "config")
        if _same_rounds(config) and config.rounds >= theirs["rounds"]:
            changed = [line for line in changed if not line.startswith(_LENGTHS)]
        # The same run, wherever its data wait.
        changed = [line for line in changed if not line.startswith("config.data.streaming ")]
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
