"""What runs in a program's own process: bounds itself, runs the program, says how it ended.

    python -I _guard.py < '{"program": SOURCE, "token": WORD, "result": DESCRIPTOR, ...}'

Started by `execution.run`, in the directory in which the program may write. What is wanted comes by
standard input, and the result begins with the token, so that a program finds neither the
descriptor nor the token in its arguments, its environment or a file. In the memory of its own
process it does, if it looks for them.
"""

import ctypes
import fcntl
import json
import os
import platform
import resource
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

_LONGEST_MESSAGE = 200

# Refused whatever their arguments; io_uring_setup because it can do what others are refused.
_NEVER = (
    *("socket", "fork", "vfork", "execve", "execveat", "io_uring_setup"),
    *("kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal"),
)
# Of each machine: its mark, then system calls by number.
_CALLS = {
    "x86_64": (
        0xC000003E,
        {
            "socket": 41,
            "clone": 56,
            "fork": 57,
            "vfork": 58,
            "execve": 59,
            "kill": 62,
            "fcntl": 72,
            "rt_sigqueueinfo": 129,
            "tkill": 200,
            "tgkill": 234,
            "rt_tgsigqueueinfo": 297,
            "prlimit64": 302,
            "execveat": 322,
            "pidfd_send_signal": 424,
            "io_uring_setup": 425,
            "clone3": 435,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "fcntl": 25,
            "kill": 129,
            "tkill": 130,
            "tgkill": 131,
            "rt_sigqueueinfo": 138,
            "socket": 198,
            "clone": 220,
            "execve": 221,
            "rt_tgsigqueueinfo": 240,
            "prlimit64": 261,
            "execveat": 281,
            "pidfd_send_signal": 424,
            "io_uring_setup": 425,
            "clone3": 435,
        },
    ),
}
# Landlock: everything that writes, makes, removes or moves files, by version of the interface.
_WRITING = {1: 0x1FF2, 2: 0x3FF2, 3: 0x7FF2}

# Of Python's audit events: where a path is among the arguments, and the directory it starts from.
_Places = tuple[tuple[int, int | None], ...]
_ATTRIBUTES: dict[str, _Places] = {
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "os.setxattr": ((0, None),),
    "os.removexattr": ((0, None),),
    "os.chflags": ((0, None),),
    "os.truncate": ((0, None),),
}
_NAMES: dict[str, _Places] = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((0, None), (1, 2)),
    "os.chdir": ((0, None),),
    "shutil.rmtree": ((0, 1),),
    "sqlite3.connect": ((0, None),),
}


def main() -> None:
    """Reads what is wanted, runs the program, and writes the token and `{"error", "kernel"}`."""
    with open(0, closefd=False) as file:
        wanted = json.load(file)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)  # the lowest number that is free, and so standard input
    try:
        for name, bound in wanted["limits"].items():
            _limit(getattr(resource, name), bound)
        kernel = wanted["kernel"] and _refused_by_kernel()
        sys.addaudithook(_refused_by_python(os.getcwd(), alone=not kernel))
    except Exception as error:
        found: dict[str, Any] = {"broken": f"{type(error).__name__}: {error}"}
    else:
        found = {"error": _run(wanted["program"]), "kernel": kernel}
    os.write(wanted["result"], (wanted["token"] + json.dumps(found)).encode())
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


def _calls_filtered(libc: ctypes.CDLL, architecture: int, calls: Mapping[str, int]) -> bool:
    """Seccomp: no sockets, processes or signals to others; threads and all other calls as ever."""
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x80000000)

    def error(number: int) -> tuple[int, int, int, int]:
        return (answer, 0, 0, 0x00050000 | number)

    denied = error(1)  # EPERM

    def by_argument(
        call: str, place: int, values: tuple[int, ...], found: tuple, other: tuple
    ) -> list[tuple[int, int, int, int]]:
        tests = [(equal, len(values) - i, 0, value) for i, value in enumerate(values)]
        looked_at = (load, 0, 0, 16 + 8 * place)
        return [(equal, 0, len(tests) + 3, calls[call]), looked_at, *tests, other, found]

    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), kill]
    program += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), denied]  # other numbers of calls
    for name in _NEVER:
        if name in calls:
            program += [(equal, 0, 1, calls[name]), denied]
    # A signal to itself, which is how a program crashes or aborts; its own limits.
    for name in ("tgkill", "prlimit64"):
        program += by_argument(name, 0, (0, os.getpid()), allow, denied)
    # F_SETOWN and F_SETOWN_EX say whom the kernel signals when a file is ready.
    program += by_argument("fcntl", 1, (8, 15), denied, allow)
    # ENOSYS: then clone is called, which is looked at: only threads.
    program += [(equal, 0, 1, calls["clone3"]), error(38)]
    program += [(equal, 0, 3, calls["clone"]), (load, 0, 0, 16), (any_bit, 1, 0, 0x10000)]
    program += [denied, allow]
    code = b"".join(
        operation.to_bytes(2, sys.byteorder)
        + bytes([if_true, if_false])
        + value.to_bytes(4, sys.byteorder)
        for operation, if_true, if_false, value in program
    )

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    return libc.prctl(22, 2, ctypes.byref(Filter(len(program), code)), 0, 0) == 0


def _refused_by_python(directory: str, alone: bool) -> Callable[[str, tuple], None]:
    """A hook that refuses where Python itself is asked for it.

    Args:
      directory: Where files may be changed.
      alone: Whether it stands for the kernel. Beside it, it refuses what the kernel does not see to
        elsewhere: attributes of files, and truncation, which Landlock knows since its version 3.
    """
    inside = os.path.realpath(directory) + os.sep
    changing = _ATTRIBUTES | (_NAMES if alone else {})
    starting = ("os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec")
    never = (*starting, "os.kill", "os.killpg")
    areas = ("socket.", "subprocess.", "ctypes.", "syslog.")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event: str, arguments: tuple) -> None:
        if alone and (event in never or event.startswith(areas)):
            raise PermissionError(f"{event} is refused")
        if alone and event == "resource.prlimit" and arguments[0] not in (0, os.getpid()):
            raise PermissionError(f"{event} of another process is refused")
        places = changing.get(event, ())
        if event == "open" and (arguments[2] or 0) & writing:
            places = ((0, None),)
        for path, start in places:
            found = _real_path(arguments[path], None if start is None else arguments[start])
            # SQLite reads an address as a path of its own.
            address = event == "sqlite3.connect" and os.fsdecode(arguments[0]).startswith("file:")
            if address or not (found + os.sep).startswith(inside):
                raise PermissionError(f"{event} outside the working directory is refused")

    return hook


def _real_path(path: Any, start: int | None) -> str:
    """Where a path leads, or a descriptor; beneath the descriptor of a directory, if there is."""
    path = _path_of(path) if isinstance(path, int) else os.fsdecode(path)
    if start is not None and start >= 0:
        path = os.path.join(_path_of(start), path)
    return os.path.realpath(path)


def _path_of(descriptor: int) -> str:
    if sys.platform == "darwin":
        found = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024))
        return os.fsdecode(found.rstrip(b"\0"))
    return f"/proc/self/fd/{descriptor}"


if __name__ == "__main__":
    main()
