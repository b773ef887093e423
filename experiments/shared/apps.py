"""What the command-line programs share."""

import difflib
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from absl import app, flags, logging
from tqdm import tqdm

from fedlora_jax import methods
from fedlora_jax.experiment.memory import Memory


def run(main: Callable[[], None]) -> None:
    """Runs an absl app: no positional arguments, and libraries say only what is wrong.

    What the user has to mend ends the program with its message alone; `--verbosity=0` adds
    where it comes from.
    """

    def quietly(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {argv[1:]}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            main()
        except (ValueError, OSError, FloatingPointError, ImportError) as error:
            logging.info("Where it comes from:", exc_info=True)
            sys.exit(f"error: {error}")

    app.run(quietly)


def progress_bar(total: int, description: str = "", unit: str = "round") -> tqdm:
    """A bar of rounds, or of other units, with the time left; nothing in a log file."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    )


def announce_memory(name: str) -> Callable[[Memory], None]:
    """Builds what says how much memory a method's rounds need, and what to do if it is too much."""

    def announce(needed: Memory) -> None:
        tqdm.write(f"{name}: a round needs {needed}")
        if not needed.fits:
            tqdm.write(
                "That is more than the device has: train fewer clients at once, for example "
                "--config.clients_per_chunk=4"
            )

    return announce


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


def read_learning_rates(path: Path, names: Sequence[str]) -> dict[str, float]:
    """The learning rates of these methods from a file that `experiments.tune` wrote.

    Raises:
      ValueError: If the file is of another kind, or lacks a method; it names all that are missing.
      FileNotFoundError: If there is none.
    """
    try:
        rates = json.loads(path.read_text())["learning_rates"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of experiments.tune") from error
    missing = [name for name in names if name not in rates]
    if missing:
        raise ValueError(
            f"{path} has no learning rate of {', '.join(_with_nearest(missing, rates))}. "
            f"It has those of {', '.join(sorted(rates))}"
        )
    return {name: rates[name] for name in names}


def _with_nearest(names: Sequence[str], known: Iterable[str]) -> list[str]:
    nearest = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.7) for name in names}
    return [
        f"{name} (the nearest there is {near[0]})" if near else name
        for name, near in nearest.items()
    ]
