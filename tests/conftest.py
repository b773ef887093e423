"""Settings for all tests."""

import os

# Before JAX is imported: no accelerator is asked for, unless the caller asks for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and run little.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import pytest
from absl import flags

# chex defines flags when it is imported and reads them when it asserts.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def world():
    """A federation small enough to be checked by hand."""
    from tests.world import make_world

    return make_world()
