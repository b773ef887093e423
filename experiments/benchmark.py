"""Speed and memory: of aggregation, programs and rounds, beside PyTorch; and of running at scale.

    python -m experiments.benchmark aggregation
    python -m experiments.benchmark aggregation --only=fedit,flexlora --noreference
    python -m experiments.benchmark growth
    python -m experiments.benchmark programs --clients=4 --rank=8
    python -m experiments.benchmark memory --rank=8
    python -m experiments.benchmark round
    python -m experiments.benchmark round --only=digits,per_client --chunks=all,1,6 --noreference
    python -m experiments.benchmark profile --only=digits,llama_6 --chunks=all,1
    python -m experiments.benchmark streaming --clients=5000 --folder=/tmp/jpegs
    python -m experiments.benchmark clients
    python -m experiments.benchmark mesh
    python -m experiments.benchmark engines
    python -m experiments.benchmark tree
    python -m experiments.benchmark endurance --endured=2000

`aggregation` takes all 112 adapted kernels of a Llama-3.2-1B (16 layers; q and o 2048 x 2048,
k and v 2048 x 512, gate and up 2048 x 8192, down 8192 x 2048) from 10 clients at rank 32.
Every function runs in a process of its own: the first call with its compilation, the best and
the median of later calls, and how far the process grew beyond the stacked factors. The dense
reference runs one kernel of each kind, and 10 of the 1000 steps of gradient descents; what is
multiplied up from that is marked with a tilde. `growth` measures one kernel for K from 2 to
256 and r from 4 to 128, fits exponents, and draws them. `programs` compiles a round of every
method on the shapes of a SmolLM2-135M (30 blocks, all seven linear layers of each adapted,
windows of 128 tokens, batches of four, one client at a time), each in a process of its own,
and runs none: lines of StableHLO, seconds to trace and to compile, the most memory that took,
and what the compiler plans for the round. `memory` compiles rounds of `fedit` on the same
model, with 1 and 4 clients side by side and texts of 128 and 512 tokens, and says what memory
the compiler plans: with the logits of the batch kept, with those of 128 tokens at a time, and
with blocks computed again besides. `round` times rounds of `fedit` beside a loop over clients
in PyTorch and PEFT, on four models; each size of `--chunks` is tried. `per_client` is the cost
of a client by the size of the cohort. `profile` traces a round of each of these models and
says in which kinds of operations its time goes. `streaming` writes 224 x 224 JPEG files, 25
for each client, and trains a small ViT on them in a process that may hold less memory than
they take: how many images the cores decode in a second, and the share of a round that the
device waits for them. `clients` runs whole rounds of the experiment loop against the number of
clients and of the cohort's, each point in a process of its own. `mesh` compiles a round of
every method for four devices, with the local training under `shard_map` and left to the
compiler, and counts what devices compute and send. `engines` counts the same of parts of a
round that are written in other ways: left to the compiler, with collectives written out, in
DrJAX (`pip install drjax`) and as here. `tree` trains clients of the digits demo, and
aggregates what they send along trees and from sketches. `endurance` runs thousands of rounds
of every method, in float32 and bfloat16, and fails if a value is not finite, a program is
compiled again, or memory grows; its rows are `METHOD:float32`, `METHOD:bfloat16`, and of some
`METHOD:loop`.

It prints tables and writes JSON, a Markdown page and pictures to `--output`, when all is measured;
until then the rows that are finished are there in a `.partial.json`.
"""

import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar

# Two libraries of linear algebra that both use all cores wait for each other. Threads of the
# decompositions of small cores gain nothing, products have their own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Processes share a GPU, where there is one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from absl import app, flags, logging

from experiments.benchmarks import (
    aggregation,
    clients,
    endurance,
    engines,
    growth,
    memory,
    mesh,
    profiles,
    programs,
    rounds,
    streaming,
    tree,
)
from fedlora_jax import locks
from fedlora_jax.experiment import records

Row = TypeVar("Row")


class Stopped(SystemExit):
    """A signal has come; the exit status is that of shells."""


_CLIENTS = flags.DEFINE_integer("clients", 10, "Clients K.", lower_bound=1)
_RANK = flags.DEFINE_integer("rank", 32, "Rank r.", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", 16, "Transformer layers.", lower_bound=1)
_BLOCKS = flags.DEFINE_integer("blocks", 30, "Blocks of `programs`.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the adapters.", lower_bound=0)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Calls after the first one.", lower_bound=1)
_COHORT = flags.DEFINE_integer("cohort", 64, "Clients a round of `streaming`.", lower_bound=1)
_IMAGES = flags.DEFINE_integer("images", 25, "Images of a client of `streaming`.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of `streaming`.", lower_bound=2)
_MEMORY = flags.DEFINE_float(
    "memory_gb", 2.5, "What `streaming` may hold; 0 for no bound.", lower_bound=0.0
)
_FOLDER = flags.DEFINE_string("folder", "", "Where `streaming` writes its images, to be kept.")
_SEEDS = flags.DEFINE_integer("tree_seeds", 5, "Seeds of `tree`.", lower_bound=1)
_ENDURED = flags.DEFINE_integer("endured", 2000, "Rounds of `endurance`.", lower_bound=20)
_ONLY = flags.DEFINE_list("only", [], "Rows of the table; all by default.")
_REFERENCE = flags.DEFINE_bool("reference", True, "Also run the code in PyTorch (extra `parity`).")
_FULL_SVD = flags.DEFINE_bool("full_svd", False, "Also run full SVDs of dense kernels: minutes.")
_CHUNKS = flags.DEFINE_list(
    "chunks", ["all", "1", "2"], "Of `round` and `profile`: clients side by side."
)
_FOUR_DEVICES = {"JAX_NUM_CPU_DEVICES": str(mesh.DEVICES), "JAX_PLATFORMS": "cpu"}
_OF_FOUR_DEVICES = {"device": "cpu", "platform": "cpu"}
# What measurements read.
OF_AGGREGATION = (_CLIENTS, _RANK, _LAYERS, _SEED, _REPEATS)
OF_PROGRAMS = (_BLOCKS, _CLIENTS, _RANK)
OF_MEMORY = (_BLOCKS, _RANK)
OF_ROUND = (_CHUNKS, _REPEATS)
OF_STREAMING = (_CLIENTS, _COHORT, _IMAGES, _ROUNDS, _MEMORY, _FOLDER)
_OUTPUT = flags.DEFINE_string("output", "experiments/benchmarks", "Directory for the results.")
# The file of the rows that this process has finished, until the table is.
_UNFINISHED: list[Path] = []
_WORKER = flags.DEFINE_string("worker", "", "Used by the program itself: what to measure here.")


def worker(task: str, **environment: str) -> dict[str, Any]:
    """Runs a measurement in a process of its own, which flags are passed on to.

    Args:
      task: Kind and name, with a colon between.
      **environment: Variables of the process, besides those of this one.
    """
    command = [sys.executable, "-m", "experiments.benchmark", f"--worker={task}"]
    # Some more than once, which does no harm: absl's flags have no hash to tell them apart by.
    for flag in (*OF_AGGREGATION, *OF_PROGRAMS, *OF_STREAMING, _ENDURED):
        command.append(f"--{flag.name}={flag.value}")
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        raise RuntimeError(f"{task} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(*read: flags.FlagHolder) -> dict[str, Any]:
    """What a figure depends on: machine, versions, and the flags that a measurement reads."""
    versions: dict[str, str | None] = {}
    for package in ("jax", "jaxlib", "numpy", "torch", "transformers", "peft"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": str(jax.devices()[0].device_kind),
        "platform": jax.default_backend(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **{flag.name: flag.value for flag in read},
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def rows_of(known: Iterable[str], defaults: Iterable[str] | None = None) -> list[str]:
    """The rows that are asked for; if none are, `defaults`, or all that are known."""
    rows = _ONLY.value or list(known if defaults is None else defaults)
    unknown = set(rows) - set(known)
    if unknown:
        raise app.UsageError(f"unknown rows {sorted(unknown)}; there are: {', '.join(known)}")
    return rows


def keep(name: str, results: dict[str, Any], ending: str = ".json") -> Path:
    """Writes the results as JSON."""
    path = Path(_OUTPUT.value) / f"{name}_{results['environment']['platform']}{ending}"
    records.write_atomically(path, json.dumps(results, indent=2) + "\n")
    return path


def each(
    name: str, results: dict[str, Any], rows: Iterable[Row], prefix: str = ""
) -> Iterator[Row]:
    """The rows in turn, announced with the prefix; after each one the results so far are kept.

    Beside those of an earlier run, which stay as they are until all is measured.
    """
    for row in rows:
        print(f"{prefix}{row} ...", file=sys.stderr, flush=True)
        yield row
        _UNFINISHED[:] = [keep(name, results, ".partial.json")]


def write(name: str, results: dict[str, Any], page: str, figure: Any = None) -> None:
    """Prints a page, and writes it and the results, and a picture if there is one."""
    print(page)
    path = keep(name, results)
    path.with_suffix(".md").write_text(page + "\n")
    if figure is not None:
        figure.savefig(path.with_suffix(".png"), dpi=120)
    while _UNFINISHED:
        _UNFINISHED.pop().unlink(missing_ok=True)
    print(f"written to {path} and .md", file=sys.stderr)


def aggregation_table() -> None:
    """Measures all rows and the dense code, prints the tables and writes them."""
    rows = rows_of(aggregation.ROWS)
    results: dict[str, Any] = {
        "environment": environment(*OF_AGGREGATION),
        "ours": {},
        "dense": {},
    }
    for row in each("aggregation", results, rows):
        results["ours"][row] = worker(f"row:{row}")
    if _REFERENCE.value:
        names = [name for name in dict.fromkeys(aggregation.ROWS[row][2] for row in rows) if name]
        if "flexlora" in rows:
            names += ["svd_by_qr"] * ("svd_by_qr" not in names) + ["svd_full"] * _FULL_SVD.value
            results["kinds"] = {"flexlora": worker("kinds:flexlora")}
        for name in each("aggregation", results, names, "dense "):
            results["dense"][name] = worker(f"dense:{name}")
    write("aggregation", results, aggregation.page(results))


def programs_table() -> None:
    """Measures the program of every method, prints the table and writes it."""
    results: dict[str, Any] = {"environment": environment(*OF_PROGRAMS), "methods": {}}
    for name in each("programs", results, rows_of(programs.rows())):
        results["methods"][name] = worker(f"program:{name}")
    write("programs", results, programs.page(results))


def memory_table() -> None:
    """Plans the memory of rounds, prints the table and writes it."""
    results: dict[str, Any] = {"environment": environment(*OF_MEMORY), "rounds": []}
    for count, length in ((1, 128), (4, 128), (1, 512), (4, 512)):
        line: dict[str, Any] = {"clients": count, "length": length}
        results["rounds"].append(line)
        prefix = f"{count} clients, {length} tokens, "
        for name in each("memory", results, rows_of(memory.LOSSES), prefix):
            line[name] = worker(f"memory:{count},{length},{name}")["working_bytes"]
    write("memory", results, memory.page(results))


def round_table() -> None:
    """Times rounds of both sides, prints the tables and writes them."""
    defaults = [*rounds.default_cases(jax.default_backend()), "per_client"]
    rows = rows_of([*rounds.CASES, "per_client"], defaults)
    missing = [name for name in ("torch", "transformers", "peft") if not find_spec(name)]
    if _REFERENCE.value and missing:
        raise app.UsageError(
            f"{', '.join(missing)} not installed: pip install -e '.[parity]', or leave "
            "PyTorch out with --noreference"
        )
    chunks = chunk_sizes()
    results: dict[str, Any] = {
        "environment": environment(*OF_ROUND),
        "cases": {},
        "per_client": {},
    }
    for row in each("round", results, rows):
        if row == "per_client":
            results[row] = rounds.measure_cohorts(_REPEATS.value)
        else:
            results["cases"][row] = rounds.measure(row, chunks, _REPEATS.value, _REFERENCE.value)
    write("round", results, rounds.report(results))


def profile_table() -> None:
    """Traces a round of each case, prints the table and writes it."""
    results: dict[str, Any] = {"environment": environment(_CHUNKS), "rows": {}}
    names = rows_of(rounds.CASES, rounds.default_cases(jax.default_backend()))
    chunks = chunk_sizes()
    rows = [f"{name}:{c}" for name in names for c in rounds.parts_of(rounds.CASES[name], chunks)]
    for row in each("profile", results, rows):
        results["rows"][row] = worker(f"profile:{row}")
    write("profile", results, profiles.page(results))


def chunk_sizes() -> list[str]:
    """Those that the command line asks for, `all` first."""
    try:
        return rounds.sizes(_CHUNKS.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from None


def measure_streaming() -> dict[str, Any]:
    """Trains on the images of the folder, in a process that does nothing else."""
    with tempfile.TemporaryDirectory() as workdir:
        return streaming.measure(
            Path(_FOLDER.value) / "images", Path(workdir) / "run", streaming_size()
        )


def streaming_size() -> streaming.Size:
    """The federation that the command line asks for."""
    memory = int(_MEMORY.value * 1e9)
    return streaming.Size(_CLIENTS.value, _COHORT.value, _IMAGES.value, _ROUNDS.value, memory)


def streaming_table() -> None:
    """Writes the images, trains on them in a process of its own, and says how that went."""
    if not _FOLDER.value:
        raise app.UsageError("name a directory for the images: --folder=DIR")
    folder, size = Path(_FOLDER.value) / "images", streaming_size()
    if size.cohort > size.clients:
        raise app.UsageError(
            f"--cohort={size.cohort} clients a round, but there are --clients={size.clients}"
        )
    images, fewest = size.clients * size.images, streaming.fewest(size.clients)
    if images < fewest:
        raise app.UsageError(
            f"--clients={size.clients} times --images={size.images} is {images} images; "
            f"{fewest} are needed, of which some are held out"
        )
    print(f"writing images to {folder} ...", file=sys.stderr, flush=True)
    streaming.write(folder, images)
    made = environment(*OF_STREAMING[:-1])
    found = worker("streaming")
    write("streaming", {"environment": made, **found}, streaming.page(made, found))


def clients_table() -> None:
    """Measures rounds against N and K, prints the table and writes it and a picture."""
    results: dict[str, Any] = {"environment": environment(), "points": []}
    for name in rows_of(clients.METHODS):
        prefix = f"{name}, (N, K) = "
        for num_clients, cohort_size in each("clients", results, clients.points(), prefix):
            point = worker(f"clients:{name},{num_clients},{cohort_size}")
            results["points"].append(point)
    write("clients", results, clients.page(results), clients.draw(results))


def mesh_table() -> None:
    """Counts what devices compute and send, prints the table and writes it."""
    found = worker(f"mesh:{','.join(rows_of(mesh.names()))}", **_FOUR_DEVICES)
    results = {"environment": environment() | _OF_FOUR_DEVICES, "methods": found}
    write("mesh", results, mesh.page(results))


def engines_table() -> None:
    """Counts what other ways to spread a round make devices send, prints the table, writes it."""
    found = worker(f"engines:{','.join(rows_of(engines.names()))}", **_FOUR_DEVICES)
    facts = environment() | _OF_FOUR_DEVICES
    results = {"environment": facts, "drjax": engines.version(), "rows": found}
    write("engines", results, engines.page(results))


def tree_table() -> None:
    """Aggregates in trees, prints the table and writes it and a picture."""
    results: dict[str, Any] = {"environment": environment(), "methods": {}}
    for name in rows_of(tree.METHODS):
        seeds = results["methods"].setdefault(name, {})
        for seed in each("tree", results, range(_SEEDS.value), f"{name}, seed "):
            seeds[str(seed)] = worker(f"tree:{name},{seed}")
    write("tree", results, tree.page(results), tree.draw(results))


def endurance_table() -> None:
    """Runs many rounds of every method, prints the table and writes it; fails if one fails."""
    results: dict[str, Any] = {"environment": environment(), "rounds": _ENDURED.value, "rows": {}}
    for name in each("endurance", results, rows_of(endurance.names())):
        results["rows"][name] = worker(f"endurance:{name}")
    write("endurance", results, endurance.page(results))
    failed = [name for name, row in results["rows"].items() if endurance.faults(row)]
    if failed:
        sys.exit(f"error: {len(failed)} rows do not hold: {', '.join(failed)}")


def growth_table() -> None:
    """Measures growth with K and r, prints exponents, writes them and a picture."""
    results = {"environment": environment(_REPEATS), "growth": worker("growth:")}
    write("growth", results, growth.page(results), growth.draw(results))


def main(argv: list[str]) -> None:
    """Runs what the command line asks for."""
    if _WORKER.value:
        kind, _, name = _WORKER.value.partition(":")
        if kind == "round":
            rounds.serve(**json.loads(name))
            return
        size = aggregation.Size(
            _CLIENTS.value, _RANK.value, _LAYERS.value, _SEED.value, _REPEATS.value
        )
        tasks: dict[str, Callable[[], dict[str, Any]]] = {
            "row": lambda: aggregation.measure(name, size),
            "kinds": lambda: aggregation.measure_kinds(name, size),
            "dense": lambda: aggregation.measure_dense(name, size),
            "growth": lambda: growth.measure(size.repeats),
            "profile": lambda: profiles.measure(*name.split(":")),
            "program": lambda: programs.measure(
                name, blocks=_BLOCKS.value, clients=_CLIENTS.value, rank=_RANK.value
            ),
            "memory": lambda: memory.measure(name, blocks=_BLOCKS.value, rank=_RANK.value),
            "streaming": measure_streaming,
            "clients": lambda: clients.measure(*clients.point_of(name)),
            "endurance": lambda: endurance.measure(name, _ENDURED.value),
            "engines": lambda: {each: engines.measure(each) for each in name.split(",")},
            "mesh": lambda: {each: mesh.measure(each) for each in name.split(",")},
            "tree": lambda: tree.measure(*tree.task_of(name)),
        }
        print(json.dumps(tasks[kind]()))
        return
    if len(argv) != 2 or argv[1] not in COMMANDS:
        raise app.UsageError(f"name one of: {', '.join(COMMANDS)}")
    table, read = COMMANDS[argv[1]]
    check_read(argv[1], read)
    try:
        locks.check_writable(Path(_OUTPUT.value))
    except OSError as error:
        raise app.UsageError(f"--output: {error}") from None
    measure(table)


def measure(table: Callable[[], None]) -> None:
    """Makes a table; what stops it ends the program, and says where the finished rows are."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # As in the background, or under `nohup`.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        table()
    except (RuntimeError, OSError) as error:
        logging.info("Where it comes from:", exc_info=True)
        sys.exit(f"error: {error}\n{_finished()}")
    except Stopped:
        print(f"stopped; {_finished()}", file=sys.stderr)
        raise


def check_read(command: str, read: Iterable[flags.FlagHolder]) -> None:
    """Raises UsageError if the command line has flags that this measurement does not read."""
    known = {flag.name for flag in (*read, _OUTPUT)}
    others = {flag.name: flag.present for _, each in COMMANDS.values() for flag in each}
    given = [name for name, present in others.items() if present and name not in known]
    if given:
        raise app.UsageError(
            f"{command} does not read {', '.join(f'--{each}' for each in given)}; it reads "
            f"{', '.join(f'--{each}' for each in sorted(known))}"
        )


def _stop(number: int, _: object) -> NoReturn:
    """Of an exception, not of a signal, `subprocess` ends the worker that it waits for."""
    raise Stopped(128 + number)


def _finished() -> str:
    """Where the rows of a table that is not finished are."""
    return f"finished rows are in {_UNFINISHED[0]}" if _UNFINISHED else "no row is finished"


# Each subcommand, and the flags that it reads.
COMMANDS: dict[str, tuple[Callable[[], None], tuple[flags.FlagHolder, ...]]] = {
    "aggregation": (aggregation_table, (*OF_AGGREGATION, _ONLY, _REFERENCE, _FULL_SVD)),
    "clients": (clients_table, (_ONLY,)),
    "endurance": (endurance_table, (_ENDURED, _ONLY)),
    "engines": (engines_table, (_ONLY,)),
    "growth": (growth_table, (_REPEATS,)),
    "memory": (memory_table, (*OF_MEMORY, _ONLY)),
    "mesh": (mesh_table, (_ONLY,)),
    "profile": (profile_table, (_CHUNKS, _ONLY)),
    "programs": (programs_table, (*OF_PROGRAMS, _ONLY)),
    "round": (round_table, (*OF_ROUND, _ONLY, _REFERENCE)),
    "streaming": (streaming_table, OF_STREAMING),
    "tree": (tree_table, (_SEEDS, _ONLY)),
}


if __name__ == "__main__":
    app.run(main)
