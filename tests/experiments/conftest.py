"""The command-line programs on the demo's data, with a backbone and rounds that take seconds."""

from pathlib import Path

import pytest

from tests.experiments import commands

CONFIG = """
from pathlib import Path

from tests.tiny import tiny_digits

def get_config(arg=None):
    config = tiny_digits(Path({directory!r}), arg)
    config.rounds = 4
    config.clients_per_round = 18
    config.lora.rank = 2
    return config
"""


class Program:
    """Runs `python -m experiments.NAME` as a user would."""

    def __init__(self, directory: Path):
        self.config = directory / "tiny.py"
        self.config.write_text(CONFIG.format(directory=str(directory)))
        self.compiled = directory / "compiled"
        commands.prepare(
            {
                "FEDLORA_DATA_DIR": str(directory / "data"),
                "JAX_ENABLE_COMPILATION_CACHE": "true",
                "JAX_COMPILATION_CACHE_DIR": str(self.compiled),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            }
        )

    def start(self, name: str, *arguments: str) -> commands.Command:
        """Starts it."""
        return commands.Command(name, arguments)

    def run(self, name: str, *arguments: str) -> tuple[int, str, str]:
        """Runs it to its end: exit status, standard output and standard error."""
        return self.start(name, *arguments).wait()


@pytest.fixture(scope="session")
def program(digits_directory) -> Program:
    return Program(digits_directory)
