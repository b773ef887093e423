"""How many clients of a cohort train at once: the fastest number that fits the memory.

A number is tried by a round whose result is thrown away, before the first one, so that a run has
one number from its first round to its last: products of other shapes are summed in another order,
and their results are equal up to rounding, but not to the bit.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import ml_collections

from fedlora_jax.data.clients import ClientData
from fedlora_jax.experiment import hosts, memory, records
from fedlora_jax.experiment.memory import Memory, readable
from fedlora_jax.federated.round import CohortRound
from fedlora_jax.methods import Server

Make: TypeAlias = Callable[[int], CohortRound]
Wanted: TypeAlias = int | Literal["auto", "all"]

RECORD = "clients_per_chunk.json"
# Of a larger cohort so many clients are tried, and no more train at once.
MOST = 128
# A run of fewer rounds would lose more by the trials than it can gain.
_ROUNDS = 4
# Larger numbers come first; when one is slower than the best by so much, smaller ones are too.
_SLOWER = 1.1
# What is quicker than this is repeated, in seconds.
_QUICK = 3.0

# What this process found, by what it depends on, for where no directory keeps it.
_found: dict[str, int] = {}


class Choice(NamedTuple):
    """How many clients train at once, and why.

    Attributes:
      size: The number.
      memory: What a round needs with it; None if the compiler does not say.
      seconds: How long a round took with each number that was tried.
    """

    size: int
    memory: Memory | None
    seconds: dict[int, float]

    def __str__(self) -> str:
        text = f"{self.size} client{'s' * (self.size > 1)} at once"
        if self.seconds:
            tried = ", ".join(f"{each:.2f} s with {n}" for n, each in self.seconds.items())
            text += f" (a round took {tried})"
        return text if self.memory is None else f"{text}; a round needs {self.memory}"


def parse(wanted: str | int) -> Wanted:
    """What `config.clients_per_chunk` says: `auto`, `all` (or 0), or a number.

    Raises:
      ValueError: If it says something else.
    """
    text = str(wanted)
    if text == "auto":
        return "auto"
    if text in ("all", "0"):
        return "all"
    if not text.isdecimal():
        raise ValueError(
            f"config.clients_per_chunk must be auto, all or a number of clients, got {text!r}"
        )
    return int(text)


def sizes(cohort_size: int) -> list[int]:
    """The numbers worth a trial, largest first: each about a quarter of the one before, down to 1.

    Where a number can divide the cohort it does: clients that are left over are a second program
    inside the first.
    """
    found = {1} | ({cohort_size} if cohort_size <= MOST else set())
    for smallest, largest in ((2, 4), (5, 16), (17, 64), (65, MOST)):
        divisors = [n for n in range(smallest, largest + 1) if cohort_size % n == 0]
        if divisors or 2 * largest < cohort_size:
            found.add(max(divisors, default=largest))
    return sorted(found, reverse=True)


def search(
    make: Make,
    arguments: Sequence[Any],
    candidates: Sequence[int],
    trial: Sequence[Any] | None = None,
) -> Choice:
    """Tries numbers of clients at once and takes the fastest that fits easily.

    Args:
      make: Builds the round for a number. Called again with the same one it should return the same
        function, so that nothing compiles twice.
      arguments: Of a round. They are not donated, and what it returns is dropped.
      candidates: The numbers, largest first.
      trial: Arguments of the round that is timed, if it is to be a smaller one; None to time
        nothing, and take the largest that fits.

    Returns:
      The choice; the smallest number, if none fits easily.
    """
    seconds: dict[int, float] = {}
    for size, _ in _fitting(make, trial, candidates) if trial is not None else ():
        taken = _time(make(size), trial or ())
        if taken is None:
            continue
        seconds[size] = taken
        if taken > _SLOWER * min(seconds.values()):
            break
    ranked = sorted(seconds, key=seconds.__getitem__)
    rest = [size for size in candidates if size not in seconds]
    for size, needed in _fitting(make, arguments, [*ranked, *rest]):
        return Choice(size, needed, seconds)
    return Choice(candidates[-1], _plan(make(candidates[-1]), arguments), seconds)


def _fitting(
    make: Make, arguments: Sequence[Any], candidates: Iterable[int]
) -> Iterator[tuple[int, Memory | None]]:
    """The numbers with which a round fits easily, and what it needs."""
    too_large: dict[int, Memory] = {}
    for size in candidates:
        # Memory falls at most in proportion to the number, which can save a compilation.
        at_least = (
            needed._replace(working=needed.working * size // larger)
            for larger, needed in too_large.items()
            if larger > size
        )
        if not all(bound.fits_easily for bound in at_least):
            continue
        needed = _plan(make(size), arguments)
        if needed is None or needed.fits_easily:
            yield size, needed
        else:
            too_large[size] = needed


def _plan(function: CohortRound, arguments: Sequence[Any]) -> Memory | None:
    needed = memory.estimate(function, *arguments)
    if needed is None or needed.limit is None:
        return needed
    return needed._replace(limit=int(hosts.least_of_all(needed.limit)))


def _time(function: CohortRound, arguments: Sequence[Any]) -> float | None:
    """Seconds of a round, of which the first is longer; None if the device has not the memory.

    Raises:
      ValueError: If it has not, and this is one of several hosts: the others wait for it in the
        same round.
    """
    taken: list[float] = []
    try:
        while len(taken) < 3 and sum(taken) < _QUICK:
            began = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            taken.append(hosts.of_first(time.perf_counter() - began))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if jax.process_count() > 1:
            raise ValueError(
                f"host {jax.process_index()} has not the memory for a round that should fit it "
                "easily, and the other hosts wait for it in vain: give all a smaller number as "
                f"config.clients_per_chunk. {error}"
            ) from error
        return None
    return min(taken)


def of_run(
    config: ml_collections.ConfigDict,
    make: Make,
    arguments: Sequence[Any],
    trial: Sequence[Any],
    cohort_size: int,
    workdir: Path,
    announce: Callable[[str], Any] | None = None,
) -> CohortRound:
    """The round with as many clients at once as `config.clients_per_chunk` says.

    With `auto` it is the number that the run in `workdir` began with. Else it is the one found for
    another method or seed of the same model and local work, which is remembered in the directory of
    JAX's compilation cache and in this process. Else it is searched for.

    Args:
      config: As in `configs/`.
      make: Builds the round for a number of clients at once; the same function for the same number.
      arguments: Of the first round.
      trial: Of a round to be timed, with at most `MOST` clients.
      cohort_size: K, or the clients on each device.
      workdir: The run's directory, in which the number is kept.
      announce: Called once, with a line that says the number and the memory.

    Raises:
      ValueError: If a round cannot fit the memory there is.
      Damaged: If the number is not what was written, or is gone from a run of which rounds are
        finished.
    """
    wanted, record = parse(config.clients_per_chunk), workdir / RECORD
    begun = None
    if wanted == "auto":
        records.check_not_gone(record)
        begun = _read(record)
    if begun is None:
        choice = choose(config, make, arguments, trial, cohort_size)
    else:
        choice = _given(make, arguments, begun)
        _refuse_unless_it_fits(config, make, arguments, choice, workdir)
    if wanted == "auto" and begun is None:
        with hosts.all_or_none():
            _write(record, choice)
    if announce is not None:
        announce(f"{config.method}: {choice}")
    return make(choice.size)


def choose(
    config: ml_collections.ConfigDict,
    make: Callable[[int], Any],
    arguments: Sequence[Any],
    trial: Sequence[Any],
    cohort_size: int,
) -> Choice:
    """As many clients at once as `config.clients_per_chunk` says, for rounds that keep no record.

    Args:
      config: As in `configs/`.
      make: Builds a jitted round for a number of clients at once; the same function for the same
        number.
      arguments: Of the first round, a `Server` and `ClientData` among them.
      trial: Of a round to be timed, with at most `MOST` clients.
      cohort_size: K, or the clients on each device.

    Raises:
      ValueError: If a round cannot fit the memory there is.
    """
    wanted = parse(config.clients_per_chunk)
    if wanted == "auto":
        choice = _automatic(config, make, arguments, trial, cohort_size)
    else:
        size = cohort_size if wanted == "all" else min(wanted, cohort_size)
        choice = _given(make, arguments, size)
    _refuse_unless_it_fits(config, make, arguments, choice)
    return choice


def _refuse_unless_it_fits(
    config: ml_collections.ConfigDict,
    make: Make,
    arguments: Sequence[Any],
    choice: Choice,
    begun: Path | None = None,
) -> None:
    if choice.memory is not None and not choice.memory.fits:
        raise ValueError(_refusal(config, make, arguments, choice, begun))


def _given(make: Make, arguments: Sequence[Any], size: int) -> Choice:
    return Choice(size, _plan(make(size), arguments), {})


def _automatic(
    config: ml_collections.ConfigDict,
    make: Make,
    arguments: Sequence[Any],
    trial: Sequence[Any],
    cohort_size: int,
) -> Choice:
    candidates, path = sizes(cohort_size), None
    key = _key(config, arguments, cohort_size)
    directory = jax.config.values["jax_compilation_cache_dir"]
    if directory and "://" not in directory:
        path = Path(directory) / "clients_per_chunk" / f"{key}.json"
    known = _read_cache(path) if path else _number(_found.get(key))
    if known in candidates:
        # Found with another method, maybe: if this one needs more memory, fewer.
        fewer = [size for size in candidates if size <= known]
        return search(make, arguments, fewer)
    if len(candidates) == 1 or config.rounds < _ROUNDS:
        return search(make, arguments, candidates)
    choice = search(make, arguments, candidates, trial)
    _found[key] = choice.size
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, choice)
        except OSError:  # It is searched for again.
            pass
    return choice


def _key(config: ml_collections.ConfigDict, arguments: Sequence[Any], cohort_size: int) -> str:
    """What the speed depends on: model and local work, but neither the method nor the seed."""
    local = {k: v for k, v in config.local.to_dict().items() if k != "learning_rate"}
    server, data = (_of_kind(kind, arguments) for kind in (Server, ClientData))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), data.examples)
    shapes = jax.tree.map(
        lambda x: f"{x.dtype}{x.shape}",
        (server.backbone, one),
    )
    devices = jax.devices()
    depends_on = [
        *(config.model.to_dict(), config.lora.to_dict(), config.precision.to_dict()),
        *(local, cohort_size, shapes, jax.__version__),
        *(devices[0].device_kind, len(devices), os.cpu_count()),
    ]
    text = json.dumps(depends_on, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _of_kind(kind: type, arguments: Sequence[Any]) -> Any:
    """The first value of this type in a tree."""
    values = jax.tree.leaves(arguments, is_leaf=lambda x: isinstance(x, kind))
    return next(x for x in values if isinstance(x, kind))


def _write(path: Path, choice: Choice) -> None:
    record = {"clients_per_chunk": choice.size, "seconds": choice.seconds}
    if jax.process_index() == 0:
        records.write_sealed(path, record)


def _read(path: Path) -> int | None:
    """The number in a record, as the first process finds it; None if there is none.

    Raises:
      Damaged: If the record is not what was written.
    """
    found = records.read_sealed(path).get("clients_per_chunk") if path.exists() else None
    return _number(found)


def _read_cache(path: Path) -> int | None:
    """The same of a record that can be made again."""
    try:
        return _read(path)
    except (ValueError, OSError):
        return _number(None)


def _number(found: int | None) -> int | None:
    return int(hosts.of_first(found or 0)) or None


def _refusal(
    config: ml_collections.ConfigDict,
    make: Make,
    arguments: Sequence[Any],
    choice: Choice,
    begun: Path | None,
) -> str:
    """Says what a round needs, what there is, and what would fit; `begun` is a run's directory."""
    needed = choice.memory
    assert needed is not None and needed.limit is not None
    clients = "one client" if choice.size == 1 else f"{choice.size} clients"
    text = (
        f"{config.method}: a round does not fit the memory. It needs {readable(needed.held)} for "
        f"state and data and {readable(needed.working)} to train {clients} at once, and "
        f"{readable(needed.limit)} are free"
    )
    if begun:
        return (
            f"{text}. The run in {begun} was begun with so many, and goes on with no other number"
        )
    one = _plan(make(1), arguments) if choice.size > 1 else needed
    if choice.size > 1 and (one is None or one.fits):
        return f"{text}. config.clients_per_chunk=1 would fit; auto finds the fastest that does"
    assert one is not None and one.limit is not None
    lighter = []
    batch_size = config.local.batch_size * (one.limit - one.held) // max(one.working, 1)
    if 0 < batch_size < config.local.batch_size:
        lighter.append(f"config.local.batch_size={batch_size}, with config.clients_per_chunk=1")
    if config.model.options.get("remat") is False:
        lighter.append("config.model.options.remat=True")
    if "length" in config.data:
        lighter.append(f"a config.data.length below {config.data.length}")
    for part in ("compute", "storage"):
        if config.precision[part] == "float32":
            lighter.append(f"config.precision.{part}=bfloat16")
    lighter.append("a smaller backbone")
    return f"{text}. What would help: {'; '.join(lighter)}"
