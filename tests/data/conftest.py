import pytest


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where the embedded data set is prepared, once for all tests."""
    return tmp_path_factory.mktemp("data")
