"""What the command-line programs share."""

import contextlib
import difflib
import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from fedlora_jax import bounds, locks, methods
from fedlora_jax.checksums import Damaged
from fedlora_jax.experiment import hosts
from fedlora_jax.names import lookup

# Exit statuses after signals, as shells have them.
_INTERRUPTED = 130
_TERMINATED = 143
_STATUS: dict[int, int] = {signal.SIGINT: _INTERRUPTED, signal.SIGTERM: _TERMINATED}
# What sends a signal to a program and to its group, as `timeout` does, sends it twice in less.
_APART = 0.5
# Before a directory that another process uses is tried again, in seconds.
_PAUSE = 1.0

Job = TypeVar("Job")
Done = TypeVar("Done")

_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Directory in which compiled programs are kept for the next start; `off` for none. By default "
    "that of JAX_COMPILATION_CACHE_DIR, else one in the user's cache directory.",
)


_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "address:port of the first of several hosts that run this command, or `auto` on a cluster that "
    "JAX knows; config.mesh then says how all their devices share the work.",
)
_NUM_HOSTS = flags.DEFINE_integer("num_hosts", 1, "How many hosts run this command.", lower_bound=1)
_HOST = flags.DEFINE_integer("host", 0, "Which of them this is, from 0.", lower_bound=0)


def run(main: Callable[[], None], *, several_hosts: bool = False) -> None:
    """Runs an absl app: no positional arguments, and libraries say only what is wrong.

    Compiled programs are kept, see `keep_compiled`.

    What the user has to mend ends the program with its message alone; `--verbosity=0` adds
    where it comes from. So does an interrupt by the keyboard, with exit status 130.

    Args:
      main: The program.
      several_hosts: Whether several hosts may run it together.
    """

    def quietly(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {argv[1:]}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
            # It logs at length what it then raises.
            logging.get_absl_handler().addFilter(lambda record: "orbax" not in record.pathname)
        keep_compiled(_COMPILATION_CACHE.value)
        try:
            if "config" in flags.FLAGS:
                check_made_for(Path(sys.argv[0]).stem, flags.FLAGS["config"].value)
            _join(several_hosts)
            main()
        except (ValueError, OSError, FloatingPointError, ImportError) as error:
            logging.info("Where it comes from:", exc_info=True)
            _end(f"error: {_reason(error)}")
        except jax.errors.JaxRuntimeError as error:
            if not hosts.are_several():
                raise
            _end(f"error: another host has ended, or cannot be reached: {error}")
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from what is finished", file=sys.stderr)
            _end(_INTERRUPTED)

    app.run(quietly, flags_parser=_parse)


def check_made_for(program: str, config: ConfigDict | None) -> None:
    """Checks that a configuration is of the kind that a program reads.

    Args:
      program: Its name in `experiments`.
      config: Of the flag `--config`; None if there is none.

    Raises:
      ValueError: If it is of the other kind.
    """
    if config is None or ("dials" in config) == (program == "linear"):
        return
    if program == "linear":
        raise ValueError(
            "the configuration of --config is one of experiments.train and its like: "
            "experiments.linear wants one like configs/linear.py"
        )
    raise ValueError(
        f"the configuration of --config is one of experiments.linear, not of experiments.{program}"
    )


def _join(several_hosts: bool) -> None:
    """Waits for the other hosts, if flags say that there are any.

    Raises:
      ValueError: If there may be none, or nothing says where they meet.
    """
    if _COORDINATOR.value is None and _NUM_HOSTS.value == 1 and _HOST.value == 0:
        return
    if not several_hosts:
        raise ValueError(
            "this program runs on one host: leave out --coordinator, --num_hosts and --host"
        )
    if _COORDINATOR.value is None:
        raise ValueError(
            f"--num_hosts={_NUM_HOSTS.value} and --host={_HOST.value} are of several hosts: "
            "--coordinator must say where they meet, address:port of the first or auto"
        )
    hosts.join(_COORDINATOR.value, _NUM_HOSTS.value, _HOST.value)


def _end(status: str | int) -> NoReturn:
    """As `sys.exit`; but one of several hosts does not wait for the others, who wait for it."""
    if hosts.are_several():
        if isinstance(status, str):
            print(status, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
    sys.exit(status)


def _parse(argv: list[str]) -> list[str]:
    """The arguments that are no flags; what is wrong with a flag ends the program in one line."""
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError, flags.Error) as error:
        sys.exit(f"error: {_unknown_field(argv) or _reason(error)}")


def _unknown_field(argv: Sequence[str]) -> str | None:
    """What is wrong with the name of a field, `--config.local.learning_rat`, if anything is."""
    given = [re.fullmatch(r"--?(?:no)?(config)\.([\w.]+)(=.*)?", text, re.DOTALL) for text in argv]
    source = re.search(r"(?:^|\0)--?config[=\0]([^\0]+)", "\0".join(argv))
    if source is None or "config" not in flags.FLAGS:
        return None
    try:
        config = flags.FLAGS["config"].parser.parse(source[1])
        for match in filter(None, given if isinstance(config, ConfigDict) else []):
            node, path = config, "config"
            for name in match[2].split("."):
                if not isinstance(node, ConfigDict):
                    return f"{path} is no group of fields, which {name!r} could be one of"
                lookup(dict.fromkeys(node), name, f"field of {path}:")
                node, path = node.get(name), f"{path}.{name}"
    except (TypeError, ValueError, OSError) as error:
        return _reason(error)
    return None


def _reason(error: BaseException) -> str:
    """The message of an error, without what libraries put around it."""
    around = ("flag --config=", "Error whilst parsing config", "Configuration is not available")
    while str(error).startswith(around) and (inner := error.__cause__ or error.__context__):
        error = inner
    if isinstance(error, OSError) and error.filename and error.strerror:
        wanted = ": a directory is wanted" * isinstance(error, FileExistsError)
        return f"{error.filename}: {error.strerror}{wanted}"
    return str(error)


@contextlib.contextmanager
def whole_rounds(bar: tqdm) -> Iterator[Callable[[], None]]:
    """Counts rounds; after a SIGTERM the round that runs is finished and saved, then all ends.

    A second SIGTERM, or interrupt by the keyboard, ends the program at once. Several hosts end
    after the same round.

    Args:
      bar: Of `progress_bar`.

    Yields:
      What is to be called after each round; it may raise SystemExit, with status 143.
    """
    asked: list[int] = []

    def on_signal(number: int, _: object) -> None:
        asked.append(number)

    def advance() -> None:
        bar.update()
        if hosts.any_of_all(bool(asked)):
            print(
                "terminated after a whole round; the same command goes on from there",
                file=sys.stderr,
            )
            sys.exit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        with _a_second_signal_ends():
            yield advance
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _a_second_signal_ends() -> Iterator[None]:
    """Ends the program at once when a signal comes again after a moment.

    Python calls handlers when a compiled round is done; what waits for a byte hears of it before.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        first: dict[int, float] = {}
        while content := os.read(reading, 1):
            number, now = content[0], time.monotonic()
            if now - first.setdefault(number, now) > _APART and number in _STATUS:
                os._exit(_STATUS[number])
        os.close(reading)

    before = signal.set_wakeup_fd(writing)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


@contextlib.contextmanager
def traced(
    rounds: int, directory: Path, advance: Callable[[], None]
) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Has `jax.profiler` trace rounds, after the first one, which compiles.

    Args:
      rounds: How many; 0 for none.
      directory: For what xprof and TensorBoard show.
      advance: Called after each round.

    Yields:
      What is to be called before the first round that is not found finished, and what after each.
    """
    after: Iterator[int] = iter(())
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            nonlocal after
            after = itertools.count(1)

        def trace_and_advance() -> None:
            finished = next(after, 0)
            if finished == 1 and rounds:
                stack.enter_context(jax.profiler.trace(str(directory)))
            elif finished == 1 + rounds:
                stack.close()
            advance()

        yield begin, trace_and_advance


def shared_work(jobs: Iterable[Job], do: Callable[[Job], Done]) -> dict[Job, Done]:
    """Does all jobs; one that another process is at is taken up again when the rest is done.

    Args:
      jobs: In the order in which they are to be done.
      do: Does one; raises `locks.Held` while another process does it.

    Returns:
      What came of each, in the order of the jobs.
    """
    jobs = list(jobs)
    left, found = jobs, {}
    while left:
        held = []
        for job in left:
            try:
                found[job] = do(job)
            except locks.Held as error:
                held.append(job)
                if left is jobs:
                    logging.warning("%s; it is left to that process for now", error)
        if len(held) == len(left):
            time.sleep(_PAUSE)
        left = held
    return {job: found[job] for job in jobs}


def is_of_one_run(error: ValueError | OSError, *, first: bool) -> bool:
    """Whether other runs can go on after an error of one.

    Args:
      error: What the run raised.
      first: Whether it was the first of all. What that refuses may be wrong with all, and is said
        before anything trains; damage, and what the disk refuses, is its own.
    """
    # Other hosts would wait in vain for one that goes on with another run.
    if isinstance(error, locks.Held) or hosts.are_several():
        return False
    return not first or isinstance(error, Damaged | OSError)


def keep_compiled(wanted: str | None) -> None:
    """Has JAX keep compiled programs on disk; to be called before anything is compiled.

    Args:
      wanted: A directory; `off` for none; None for what JAX's own settings say, or else
        `fedlora_jax/compiled` in the user's cache directory.
    """
    now = jax.config.values
    if wanted is None and (
        now["jax_compilation_cache_dir"] or not now["jax_enable_compilation_cache"]
    ):
        return
    jax.config.update("jax_compilation_cache_dir", None)
    if wanted == "off":
        return
    directory = Path(wanted) if wanted else _cache_home() / "fedlora_jax" / "compiled" / _machine()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(f"{directory} is not writable")
    except OSError as error:
        logging.warning("Compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
    # Small programs too: a start compiles dozens of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _machine() -> str:
    """A name that differs between processors, whose programs may not run on each other."""
    described = platform.machine() + platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            described += next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:  # No Linux.
        pass
    return f"{platform.machine()}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"


def progress_bar(total: int, description: str = "", unit: str = "round") -> tqdm:
    """A bar of rounds, or of other units, with the time left; nothing in a log file."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=not (sys.stderr.isatty() and hosts.is_first()),
        dynamic_ncols=True,
    )


def command() -> str:
    """The command that was given, for the record."""
    return shlex.join(["python", "-m", f"experiments.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def method_names(wanted: Iterable[str]) -> list[str]:
    """The methods that a flag names, each once; `all` stands for every one there is.

    Raises:
      ValueError: If there is none, or on an unknown one, with the nearest name.
    """
    names = []
    for name in wanted:
        names += sorted(methods.REGISTRY) if name == "all" else [name]
    if not names:
        raise ValueError("--methods names none")
    for name in names:
        methods.get(name)
    return list(dict.fromkeys(names))


def check_asked(config: ConfigDict, names: Sequence[str], num_seeds: int) -> None:
    """Checks that what `--config` asks for is among what `--methods` and `--seeds` have run.

    Args:
      config: Of the flag `--config`.
      names: The methods that are run.
      num_seeds: Seeds 0, 1, ... are run.

    Raises:
      ValueError: If a method that is named there, or the seed, is none of them.
    """
    flag = flags.FLAGS["config"]
    in_argument = re.search(r"[:,]method=", config_flags.get_config_filename(flag))
    named = in_argument or "method" in config_flags.get_override_values(flag)
    if named and config.method not in names:
        raise ValueError(
            f"config.method is {config.method!r}, but --methods names {', '.join(names)}: "
            "--methods says what this program runs; name it there, or leave it out of --config"
        )
    check_seed(config, num_seeds)


def check_seed(config: ConfigDict, num_seeds: int) -> None:
    """Raises ValueError if `--config` asks for a seed that is none of `--seeds`: 0, 1, ..."""
    flag = flags.FLAGS["config"]
    if "seed" in config_flags.get_override_values(flag) and config.seed >= num_seeds:
        seeds = "seed 0" if num_seeds == 1 else f"seeds 0 to {num_seeds - 1}"
        raise ValueError(
            f"config.seed is {config.seed}, but --seeds={num_seeds} runs the {seeds}: --seeds says "
            "how many this program runs; leave config.seed out"
        )


def has_step(config: ConfigDict) -> bool:
    """Whether the configuration's method has a server's step, of the kind that it asks for."""
    if config.server.optimizer != "none":
        return True
    method = methods.get(config.method)(**config.options[config.method])
    return "server_step" not in method.refuses


def set_step(config: ConfigDict, step: float | None) -> None:
    """Sets the server's step size: of its optimiser, or in the space of products; None for none."""
    if config.server.optimizer != "none":
        config.server.learning_rate = step
    else:
        config.server.step = 1.0 if step is None else step
        if step is None:
            config.server.step_momentum = 0.0


def read_server_steps(path: Path) -> dict[str, float | None]:
    """The server's step size of each method in a file of `experiments.tune`; empty without any.

    Raises:
      ValueError: If one is no positive number, nor None.
    """
    steps = json.loads(path.read_text()).get("server_steps", {})
    for name, step in steps.items():
        _check_positive(step, f"{path}: the server step of {name}", optional=True)
    return steps


def _check_positive(value: Any, what: str, optional: bool = False) -> None:
    if fault := bounds.Bound(above=True, optional=optional).fault(value):
        raise ValueError(f"{what} {fault}")


def read_learning_rates(path: Path, names: Sequence[str]) -> dict[str, float]:
    """The learning rates of these methods from a file that `experiments.tune` wrote.

    Raises:
      ValueError: If the file is of another kind, or lacks a method; it names all that are missing;
        or if a rate is no positive number.
      FileNotFoundError: If there is none.
    """
    try:
        rates = dict(json.loads(path.read_text())["learning_rates"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of experiments.tune") from error
    missing = [name for name in names if name not in rates]
    if missing:
        raise ValueError(
            f"{path} has no learning rate of {', '.join(_with_nearest(missing, rates))}. "
            f"It has those of {', '.join(sorted(rates))}"
        )
    for name in names:
        _check_positive(rates[name], f"{path}: the learning rate of {name}")
    return {name: rates[name] for name in names}


def _with_nearest(names: Sequence[str], known: Iterable[str]) -> list[str]:
    nearest = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.7) for name in names}
    return [
        f"{name} (the nearest there is {near[0]})" if near else name
        for name, near in nearest.items()
    ]
