"""Programs of every bad kind, run with limits; both with the kernel's help and without."""

import os
import platform
import re
import threading
import time
from pathlib import Path

import pytest

from fedlora_jax.scoring import _guard, execution
from fedlora_jax.scoring.execution import Limits

# Enough to start an interpreter on a busy machine.
LIMITS = Limits(seconds=20, cpu_seconds=1, memory=256 << 20, file_size=10_000, open_files=20)

PASS = {
    "nothing": "",
    "asserts": "def f(x):\n    return x + 1\nassert f(1) == 2",
    "own files": "open('a', 'w').write('x'); import os; os.mkdir('d'); os.rename('a', 'd/a');"
    "os.remove('d/a'); assert os.listdir('.') == ['d']",
    "own files by other names": "import os, shutil\nos.mkdir(b'd'); open(b'd/a', 'w').close()\n"
    "here, a = os.open('d', os.O_RDONLY), os.open('d/a', os.O_RDWR)\n"
    "os.chmod('a', 0o600, dir_fd=here); os.utime(a); os.fchmod(a, 0o700); os.truncate(a, 3)\n"
    "os.chmod('.', 0o700); os.rename('a', 'b', src_dir_fd=here, dst_dir_fd=here)\n"
    "os.remove('b', dir_fd=here); shutil.rmtree('d')",
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


# Of files elsewhere the kernel refuses only contents and names; these are Python's to refuse.
CHANGES = """
import os
kept, outside = 'OUTSIDE/kept', os.open('OUTSIDE', os.O_RDONLY)
changes = [
    lambda: os.chmod(kept, 0o600),
    lambda: os.chmod('kept', 0o600, dir_fd=outside),
    lambda: os.fchmod(outside, 0o700),
    lambda: os.chown(kept, -1, -1),
    lambda: os.lchown(kept, -1, -1),
    lambda: os.utime(kept),
    lambda: os.truncate(kept, 1),
    lambda: os.open(kept, os.O_RDONLY | os.O_TRUNC),
]
if hasattr(os, 'setxattr'):
    changes.append(lambda: os.setxattr(kept, 'user.a', b''))
    changes.append(lambda: os.removexattr(kept, 'user.a'))
"""
CHANGES_BY_PYTHON = """
import resource, sqlite3
changes += [
    lambda: os.killpg(os.getpgid(os.getppid()), 0),
    lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CORE),
    lambda: os.remove('kept', dir_fd=outside),
    lambda: os.rename('kept', 'new', src_dir_fd=outside, dst_dir_fd=outside),
    lambda: sqlite3.connect('OUTSIDE/new'),
    lambda: sqlite3.connect('file:OUTSIDE/new', uri=True),
]
sqlite3.connect(':memory:'), sqlite3.connect('own')
"""
ALL_REFUSED = """
for place, change in enumerate(changes):
    try:
        change()
    except PermissionError as error:
        assert str(error).endswith('is refused'), (place, error)
    else:
        raise AssertionError(f'change {place} was let through')
"""


@pytest.mark.parametrize("kernel", [True, False])
def test_changes_that_python_refuses(kernel, kernel_helps, outside):
    before = os.stat(outside / "kept")
    program = CHANGES + ("" if kernel and kernel_helps else CHANGES_BY_PYTHON) + ALL_REFUSED
    outcome = execution.run(program.replace("OUTSIDE", str(outside)), LIMITS, kernel=kernel)
    assert outcome.passed, outcome.reason
    assert os.stat(outside / "kept") == before


def test_what_python_cannot_refuse_the_kernel_does(kernel_helps, outside):
    if not kernel_helps:
        pytest.skip("this kernel does not refuse system calls for us")
    _, calls = _guard._CALLS[platform.machine()]
    program = f"""
import ctypes, fcntl, os, resource, signal
c = ctypes.CDLL(None, use_errno=True)
assert c.socket(2, 1, 0) < 0 and c.fork() < 0 and c.kill({os.getpid()}, 9) < 0
assert c.unlink({str(outside / "kept").encode()!r}) < 0
# Signal 0 asks only whether one could be sent; the code in it is that of sigqueue.
parent, own, sigqueue = os.getppid(), os.getpid(), (ctypes.c_int * 32)(0, 0, -1)
for call, *arguments in (
    ({calls["tkill"]}, parent, 0),
    ({calls["tgkill"]}, parent, parent, 0),
    ({calls["rt_sigqueueinfo"]}, parent, 0, sigqueue),
    ({calls["rt_tgsigqueueinfo"]}, parent, parent, 0, sigqueue),
    ({calls["pidfd_send_signal"]}, os.pidfd_open(parent), 0, None, 0),
    ({calls["execve"]}, b"/", None, None),
    ({calls["execveat"]}, -1, b"/", None, None, 0),
):
    assert c.syscall(call, *arguments) == -1 and ctypes.get_errno() == 1, call
for refused in (
    lambda: resource.prlimit(parent, resource.RLIMIT_CORE),
    lambda: fcntl.fcntl(0, fcntl.F_SETOWN, parent),
    lambda: signal.pidfd_send_signal(os.pidfd_open(parent), 0),
):
    try:
        refused()
    except PermissionError:
        continue
    raise AssertionError("was let through")
assert c.syscall({calls["tgkill"]}, own, own, 0) == 0
assert resource.prlimit(own, resource.RLIMIT_CORE) == resource.getrlimit(resource.RLIMIT_CORE)
"""
    outcome = execution.run(program, LIMITS)
    assert outcome.passed, outcome.reason


@pytest.mark.parametrize(
    "machine, headers",
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_numbers_of_system_calls_are_those_of_the_kernel(machine, headers):
    if not Path(headers).exists():
        pytest.skip("needs the kernel's headers")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)$", Path(headers).read_text(), re.M)
    numbers = {name: int(number) for name, number in found}
    _, calls = _guard._CALLS[machine]
    assert calls == {name: numbers.get(name) for name in calls}
    refused = {*_guard._NEVER} & numbers.keys()
    assert refused <= calls.keys()


def test_the_wall_clock_ends_what_only_waits():
    began = time.perf_counter()
    outcome = execution.run("import time; time.sleep(60)", LIMITS._replace(seconds=0.3))
    assert outcome == (False, "ran longer than 0.3 seconds", None)
    assert time.perf_counter() - began < 10


def test_a_program_cannot_say_by_itself_that_it_passed():
    """It finds no descriptor named, and what it writes to those it guesses is not taken."""
    program = f"""
import json, os, sys
assert len(sys.argv) == 1 and sys.stdin.read() == ""
said = json.dumps({{"error": None, "kernel": True}}).encode()
for descriptor in range(3, {LIMITS.open_files}):
    try:
        os.write(descriptor, said)
    except OSError:
        pass
"""
    assert execution.run(program + "os._exit(0)", LIMITS) == (False, "left with status 0", None)
    assert execution.run(program, LIMITS).passed
    assert execution.run(program + "1 / 0", LIMITS).reason == "ZeroDivisionError: division by zero"


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
