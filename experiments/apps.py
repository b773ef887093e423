"""What the command-line programs share."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from tqdm import tqdm


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
        except (ValueError, FileNotFoundError, FloatingPointError) as error:
            logging.info("Where it comes from:", exc_info=True)
            sys.exit(f"error: {error}")

    app.run(quietly)


def progress_bar(total: int, description: str = "") -> tqdm:
    """A bar of rounds with the time left, on a terminal; nothing in a log file."""
    return tqdm(
        total=total,
        desc=description,
        unit="round",
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    )


def command() -> str:
    """The command that was given, for the record."""
    return shlex.join(["python", "-m", f"experiments.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
