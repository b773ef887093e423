"""Runs programs that a model wrote, each in a process of its own, with limits.

**This is no security sandbox.** It keeps the accidents of generated code (endless loops, runaway
memory, fork bombs, a stray `rmtree`, a download) from the machine; it is not made to hold code that
wants to get out. The program runs as the user who calls, and can read every file that the user can.
Run what you do not trust in a virtual machine.

What is bounded:

* Wall time and CPU time, address space, the size of each file written, open files, and that no core
  is dumped: by resource limits, and by killing the process group when the wall time is over. How
  many files are written is not bounded but by that time: many of them can fill a small disk.
* Network, further processes, signals to others, and writing, making or removing files outside a
  temporary directory that is empty at the start and removed afterwards. On Linux (x86-64 and ARM,
  5.13 or newer) the kernel refuses these: seccomp answers `socket`, `fork`, `execve`, `kill` and
  their like with an error, Landlock writing files, making, removing and moving them.
  `Outcome.kernel` says whether it does.
* Changing the mode, owner, times, extended attributes or length of a file elsewhere that is not
  opened for writing. Landlock knows none of these (of the length only since its version 3, Linux
  6.2). A Python audit hook refuses them.
* Where the kernel refuses nothing (other systems, containers that do not let a process ask for it)
  that hook refuses all of these. It sees most of Python's own functions, and not those that raise
  no audit event (`os.mkfifo`, `os.mknod`, `signal.pidfd_send_signal`, processes that
  `multiprocessing` spawns), what a path begins from in `os.open(..., dir_fd=)`, `ATTACH` in SQLite,
  or what a C extension does.
* The environment: the program sees none of the caller's variables, no standard input, and its
  output is thrown away.

How a program ended is told by its own process. That what it writes itself is not taken for that, is
seen to by a token that is not in its arguments, environment or files; a program that goes through
the memory of its interpreter finds it, and can say that it passed.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

_GUARD = Path(__file__).with_name("_guard.py")
# All that a pipe can hold: a program may have written to it too.
_LONGEST_RESULT = 1 << 20


class Limits(NamedTuple):
    """What a program may use.

    Attributes:
      seconds: Wall time, the start of the interpreter included.
      cpu_seconds: CPU time, of all its threads together.
      memory: Bytes of address space.
      file_size: Bytes of each file.
      open_files: Files open at the same time.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory: int = 1 << 30
    file_size: int = 1 << 20
    open_files: int = 64


DEFAULT = Limits()


class Outcome(NamedTuple):
    """How a program ended.

    Attributes:
      passed: Whether it ran to its end and raised nothing.
      reason: What it raised, or what ended it; empty if it passed.
      kernel: Whether the kernel kept it from network, processes and files elsewhere; False where
        Python alone did, None for a program that was killed.
    """

    passed: bool
    reason: str
    kernel: bool | None


def run(program: str, limits: Limits = DEFAULT, *, kernel: bool = True) -> Outcome:
    """Runs a Python program and says whether it ran to its end.

    A program that leaves early, by `sys.exit(0)` say, has not passed: its tests come last. What
    stands under `if __name__ == "__main__"` is not run.

    Args:
      program: Its source.
      limits: What it may use.
      kernel: Whether to ask the kernel; False is how it goes where the kernel refuses.

    Raises:
      RuntimeError: If the limits cannot be set.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        # Beneath, so that the program may change even the mode of its directory.
        work = Path(directory, "work")
        work.mkdir()
        token = secrets.token_hex()
        result, given = os.pipe()
        try:
            over = _wait(_start(program, token, work, given, limits, kernel), limits.seconds)
            os.set_blocking(result, False)
            _, said, text = _read(result).partition(token)
        finally:
            os.close(result)
    if said:
        found = json.loads(text)
        if "broken" in found:
            raise RuntimeError(f"programs cannot be run with limits here: {found['broken']}")
        return Outcome(found["error"] is None, found["error"] or "", found["kernel"])
    return Outcome(False, over, None)


def _start(
    program: str, token: str, work: Path, given: int, limits: Limits, kernel: bool
) -> subprocess.Popen[bytes]:
    """Starts the guard in a session, and so a process group, of its own."""
    bounds = {
        "RLIMIT_CPU": limits.cpu_seconds,
        "RLIMIT_AS": limits.memory,
        "RLIMIT_FSIZE": limits.file_size,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_CORE": 0,
    }
    wanted = {
        "program": program.encode(errors="replace").decode(),
        "token": token,
        "result": given,
        "kernel": kernel,
        "limits": bounds,
    }
    # A library finds its own; OpenBLAS would reserve address space for every core.
    environment = {
        "OPENBLAS_NUM_THREADS": "1",
        **{name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
    }
    try:
        # A file without a name, which the guard alone can read.
        with tempfile.TemporaryFile("w+") as file:
            json.dump(wanted, file)
            file.seek(0)
            return subprocess.Popen(
                [sys.executable, "-I", str(_GUARD)],
                cwd=work,
                env=environment,
                stdin=file,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(given,),
                start_new_session=True,
            )
    finally:
        os.close(given)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Waits for the end, or makes one; says what it was for a program that said nothing."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # All of the group had ended.
    process.wait()
    if code is None:
        return f"ran longer than {seconds:g} seconds"
    if code == -signal.SIGXCPU:
        return "used up its CPU time"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"left with status {code}"


def _read(result: int) -> str:
    try:
        return os.read(result, _LONGEST_RESULT).decode(errors="replace")
    except BlockingIOError:
        return ""
