"""What is in a compiled program, and what devices send each other there, read from its text."""

import math
import re
from typing import NamedTuple

# Kinds as the text has them. What is started and awaited counts where it is awaited.
KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0, "opaque": 0}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", re.MULTILINE)
_INSTRUCTION = re.compile(
    r"^[ \t]+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$", re.MULTILINE
)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|\w*computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r"known_trip_count\":?\{\"n\":\"(\d+)\"")


class Instruction(NamedTuple):
    """One line of a program: `name = shape opcode(rest`."""

    name: str
    shape: str
    opcode: str
    rest: str


class Sent(NamedTuple):
    """Collectives of one kind: how often a run of the program has one, and bytes of results."""

    times: int
    num_bytes: int


def collectives(text: str, *, only_in_loops: bool = False) -> dict[str, Sent]:
    """The collectives that a device takes part in, by kind, in one run of a compiled program.

    What is in a loop counts as often as the loop turns, where the compiler knows that, else once;
    of a conditional all branches count. Bytes are those of a collective's result on one device.

    Args:
      text: Of a compiled program, from `compiled.as_text()`.
      only_in_loops: Those alone that are in the body of a loop: a wait in each of its turns.

    Raises:
      ValueError: If it has no entry: it is not the text of a compiled program.
    """
    bodies, entry = computations(text)
    found: dict[str, Sent] = {}

    def walk(name: str, times: int, counted: bool) -> None:
        for _, shape, operation, rest in bodies[name]:
            kind = operation.removesuffix("-done")
            if kind in KINDS and counted:
                before = found.get(kind, Sent(0, 0))
                found[kind] = Sent(
                    before.times + times, before.num_bytes + times * num_bytes(shape)
                )
            trips = _TRIPS.search(rest) if operation == "while" else None
            for inner in called(rest):
                if inner in bodies:
                    inside = counted or operation == "while"
                    walk(inner, times * int(trips[1]) if trips else times, inside)

    walk(entry, 1, not only_in_loops)
    return found


def operands(rest: str) -> list[str]:
    """The names of an instruction's operands."""
    return re.findall(r"%([\w.\-]+)", rest.partition(")")[0])


def sizes(shape: str) -> list[int]:
    """The sizes of an array along its axes: `[4, 8]` of `f32[4,8]{1,0}`."""
    return integers(_ARRAY.findall(shape)[0][1])


def integers(text: str) -> list[int]:
    """All whole numbers in a text."""
    return [int(number) for number in re.findall(r"\d+", text)]


def num_bytes(shape: str) -> int:
    """Bytes of an array or a tuple of arrays, as `f32[4,8]{1,0}` or `(f32[2], s32[])`."""
    total = 0
    for name, lengths in _ARRAY.findall(shape):
        bits = _BITS.get(name, int((re.search(r"\d+", name) or [0])[0]))
        total += (math.prod(integers(lengths)) * bits + 7) // 8
    return total


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation by name, and which is the entry.

    Raises:
      ValueError: If there is no entry: it is not the text of a compiled program.
    """
    heads = list(_COMPUTATION.finditer(text))
    entries = [head[2] for head in heads if head[1]]
    if len(entries) != 1:
        raise ValueError("this is not the text of a compiled program: it has no one ENTRY")
    ends = [head.start() for head in heads[1:]] + [len(text)]
    bodies = {
        head[2]: [Instruction(*found) for found in _INSTRUCTION.findall(text, head.end(), end)]
        for head, end in zip(heads, ends, strict=True)
    }
    return bodies, entries[0]


def called(rest: str) -> list[str]:
    """The computations that an instruction calls."""
    return [name for group in _CALLED.findall(rest) for name in re.findall(r"[\w.\-]+", group)]
