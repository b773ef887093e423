"""Where the time of a round goes, by kind of operation, from a trace of `jax.profiler`.

The compiled program says what each operation is, the trace how long it took.
"""

import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tabulate import tabulate

from experiments.benchmarks import hlo, rounds

LARGE, LOW_RANK, BATCHED = "large products", "of rank r", "in batches"
CALLS, COPIES, REST = "library calls", "copies", "all else"
KINDS = (LARGE, LOW_RANK, BATCHED, CALLS, COPIES, REST)

# What runs other operations, which are in the trace themselves.
_AROUND = {"while", "call", "conditional", "async-start", "async-done"}
# What computes nothing.
_MOVES = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy", "transpose"),
    *("reshape", "broadcast", "slice", "concatenate", "pad", "reverse", "gather", "convert"),
    *("dynamic-slice", "dynamic-update-slice", "copy-start", "copy-done"),
}
# Of a product in the text of a program, or of a call of a library that computes it.
_DIMENSIONS = re.compile(r"([lr]hs_(?:batch|contracting))_dim\w*\"?[=:][{\[]([^}\]]*)")


class Operation(NamedTuple):
    """One operation of a program.

    Attributes:
      kind: Of `KINDS`.
      flops: Operations of the product in it, if it is one.
    """

    kind: str
    flops: float = 0.0


def operations(text: str, rank: int) -> dict[str, Operation]:
    """The operations of a compiled program by name, without those that run others.

    A fusion with a product in it is that product; one that only moves numbers is a copy.

    Args:
      text: Of a compiled program, from `compiled.as_text()`.
      rank: Products of which a side is no longer than this are of `LOW_RANK`.
    """
    computations, _ = hlo.computations(text)
    shapes = {each.name: each.shape for lines in computations.values() for each in lines}
    inside = {
        called
        for lines in computations.values()
        for each in lines
        if each.opcode not in _AROUND
        for called in hlo.called(each.rest)
    }

    def within(instruction: hlo.Instruction) -> Iterator[hlo.Instruction]:
        names = hlo.called(instruction.rest) if instruction.opcode == "fusion" else []
        if not names:
            yield instruction
        for name in names:
            for each in computations.get(name, []):
                yield from within(each)

    return {
        each.name: _operation(list(within(each)), shapes, rank)
        for name, lines in computations.items()
        if name not in inside
        for each in lines
        if each.opcode not in _AROUND
    }


def _operation(parts: list[hlo.Instruction], shapes: Mapping[str, str], rank: int) -> Operation:
    found = [_product(each, shapes, rank) for each in parts if _is_product(each)]
    if found:
        largest = max(found, key=lambda each: each.flops)
        return largest._replace(flops=sum(each.flops for each in found))
    opcodes = {each.opcode for each in parts}
    if "custom-call" in opcodes:
        return Operation(CALLS)
    return Operation(COPIES if opcodes <= _MOVES else REST)


def _is_product(instruction: hlo.Instruction) -> bool:
    called = instruction.opcode == "custom-call" and "contracting_dimensions" in instruction.rest
    return called or instruction.opcode == "dot"


def _product(instruction: hlo.Instruction, shapes: Mapping[str, str], rank: int) -> Operation:
    along = {side: hlo.integers(text) for side, text in _DIMENSIONS.findall(instruction.rest)}
    left, right = (hlo.sizes(shapes[name]) for name in hlo.operands(instruction.rest)[:2])
    batch = math.prod(left[axis] for axis in along.get("lhs_batch", ()))
    summed = math.prod(left[axis] for axis in along.get("lhs_contracting", ()))
    rows, columns = (math.prod(side) // (batch * summed) for side in (left, right))
    flops = 2.0 * batch * summed * rows * columns
    if min(summed, rows, columns) <= rank:
        return Operation(LOW_RANK, flops)
    return Operation(BATCHED if batch > 1 else LARGE, flops)


def measure(name: str, chunk: str) -> dict[str, Any]:
    """Traces one round of a case of `rounds.CASES`, the second one.

    Args:
      name: Which.
      chunk: How many clients train side by side, or `all`.

    Returns:
      Of each of `KINDS` the `seconds` of all threads in such operations, how often they `ran` and
      their `flops`; and `matrix_rate`, that of large products alone.
    """
    case = rounds.CASES[name]
    made = rounds.ours(case, case.clients, [chunk])
    known = operations(made.text(chunk), case.rank)
    made.compute(chunk)
    found = {kind: {"seconds": 0.0, "ran": 0, "flops": 0.0} for kind in KINDS}
    for operation, seconds in _traced(lambda: made.compute(chunk)):
        if operation in known:
            kind, flops = known[operation]
            found[kind]["seconds"] += seconds
            found[kind]["ran"] += 1
            found[kind]["flops"] += flops
    return {"kinds": found, "matrix_rate": made.side.facts["matrix_rate"]}


def _traced(run: Any) -> Iterator[tuple[str, float]]:
    """Name and seconds of each operation that runs meanwhile, on whatever thread or stream."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            run()
        for path in Path(directory).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for line in plane.lines:
                    for event in line.events:
                        operation = dict(event.stats).get("hlo_op")
                        if operation is not None:
                            yield str(operation), event.duration_ns / 1e9


def page(results: Mapping[str, Any]) -> str:
    """The table, as Markdown."""
    facts = results["environment"]
    head = ["case", "chunk", *KINDS, "thread s", "GFLOP/s of large ones", "alone"]
    rows = []
    for row, measured in results["rows"].items():
        name, chunk = row.split(":")
        kinds = measured["kinds"]
        whole = sum(each["seconds"] for each in kinds.values())
        shares = [f"{each['seconds'] / whole:.0%}" for each in kinds.values()]
        large = kinds[LARGE]
        rate = large["flops"] / large["seconds"] / 1e9 if large["seconds"] else 0.0
        alone = measured["matrix_rate"] / 1e9
        rows.append([f"`{name}`", chunk, *shares, f"{whole:.3g}", f"{rate:.0f}", f"{alone:.0f}"])
    lines = [
        "# Where the time of a round goes",
        "",
        f"{facts['date']}, {facts['device']}, {facts['cores']} cores, jax "
        f"{facts['versions']['jax']}, load average {facts['load_average_at_start']} when it began.",
        "",
        tabulate(
            rows,
            head,
            "github",
            colalign=("left", *["right"] * (len(head) - 1)),
            disable_numparse=True,
        ),
        "",
        _NOTES,
    ]
    return "\n".join(lines)


_NOTES = (
    "One traced round, the second one, of the cases of [a round](round_cpu.md). Shares of the time "
    "that threads (on an accelerator, streams) spend in operations of each kind: products by what "
    "is multiplied, no side of which is as short as the rank (`large`), one of which is (`of rank "
    "r`: those of adapters), or many of a kind at once (`in batches`: those of attention, and with "
    "several clients side by side those of adapters that are longer than the rank); calls of "
    "libraries, such as LAPACK; what only moves numbers (`copies`); and all else. Where one thread "
    "waits for others its time counts too. `GFLOP/s of large ones`: their operations over their "
    "time; `alone`: of a large product that has all cores. Of two products side by side each has "
    "half of them."
)
