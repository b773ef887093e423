"""Settings for all tests."""

import functools
import gc
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

# Before JAX is imported: no accelerator is asked for, unless the caller asks for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and run little.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA before jaxlib 0.11 emits fusions by way of MLIR: without it programs compile in half the time,
# to a seventh of the size. Later there is no such option. What a loop computes anew in each turn
# the compiler takes out of it one by one, for a tenth of its time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_parallel_codegen_split_count=1"
    " --xla_disable_hlo_passes=while-loop-invariant-code-motion"
    + " --xla_cpu_use_fusion_emitters=false"
    * (importlib.metadata.version("jaxlib") < "0.11"),
)
# Devices for the tests of a mesh.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
# No line of ours is noted beside each operation, which takes a while and nobody reads.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# What one command or notebook has compiled the next one reads. The directory is new for each run
# of the tests. With a bound on its size JAX locks it, and looks at all that is there whenever it
# adds something: short compilations are not kept.
os.environ["JAX_COMPILATION_CACHE_DIR"] = (
    os.environ["JAX_COMPILATION_CACHE_DIR"]
    if "PYTEST_XDIST_WORKER" in os.environ
    else tempfile.mkdtemp(prefix="fedlora_jax_tests_")
)
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(1 << 32)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
# Before NumPy is imported: LAPACK's threads spin while they wait for each other, and there are as
# many workers as cores already.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest
from absl import flags

# The tests themselves make few programs twice, and would look for each of thousands.
jax.config.update("jax_enable_compilation_cache", False)
# chex defines flags when it is imported and reads them when it asserts.
flags.FLAGS.mark_as_parsed()

# Files of one worker, which share the programs of the small world, those of the stacks of adapters,
# and a process that has imported what the commands import.
TOGETHER = {
    **dict.fromkeys(
        ["test_precision", "test_methods", "test_round", "test_transforms", "test_server_step"],
        "world",
    ),
    **dict.fromkeys(["test_properties", "test_scales", "test_checks", "test_identities"], "stacks"),
    **dict.fromkeys(
        ["test_programs", "test_tune", "test_evaluate", "test_linear"]
        + ["test_aggregate", "test_partition", "test_prepare_data"],
        "commands",
    ),
}
# What takes long goes first, the longest before all, so that no worker is left alone with one.
LONG = [
    "world",
    "stacks",
    "test_mesh",
    "commands",
    "test_notebooks",
    "test_hosts",
    "test_processes",
    "test_kills",
    "test_papers",
    "test_language_model",
    "test_sketch",
    "test_loop",
    "test_resuming",
    "test_gguf",
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file is run by one worker, and so are those that share what they compile."""
    # Its groups by marks, `--dist=loadgroup`, do not come about with pytest 9.2.
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(Path(nodeid.split("::")[0]).stem)

    return Together(config, log)


def group_of(file):
    return TOGETHER.get(file, file)


def pytest_collection_modifyitems(items):
    """In the world method by method, whose programs are made once and then dropped."""
    place = {name: index for index, name in enumerate(LONG)}

    def key(item):
        group = group_of(item.path.stem)
        by_method = group in ("world", "test_mesh") and hasattr(item, "callspec")
        parameters = item.callspec.params if by_method else {}
        return place.get(group, len(LONG)), str(parameters.get("name", ""))

    items.sort(key=key)


def pytest_collection_finish():
    """What the libraries are made of is never garbage, and takes long to be looked through."""
    gc.collect()
    gc.freeze()
    _BASELINE_BYTES.append(_resident_bytes())
    # Traces are many small objects that live long.
    gc.set_threshold(20_000, 50, 50)


def pytest_unconfigure():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def bounded_memory():
    """A worker that holds many compiled programs, some 2 MB each, or many traces, drops them."""
    yield
    many = len(jax.local_devices()[0].client.live_executables()) > 800
    if many or _resident_bytes() > _BASELINE_BYTES[-1] + 1e9:
        jax.clear_caches()
        _BASELINE_BYTES.append(_resident_bytes())


# Of the process when it began, and whenever it had dropped what it held.
_BASELINE_BYTES = [float("inf")]


def _resident_bytes():
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # No Linux.
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="session")
def digits_directory(tmp_path_factory):
    """Where the demo's data and the tiny backbone are made, once for all workers.

    Tests only read them.
    """
    own = tmp_path_factory.getbasetemp()
    directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "digits"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="module")
def digits(digits_directory):
    """The configuration of the demo's data with a model whose rounds take a moment.

    The data are read once by a worker: thousands of small records take a second each time.
    """
    from fedlora_jax.data import sources
    from tests.tiny import tiny_digits

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_DATA_DIR", str(digits_directory / "data"))
        patch.setattr(sources, "load", functools.partial(_remembered, sources.load))
        yield tiny_digits(digits_directory)


_LOADED: dict = {}


def _remembered(load, *args, **options):
    key = (*args, *sorted(options.items()), os.environ["FEDLORA_DATA_DIR"])
    if key not in _LOADED:
        _LOADED[key] = load(*args, **options)
        for array in _LOADED[key].values():
            array.flags.writeable = False
    return dict(_LOADED[key])


@pytest.fixture(scope="session")
def world():
    """A federation small enough to be checked by hand."""
    from tests.world import make_world

    return make_world()
