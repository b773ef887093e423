"""Programs in a directory of their own, as for the tests of programs."""

import pytest

from tests.experiments.conftest import Program


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Program:
    return Program(tmp_path_factory.mktemp("faults"))
