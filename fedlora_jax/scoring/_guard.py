"""What runs in a program's own process: bounds itself, runs the program, says how it ended.

    python -I _guard.py '{"program": PATH, "result": DESCRIPTOR, "kernel": true, ...}'

Started by `execution.run`, in the directory in which the program may write.
"""

import ctypes
import json
import os
import platform
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

_LONGEST_MESSAGE = 200

# Of each machine: its mark, then system calls by number. Refused are socket, fork, vfork, kill,
# tkill, and io_uring_setup, which can do it all; then clone and clone3, which also make threads.
_CALLS = {
    "x86_64": (0xC000003E, (41, 57, 58, 62, 200, 425), 56, 435),
    "aarch64": (0xC00000B7, (198, 129, 130, 425), 220, 435),
}
# Landlock: everything that writes, makes, removes or moves files, by version of the interface.
_WRITING = {1: 0x1FF2, 2: 0x3FF2, 3: 0x7FF2}


def main() -> None:
    """Reads what is wanted, runs the program, and writes `{"error", "kernel"}`, JSON."""
    wanted = json.loads(sys.argv[1])
    try:
        with open(wanted["program"]) as file:
            source = file.read()
        for name, bound in wanted["limits"].items():
            _limit(getattr(resource, name), bound)
        kernel = wanted["kernel"] and _refused_by_kernel()
        if not kernel:
            sys.addaudithook(_refused_by_python(os.getcwd()))
    except Exception as error:
        found: dict[str, Any] = {"broken": f"{type(error).__name__}: {error}"}
    else:
        found = {"error": _run(source), "kernel": kernel}
    os.write(wanted["result"], json.dumps(found).encode())
    os._exit(0)


def _limit(kind: int, bound: int) -> None:
    """Sets a limit; a lower one that is there already stays."""
    _, highest = resource.getrlimit(kind)
    # At the lower bound of CPU time a signal says what it is for, at the upper one it kills.
    higher = bound + 1 if kind == resource.RLIMIT_CPU else bound
    if highest != resource.RLIM_INFINITY:
        bound, higher = min(bound, highest), min(higher, highest)
    resource.setrlimit(kind, (bound, higher))


def _run(source: str) -> str | None:
    """None if the program ran to its end, else what it raised."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "program", "exec"), module.__dict__)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
    return None


def _refused_by_kernel() -> bool:
    """Has the kernel refuse sockets, processes, signals, writing elsewhere; False if it fails."""
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS, without which the rest needs to be root
        return False
    # Both, also if one of them fails.
    return all([_writes_here_only(libc), _calls_filtered(libc, *_CALLS[platform.machine()])])


def _writes_here_only(libc: ctypes.CDLL) -> bool:
    """Landlock (Linux 5.13): files are written, made and removed beneath this directory alone."""
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return False
    rights = _WRITING[min(version, max(_WRITING))]
    attribute = ctypes.create_string_buffer(rights.to_bytes(8, "little"), 8)
    ruleset = libc.syscall(444, attribute, 8, 0)
    here = os.open(".", os.O_PATH)
    beneath = rights.to_bytes(8, "little") + here.to_bytes(4, "little")
    done = (
        ruleset >= 0
        and libc.syscall(445, ruleset, 1, ctypes.create_string_buffer(beneath, 12), 0) == 0
        and libc.syscall(446, ruleset, 0) == 0
    )
    os.close(here)
    return done


def _calls_filtered(
    libc: ctypes.CDLL, architecture: int, refused: tuple[int, ...], clone: int, clone3: int
) -> bool:
    """Seccomp: no sockets, processes or signals to others; threads and all other calls as ever."""
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x80000000)

    def error(number: int) -> tuple[int, int, int, int]:
        return (answer, 0, 0, 0x00050000 | number)

    denied = error(1)  # EPERM
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), kill]
    program += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), denied]  # other numbers of calls
    for call in refused:
        program += [(equal, 0, 1, call), denied]
    program += [
        (equal, 0, 1, clone3),
        error(38),
    ]  # ENOSYS: then clone is called, which is looked at
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, 0x10000), denied, allow]
    code = b"".join(
        operation.to_bytes(2, sys.byteorder)
        + bytes([if_true, if_false])
        + value.to_bytes(4, sys.byteorder)
        for operation, if_true, if_false, value in program
    )

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    return libc.prctl(22, 2, ctypes.byref(Filter(len(program), code)), 0, 0) == 0


def _refused_by_python(directory: str) -> Callable[[str, tuple], None]:
    """A hook that refuses the same where Python itself is asked for it."""
    inside = os.path.realpath(directory) + os.sep
    never = ("os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec", "os.kill")
    moving = ("os.rename", "os.link", "os.symlink")
    files = ("os.remove", "os.truncate", "os.chmod", "os.chown", "os.utime")
    directories = ("os.rmdir", "os.mkdir", "os.chdir", "shutil.rmtree")
    changing = (*files, *directories, *moving)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event: str, arguments: tuple) -> None:
        if event in never or event.startswith(("socket.", "subprocess.", "ctypes.")):
            raise PermissionError(f"{event} is refused")
        paths = arguments[:2] if event in moving else arguments[:1]
        if event in changing or (event == "open" and (arguments[2] or 0) & writing):
            for path in paths:
                if isinstance(path, int) or not os.path.realpath(path).startswith(inside):
                    raise PermissionError(f"{event} outside the working directory is refused")

    return hook


if __name__ == "__main__":
    main()
