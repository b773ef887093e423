"""Checks against the torch originals; they need the extra `parity`."""

import importlib.util

import pytest

_NEEDED = ("torch", "transformers", "peft")
_MISSING = [name for name in _NEEDED if importlib.util.find_spec(name) is None]


def pytest_ignore_collect(collection_path, config):
    return True if _MISSING and collection_path.name.startswith("test_") else None


def pytest_terminal_summary(terminalreporter):
    if _MISSING:
        terminalreporter.write_line(
            f"tests/parity left out, {', '.join(_MISSING)} not installed: "
            "pip install -e '.[parity]'"
        )


@pytest.fixture(autouse=True)
def few_threads():
    import torch

    torch.set_num_threads(2)
