"""Programs of every bad kind, run with limits; both with the kernel's help and without."""

import os
import threading
import time
from pathlib import Path

import pytest

from fedlora_jax.scoring import execution
from fedlora_jax.scoring.execution import Limits

# Enough to start an interpreter on a busy machine.
LIMITS = Limits(seconds=20, cpu_seconds=1, memory=256 << 20, file_size=10_000, open_files=20)

PASS = {
    "nothing": "",
    "asserts": "def f(x):\n    return x + 1\nassert f(1) == 2",
    "own files": "open('a', 'w').write('x'); import os; os.mkdir('d'); os.rename('a', 'd/a');"
    "os.remove('d/a'); assert os.listdir('.') == ['d']",
    "an empty place": "import os; assert os.listdir('.') == [] and 'HOME' not in os.environ",
    "threads": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
    "output": "print('x' * 1_000_000)",
    "classes": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\nA(2)",
    "what is not imported": "if __name__ == '__main__':\n    1 / 0",
}
FAIL = {
    "wrong": ("assert 1 == 2, 'no'", "AssertionError: no"),
    "not a program": ("def", "SyntaxError"),
    "leaves": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "leaves at once": ("import os; os._exit(0)", "left with status 0"),
    "endless": ("while True: pass", "used up its CPU time"),
    "crashes": ("import signal; signal.raise_signal(11)", "killed by SIGSEGV"),
    "hungry": ("x = bytearray(1 << 30)", "MemoryError"),
    "hungry by and by": ("x = []\nwhile True: x.append(bytearray(1 << 24))", "MemoryError"),
    "reads input": ("input()", "EOFError"),
    "writes much": ("open('a', 'w').write('x' * 20_000)", "File too large"),
    "opens many": ("f = [open('/dev/null') for _ in range(30)]", "Too many open files"),
    "forks": ("import os\nwhile True: os.fork()", "PermissionError"),
    "starts": ("import subprocess; subprocess.run(['true'])", "PermissionError"),
    "connects": ("import socket; socket.create_connection(('127.0.0.1', PORT))", "PermissionError"),
    "kills": (f"import os; os.kill({os.getpid()}, 9)", "PermissionError"),
    "writes elsewhere": ("open('OUTSIDE/new', 'w')", "PermissionError"),
    "overwrites": ("open('OUTSIDE/kept', 'r+')", "PermissionError"),
    "removes": ("import os; os.remove('OUTSIDE/kept')", "PermissionError"),
    "removes a tree": ("import shutil; shutil.rmtree('OUTSIDE')", "PermissionError"),
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    directory = tmp_path_factory.mktemp("outside")
    (directory / "kept").write_text("kept")
    yield directory
    assert (directory / "kept").read_text() == "kept"
    assert [path.name for path in directory.iterdir()] == ["kept"]


@pytest.fixture(scope="module")
def port():
    """A port at which somebody listens, so that a connection would succeed."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(scope="module")
def kernel_helps():
    return bool(execution.run("").kernel)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", PASS)
def test_what_is_allowed(name, kernel, kernel_helps):
    outcome = execution.run(PASS[name], LIMITS, kernel=kernel)
    assert outcome == (True, "", kernel and kernel_helps)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", FAIL)
def test_what_is_not(name, kernel, outside, port):
    program, reason = FAIL[name]
    program = program.replace("OUTSIDE", str(outside)).replace("PORT", str(port))
    outcome = execution.run(program, LIMITS, kernel=kernel)
    assert not outcome.passed and reason in outcome.reason


def test_what_python_cannot_refuse_the_kernel_does(kernel_helps, outside):
    if not kernel_helps:
        pytest.skip("this kernel does not refuse system calls for us")
    program = f"""
import ctypes
c = ctypes.CDLL(None, use_errno=True)
assert c.socket(2, 1, 0) < 0 and c.fork() < 0 and c.kill({os.getpid()}, 9) < 0
assert c.unlink({str(outside / "kept").encode()!r}) < 0
"""
    assert execution.run(program, LIMITS).passed


def test_the_wall_clock_ends_what_only_waits():
    began = time.perf_counter()
    outcome = execution.run("import time; time.sleep(60)", LIMITS._replace(seconds=0.3))
    assert outcome == (False, "ran longer than 0.3 seconds", None)
    assert time.perf_counter() - began < 10


def test_limits_that_cannot_be_set_are_no_fault_of_the_program():
    with pytest.raises(RuntimeError, match="cannot be run with limits here"):
        execution.run("", LIMITS._replace(memory=1 << 70))


def test_nothing_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    threads = threading.active_count()
    assert execution.run("open('a', 'w').write('x'); import os; os.chmod('.', 0)", LIMITS).passed
    assert list(tmp_path.iterdir()) == []
    if before:
        assert set(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == threads
