"""What the command-line programs share."""

import shlex
import sys
from pathlib import Path

from tqdm import tqdm


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
