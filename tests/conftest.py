"""Settings for all tests."""

import importlib.metadata
import os

# Before JAX is imported: no accelerator is asked for, unless the caller asks for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and run little.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA before jaxlib 0.12 emits fusions by way of MLIR: without it programs compile in half the time,
# to a seventh of the size. Later there is no such option.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * (importlib.metadata.version("jaxlib") < "0.12"),
)
# Devices for the tests of a mesh.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
# No test writes into the user's cache directory.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# Before NumPy is imported: LAPACK's threads spin while they wait for each other, and there are as
# many workers as cores already.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest
from absl import flags

# chex defines flags when it is imported and reads them when it asserts.
flags.FLAGS.mark_as_parsed()

# Files that take long go first, so that no worker is left alone with one at the end.
LONG = [
    "test_programs",
    "test_notebooks",
    "test_round",
    "test_precision",
    "test_methods",
    "test_properties",
    "test_transforms",
    "test_tune",
    "test_sketch",
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """A worker that holds many compiled programs after a file, some 2 MB each, drops them."""
    yield
    if len(jax.local_devices()[0].client.live_executables()) > 200:
        jax.clear_caches()


@pytest.fixture(scope="session")
def world():
    """A federation small enough to be checked by hand."""
    from tests.world import make_world

    return make_world()
