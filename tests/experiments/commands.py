"""Command-line programs as a user starts them, but without the seconds that imports take.

Each is a process of its own, forked from one that has imported the libraries.
"""

import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
# What the programs import, without any that defines flags.
_LIBRARIES = ["experiments.shared.apps", "experiments.shared.judging", "experiments.shared.report"]
_STREAMS = {"out": 1, "err": 2}
_CONTEXT = multiprocessing.get_context("forkserver")


def prepare(environment: Mapping[str, str]) -> None:
    """Imports the libraries, once a process of tests, for programs in this environment."""
    _CONTEXT.set_forkserver_preload(_LIBRARIES)
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()


class Command:
    """`python -m experiments.NAME ARGUMENTS`, started."""

    def __init__(self, name: str, arguments: tuple[str, ...]):
        self._printed = Path(tempfile.mkdtemp())
        self.process = _CONTEXT.Process(target=_run, args=(name, arguments, self._printed))
        self.process.start()

    def wait(self, seconds: float = 300) -> tuple[int, str, str]:
        """Exit status, standard output and standard error, when it has ended."""
        self.process.join(seconds)
        out, err = (self._printed / stream for stream in _STREAMS)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"no end in {seconds} s: {out.read_text()}{err.read_text()}")
        ended = self.process.exitcode, out.read_text(), err.read_text()
        shutil.rmtree(self._printed)
        return ended


def _run(name, arguments, printed):
    for stream, descriptor in _STREAMS.items():
        with open(printed / stream, "w") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(ROOT)
    # As at a terminal: tests that run in the background inherit that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [name, *arguments]
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
