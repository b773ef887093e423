"""One method trained under one seed, from its first state to its last record."""

import contextlib
import functools
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fedlora_jax import bounds, locks, lora
from fedlora_jax.experiment import chunking, hosts, partitions, records, resuming
from fedlora_jax.experiment.checkpoints import Checkpoints, fingerprint
from fedlora_jax.experiment.client_store import ClientStore
from fedlora_jax.experiment.measure import Participation, make_measure
from fedlora_jax.experiment.program import Program, check, schedule
from fedlora_jax.experiment.resuming import Resumed
from fedlora_jax.experiment.setting import Setting
from fedlora_jax.experiment.state import State, everywhere, first_state, rows
from fedlora_jax.experiment.streaming import Stream
from fedlora_jax.federated import cohort, communication, placement
from fedlora_jax.federated.evaluation import Evaluation, panel_states
from fedlora_jax.federated.round import PyTree, RoundMetrics
from fedlora_jax.lora import Params
from fedlora_jax.methods import Server

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
    * `metrics.backup`: the same lines with checksums, from which damaged ones are mended.
    * `checkpoints/`: the last two states of the server, by Orbax, with checksums, but what no round
      changes of a backbone that was read from files.
    * `clients/`: the states of clients that keep one, see `client_store`.
    * `adapters.npz`: the final adapters, and the head; and which layers have another kernel than at
      the start.
    * `damaged/`: what was found not to be as it was written, for a look; it is never read.

    Args:
      config: As in `configs/`.
      setting: From `prepare`.
      program: From `compile_program`, for the method of the configuration.
      workdir: A directory of this run's own.
      advance: Called after each finished round, and once for each round found finished.
      announce: Called before the first round, if any is to be run, with a line that says how many
        clients train at once and what memory that needs.
      until: How many rounds are to be finished, as if killed then, at least 1; all of the
        configuration by default. A run with more of them finished stays as it is.

    Returns:
      The metrics of all rounds.

    Raises:
      ValueError: If a number is out of its bounds, `workdir` holds a run of another configuration
        or a partition of other data, or a round cannot fit the memory.
      Damaged: If what is needed to go on is gone or not what was written, and nothing else has it.
      Held: If another process runs in `workdir`.
      OSError: If nothing can be written there.
      FloatingPointError: If no client of a round sent finite values; the last good state is kept.
    """
    check(config)
    bounds.check("run", until=until)
    rounds = min(until or config.rounds, config.rounds)
    found = partitions.of_run(config, setting.train, workdir)
    start = first_state(config, setting, program.method, found.parts, program.mesh)
    with _held(workdir):
        with hosts.first_before_others("claimed"):
            _claim(config, workdir)
            partitions.write(found, workdir)
        resumed = _resume(config, start, workdir)
        with contextlib.ExitStack() as stack:
            checkpoints = Checkpoints(workdir, _given(config, start))
            stack.enter_context(contextlib.closing(checkpoints))
            # From here on nothing holds a state of the server but the last one: after each round a
            # method that merges has other kernels.
            server, start, kernels = start.server, start.outlined(), _kernels(start.server)
            if resumed.rounds:
                server = checkpoints.restore(resumed.rounds, server)
            writer = None
            if hosts.is_first():
                writer = records.MetricsWriter(workdir, resumed.rounds)
                stack.callback(writer.close)
            for _ in range(resumed.rounds):
                advance()
            if resumed.rounds < rounds:
                kept = _Kept(workdir, resumed.clients, writer, checkpoints)
                stream = Stream(setting.stored, start, program, jax.random.key(config.seed))
                stack.enter_context(contextlib.closing(stream))
                train = _make_train(
                    config, program, start, server, resumed, rounds, stream, kept, announce
                )
                record = _make_record(config, setting, program, start, rounds, kept)
                with _saved_as_far_as_it_came(checkpoints):
                    for index in range(resumed.rounds, rounds):
                        server, results = train(index, server)
                        record(index, server, results)
                        advance()
        merged = [layer for layer, now in _kernels(server).items() if now != kernels[layer]]
        with hosts.first_before_others("finished"):
            if hosts.is_first():
                records.save_trainable(workdir / "adapters.npz", server.trainable, merged)
        return records.read_metrics(workdir, max(rounds, resumed.rounds))


def _given(config: ml_collections.ConfigDict, start: State) -> Params:
    """The part of the state that whoever goes on with the run reads from files."""
    # What is made here, and not read from files, may come out otherwise elsewhere.
    return start.server.backbone if "pretrained" in config else {}


def _kernels(server: Server) -> dict[str, np.ndarray]:
    """Of each adapted layer a number that changes with its kernel."""
    kernels, adapted = lora.kernels(server.backbone), server.trainable.adapters
    return jax.device_get({layer: fingerprint(kernels[layer]) for layer in adapted})


@contextlib.contextmanager
def _saved_as_far_as_it_came(checkpoints: Checkpoints) -> Iterator[None]:
    """A run that is ended between two checkpoints leaves one of the last finished round."""
    try:
        yield
    except BaseException as error:
        # Of several hosts all have to write: after what ends them all in the same round.
        if not hosts.are_several() or isinstance(error, SystemExit | FloatingPointError):
            checkpoints.save_waiting()
        raise


class _Kept(NamedTuple):
    """Where the results of rounds are kept; the writer on the first host alone."""

    workdir: Path
    clients: ClientStore
    writer: records.MetricsWriter | None
    checkpoints: Checkpoints


@contextlib.contextmanager
def _held(workdir: Path) -> Iterator[None]:
    """Keeps other processes out of a work directory; of several hosts the first one does it."""
    refusal: OSError | None = None
    with contextlib.ExitStack() as stack:
        if hosts.is_first():
            try:
                stack.enter_context(locks.held(workdir, workdir / ".lock"))
            except OSError as error:
                refusal = error
        if hosts.any_of_all(isinstance(refusal, locks.Held)):
            raise refusal or locks.Held(f"{workdir} is in use, says the first host")
        if hosts.any_of_all(refusal is not None):
            raise refusal or OSError(f"the first host cannot write in {workdir}")
        yield


def _resume(config: ml_collections.ConfigDict, start: State, workdir: Path) -> Resumed:
    """Where the run goes on; what is damaged is moved out of the way when all is known."""
    resumed = resuming.newest(config, start, workdir)
    records.read_metrics(workdir, resumed.rounds)
    hosts.wait("checked")
    with hosts.first_before_others("set aside"):
        for line in resuming.set_aside(resumed, workdir) if hosts.is_first() else ():
            warnings.warn(line, stacklevel=4)
    return resumed


class _Results(NamedTuple):
    """What a round gives besides the server's state, on the host."""

    who: Participation
    states: PyTree
    measured: RoundMetrics
    seconds: dict[str, float]


def _make_train(
    config: ml_collections.ConfigDict,
    program: Program,
    start: State,
    server: Server,
    resumed: Resumed,
    rounds: int,
    stream: Stream,
    kept: _Kept,
    announce: Callable[[str], Any] | None,
) -> Callable[[int, Server], tuple[Server, _Results]]:
    """Builds `(round, server before it) -> (server after it, results)`.

    How many clients train at once is found with the state that the run goes on from.
    """
    mesh, last, seed = program.mesh, resumed.last, jax.random.key(config.seed)
    sizes = {"num_clients": len(start.data.counts), "cohort_size": start.cohort_size}
    draw = functools.partial(cohort.sample, seed, **sizes)
    rate_of = schedule(config)

    def inputs(index: int, chosen: np.ndarray) -> tuple[Any, ...]:
        """What a round of these clients gets besides the server's state."""
        members = placement.padded(chosen, mesh)
        own = placement.own_rows(mesh, len(members))
        states = rows(kept.clients.read(members, own), mesh)
        shared = everywhere((seed, jnp.float32(rate_of(index))), mesh)
        data = stream.data(index, members)
        return states, start.ranks, data, rows(members, mesh), *shared

    chosen, devices = np.asarray(draw(resumed.rounds)), placement.devices(mesh)
    some = chosen[: chunking.MOST * devices]
    trial, arguments = ((server, *inputs(resumed.rounds, who)) for who in (some, chosen))
    each = -(-len(chosen) // devices)
    round_function = chunking.of_run(
        config, program.make_round, arguments, trial, each, kept.workdir, announce
    )

    def train(index: int, server: Server) -> tuple[Server, _Results]:
        chosen = np.asarray(draw(index))
        who = Participation(chosen, communication.absences(last, chosen, index))
        last[chosen] = index
        began = time.perf_counter()
        given = inputs(index, chosen)
        if index + 1 < rounds:
            stream.begin(index + 1, placement.padded(np.asarray(draw(index + 1)), mesh))
        server, states, measured = round_function(server, *given)
        states, measured = placement.fetch_own_rows(states), jax.device_get(measured)
        seconds = {**stream.waited(), "seconds": time.perf_counter() - began}
        return server, _Results(who, states, measured, seconds)

    return train


def _make_record(
    config: ml_collections.ConfigDict,
    setting: Setting,
    program: Program,
    start: State,
    rounds: int,
    kept: _Kept,
) -> Callable[[int, Server, _Results], None]:
    """Builds `(round, server after it, results)`, which measures and saves them."""
    measure = make_measure(config, program, setting.domains, start)

    def is_due(index: int, every: int) -> bool:
        return (index + 1) % every == 0 or index + 1 == rounds

    def evaluate(server: Server) -> Evaluation:
        judged = panel_states(program.method, kept.clients.read, start.test)
        return program.evaluate(server, judged, start.test)

    def record(index: int, server: Server, results: _Results) -> None:
        who, states, measured, seconds = results
        answers = start.cohort_size - int(measured.absent or 0)
        _stop_or_warn(int(measured.excluded), answers, index, kept.workdir)
        places = len(placement.padded(who.cohort, program.mesh))
        writers = placement.writers(program.mesh, places)[: start.cohort_size]
        with hosts.all_or_none():
            kept.clients.write(index, who.cohort, states, writers)
        found = evaluate(server) if is_due(index, config.evaluate_every) else None
        row = measure(index, who, server, found, measured)
        if kept.writer is not None:
            kept.writer.write({**row, **seconds})
        if is_due(index, config.checkpoint_every):
            kept.checkpoints.save(index + 1, server)
        else:
            kept.checkpoints.wait_with(index + 1, server)
        kept.clients.forget(kept.checkpoints.oldest())

    return record


def _stop_or_warn(excluded: int, answers: int, index: int, workdir: Path) -> None:
    if excluded == answers > 0:
        raise FloatingPointError(
            f"round {index}: every client of the cohort diverged (its values are not finite). "
            + (f"The state after round {index - 1} is kept in {workdir}; try" if index else "Try")
            + " a smaller config.local.learning_rate or config.local.clip_norm"
        )
    if excluded:
        warnings.warn(
            f"round {index}: {excluded} of {answers} clients left out, their values are not finite",
            stacklevel=3,
        )


def check_workdir(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """Checks, without writing, that a directory's run, if there is one, is that of a configuration.

    More rounds than a run had go on with it, if its rounds do not depend on how many there are.

    Args:
      config: With method and seed of the run.
      workdir: Where it is to be.

    Returns:
      The configuration as it is recorded there; None if there is no run.

    Raises:
      ValueError: If it holds a run of another configuration; it names the fields.
      Damaged: If its configuration is not what was written, or is gone.
    """
    records.check_not_gone(workdir / records.CONFIG)
    if not (workdir / records.CONFIG).exists():
        return None
    theirs = records.read_sealed(workdir / records.CONFIG)
    changed = records.differences(_recorded(config), theirs, "config")
    if _same_rounds(config) and config.rounds >= theirs["rounds"]:
        changed = [line for line in changed if not line.startswith(_LENGTHS)]
    changed = [line for line in changed if not line.startswith(_SAME_ROUNDS)]
    if changed:
        raise ValueError(
            f"{workdir} holds a run of another configuration ({'; '.join(changed)}). Choose "
            "another work directory, or remove this one"
        )
    return theirs


def _claim(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes the configuration, or finds that the directory's run is the same one."""
    mine = _recorded(config)
    if check_workdir(config, workdir) != mine:
        records.write_sealed(workdir / records.CONFIG, mine)


def _recorded(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What of a configuration makes a run, as `config.json` has it."""
    mine = {**config.to_dict(), "options": config.options[config.method].to_dict()}
    # The same run, on whatever devices.
    mine.pop("mesh", None)
    return json.loads(json.dumps(mine, default=list))


# The same run, wherever its data wait, and however often it is looked at.
_SAME_ROUNDS = ("config.data.streaming ", "config.evaluate_every ", "config.checkpoint_every ")
_LENGTHS = ("config.rounds ", "config.options.rounds ")


def _same_rounds(config: ml_collections.ConfigDict) -> bool:
    """Whether a round is the same however many follow."""
    options = config.options[config.method]
    falls = options.get("zeta_min", 0) < options.get("zeta", 0)
    return config.local.schedule == "constant" and not falls
