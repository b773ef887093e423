"""Speed and memory: of aggregation, programs and rounds, beside PyTorch; and of running at scale.

    python -m experiments.benchmark aggregation
    python -m experiments.benchmark aggregation --only=fedit,flexlora --noreference
    python -m experiments.benchmark growth
    python -m experiments.benchmark programs --clients=4 --rank=8
    python -m experiments.benchmark memory --rank=8
    python -m experiments.benchmark round
    python -m experiments.benchmark round --only=digits,per_client --chunks=all,1,6 --noreference
    python -m experiments.benchmark streaming --clients=5000 --folder=/tmp/jpegs
    python -m experiments.benchmark clients
    python -m experiments.benchmark mesh
    python -m experiments.benchmark tree --tree_seeds=3

`aggregation` takes all 112 adapted kernels of a Llama-3.2-1B (16 layers; q and o 2048 x 2048, k
and v 2048 x 512, gate and up 2048 x 8192, down 8192 x 2048) from 10 clients at rank 32. Every
function runs in a process of its own: the first call with its compilation, the best and the median
of later calls, and how far the process grew beyond the stacked factors. The dense reference runs
one kernel of each kind, and 10 of the 1000 steps of gradient descents; what is multiplied up from
that is marked with a tilde. `growth` measures one kernel for K from 2 to 256 and r from 4 to 128,
fits exponents, and draws them. `programs` compiles a round of every method on the shapes of a
SmolLM2-135M (30 blocks, all seven linear layers of each adapted, windows of 128 tokens, batches of
four, one client at a time), each in a process of its own, and runs none: lines of StableHLO,
seconds to trace and to compile, the most memory that took, and what the compiler plans for the
round. `memory` compiles rounds of `fedit` on the same model, with 1 and 4 clients side by side and
texts of 128 and 512 tokens, and says what memory the compiler plans: with the logits of the batch
kept, with those of 128 tokens at a time, and with blocks computed again besides. `round` times
rounds of `fedit` beside a loop over clients in PyTorch and PEFT, on four models; each size of
`--chunks` is tried. `per_client` is the cost of a client by the size of the cohort. `streaming`
writes 224 x 224 JPEG files, 25 for each client, and trains a small ViT on them in a process that
may hold less memory than they take: how many images the cores decode in a second, and the share of
a round that the device waits for them. `clients` runs whole rounds of the experiment loop against
the number of clients and of the cohort's, each point in a process of its own. `mesh` compiles a
round of every method for four devices, with the local training under `shard_map` and left to the
compiler, and counts what devices compute and send. `tree` trains clients of the digits demo, and
aggregates what they send along trees and from sketches.

It prints tables and writes JSON, a Markdown page and pictures to `--output`.
"""

import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Two libraries of linear algebra that both use all cores wait for each other. Threads of the
# decompositions of small cores gain nothing, products have their own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tabulate import tabulate

from experiments.benchmarks import clients, mesh, programs, rounds, streaming, tree
from fedlora_jax import Factors, aggregation, methods

_CLIENTS = flags.DEFINE_integer("clients", 10, "Clients K.", lower_bound=1)
_RANK = flags.DEFINE_integer("rank", 32, "Rank r.", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", 16, "Transformer layers.", lower_bound=1)
_BLOCKS = flags.DEFINE_integer("blocks", 30, "Blocks of `programs`.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the adapters.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Calls after the first one.", lower_bound=1)
_COHORT = flags.DEFINE_integer("cohort", 64, "Clients a round of `streaming`.", lower_bound=1)
_IMAGES = flags.DEFINE_integer("images", 25, "Images of a client of `streaming`.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of `streaming`.", lower_bound=2)
_MEMORY = flags.DEFINE_float("memory_gb", 2.5, "What `streaming` may hold; 0 for no bound.")
_FOLDER = flags.DEFINE_string("folder", "", "Where `streaming` writes its images, to be kept.")
_SEEDS = flags.DEFINE_integer("tree_seeds", 3, "Seeds of `tree`.", lower_bound=1)
_ONLY = flags.DEFINE_list("only", [], "Rows of the table; all by default.")
_REFERENCE = flags.DEFINE_bool("reference", True, "Also run the code in PyTorch (extra `parity`).")
_FULL_SVD = flags.DEFINE_bool("full_svd", False, "Also run full SVDs of dense kernels: minutes.")
_CHUNKS = flags.DEFINE_list("chunks", ["all", "1", "2"], "Of `round`: clients side by side.")
_OUTPUT = flags.DEFINE_string("output", "experiments/benchmarks", "Directory for the results.")
_WORKER = flags.DEFINE_string("worker", "", "Used by the program itself: what to measure here.")

KERNELS = {
    "q": (2048, 2048),
    "k": (2048, 512),
    "v": (2048, 512),
    "o": (2048, 2048),
    "gate": (2048, 8192),
    "up": (2048, 8192),
    "down": (8192, 2048),
}
DENSE_STEPS, FULL_STEPS = 10, 1000

# Name of a row: the function, its options, and the dense code that it stands beside.
ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "fedit": ("fedit", {}, "means"),
    "ffa_lora": ("ffa_lora", {}, "means"),
    "rolora": ("rolora", {}, "means"),
    "fedsa_lora": ("fedsa_lora", {}, "means"),
    "hetlora": ("hetlora", {}, "means"),
    "flora": ("flora", {}, "stacking"),
    "fedex_lora": ("fedex_lora", {}, "fedex"),
    "frlora": ("frlora", {}, "means"),
    "fedrot_lora": ("fedrot_lora", {}, ""),
    "lora_fair closed form": (
        "lora_fair",
        {"similarity": "frobenius", "solver": "closed_form"},
        "fair_sgd",
    ),
    "lora_fair sgd, 1000 steps": ("lora_fair", {"units": "raw"}, "fair_sgd"),
    "flora_na": ("flora_na", {}, "flora_na_descent"),
    "fedsvd": ("fedsvd", {}, ""),
    "flexlora": ("flexlora", {}, "svd_lowrank"),
    "spectral": ("spectral", {}, "svd_by_qr"),
}
TREES = {"frlora": "initial", "fedrot_lora": "reference"}
# Columns of the table of memory: how the loss is taken, and whether blocks are computed again.
LOSSES = {
    "whole": ("whole", False),
    "chunked": ("chunked", False),
    "chunked, remat": ("chunked", True),
}


def adapters(seed: int, count: int, rank: int, kernels: dict[str, tuple[int, int]]) -> Any:
    """Stacked adapters as training leaves them: a start in common, and clients of unequal size."""
    rng = np.random.default_rng(seed)
    tree = {}
    for name, (d_in, d_out) in kernels.items():
        a = rng.standard_normal((count, d_in, rank), dtype=np.float32)
        a = 0.5 * a + rng.standard_normal((d_in, rank), dtype=np.float32)
        b = rng.standard_normal((count, rank, d_out), dtype=np.float32)
        b += rng.standard_normal((rank, d_out), dtype=np.float32)
        b *= rng.uniform(0.3, 3, (count, 1, 1)).astype(np.float32)
        tree[name] = Factors(jnp.asarray(a * d_in**-0.5), jnp.asarray(b))
    return jax.block_until_ready(tree)


def model(layers: int) -> dict[str, tuple[int, int]]:
    """The kernels of the whole model by name."""
    return {
        f"layer_{i:02d}/{name}": shape for i in range(layers) for name, shape in KERNELS.items()
    }


def weights_of(count: int) -> jax.Array:
    """Unequal example counts."""
    return jnp.linspace(1, 2, count)


def bind(row: str, count: int, rank: int, kernels: dict[str, Any]) -> Callable[[Any], Any]:
    """The call that a row of the table measures."""
    name, options, _ = ROWS[row]
    if name in TREES:
        start = jax.tree.map(lambda x: x[0], adapters(1, 1, rank, kernels))
        options = {**options, TREES[name]: start}
    weights = weights_of(count)
    function = aggregation.get(name)
    return lambda stacked: function(stacked, weights, **options)


class Memory(threading.Thread):
    """The most memory in use above the start: of this process, or of the accelerator."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.most = self._now()
        self._done = threading.Event()

    @staticmethod
    def _now() -> int:
        statistics_of_device = jax.devices()[0].memory_stats()
        if statistics_of_device:
            return statistics_of_device["bytes_in_use"]
        try:
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0

    def run(self) -> None:
        """Watches until it is stopped."""
        while not self._done.wait(0.003):
            self.most = max(self.most, self._now())

    def stop(self) -> int:
        """Bytes above the start."""
        self._done.set()
        self.join()
        return self.most - self.start_bytes


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of several calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(row: str) -> dict[str, Any]:
    """One row of the table, in this process."""
    count, rank, kernels = _CLIENTS.value, _RANK.value, model(_LAYERS.value)
    stacked = adapters(_SEED.value, count, rank, kernels)
    size = sum(x.nbytes for x in jax.tree.leaves(stacked))
    read = jax.jit(lambda tree: [jnp.sum(x) for x in jax.tree.leaves(tree)])
    pass_seconds = min(timed(lambda: read(stacked), 1 + _REPEATS.value)[1:])
    call = bind(row, count, rank, kernels)
    memory = Memory()
    memory.start()
    first = timed(lambda: call(stacked), 1)[0]
    later = timed(lambda: call(stacked), _REPEATS.value)
    grown = memory.stop()
    aggregated = call(stacked)
    error = aggregation.error(stacked, weights_of(count), aggregated)
    return {
        "first_call_s": first,
        "best_s": min(later),
        "median_s": statistics.median(later),
        "read_pass_s": pass_seconds,
        "passes": min(later) / pass_seconds,
        "stacked_bytes": size,
        "grown_bytes": grown,
        "grown_over_stacked": grown / size,
        "error": float(error),
    }


def measure_kinds(row: str) -> dict[str, Any]:
    """The best time of one kernel of each kind, and its error, for comparison with dense code."""
    count, rank = _CLIENTS.value, _RANK.value
    result = {}
    for kind, shape in distinct().items():
        stacked = adapters(_SEED.value, count, rank, {kind: shape})
        call = bind(row, count, rank, {kind: shape})
        call(stacked)
        seconds = min(timed(functools.partial(call, stacked), _REPEATS.value))
        error = float(aggregation.error(stacked, weights_of(count), call(stacked)))
        result[kind] = {"best_s": seconds, "error": error}
    return result


def distinct() -> dict[str, tuple[int, int]]:
    """One kernel of each shape."""
    return {" x ".join(map(str, shape)): shape for shape in KERNELS.values()}


def how_many(shape: tuple[int, int]) -> int:
    """How many kernels of the model have this shape."""
    return list(KERNELS.values()).count(shape) * _LAYERS.value


def measure_dense(name: str) -> dict[str, Any]:
    """Dense code on one kernel of each kind; the whole model is multiplied up from that."""
    import torch

    from experiments.benchmarks import dense

    torch.set_num_threads(os.cpu_count() or 1)
    descent = name in ("fair_sgd", "flora_na_descent")
    count, rank = _CLIENTS.value, _RANK.value
    function = getattr(dense, name)
    if descent:
        function = function(DENSE_STEPS)
    p = torch.from_numpy(np.array(weights_of(count) / weights_of(count).sum()))
    if name in ("means", "stacking"):  # a single kernel would stay in the cache
        tree = adapters(_SEED.value, count, rank, model(_LAYERS.value))
        pairs = [tuple(torch.from_numpy(np.array(x)) for x in node) for node in tree.values()]
        del tree
        best = min(timed(lambda: [function(a, b, p) for a, b in pairs], _REPEATS.value))
        return {"best_s": best, "extrapolated": ""}
    kinds, total = {}, 0.0
    for kind, shape in distinct().items():
        node = adapters(_SEED.value, count, rank, {kind: shape})[kind]
        a, b = (torch.from_numpy(np.array(x)) for x in node)
        function(a, b, p)
        start_s, seconds = 0.0, []
        for _ in range(1 if name == "svd_full" else 3):
            start = time.perf_counter()
            result = function(a, b, p)
            seconds.append(time.perf_counter() - start)
        best = min(seconds)
        if descent:
            start = time.perf_counter()
            dense.mean_of_products(a, b, p)
            start_s = time.perf_counter() - start
            best = start_s + max(best - start_s, 0) * FULL_STEPS / DENSE_STEPS
        kinds[kind] = {"best_s": best}
        if not descent and isinstance(result, tuple):
            # In float64: torch's norm of as many float32 numbers is off in the fourth digit.
            ideal = dense.mean_of_products(a, b, p).double()
            distance = torch.linalg.norm(ideal - (result[0] @ result[1]).double())
            kinds[kind]["error"] = float(distance / torch.linalg.norm(ideal))
        total += best * how_many(shape)
    return {
        "best_s": total,
        "extrapolated": "one kernel of each kind, times their number"
        + (f"; {DENSE_STEPS} steps of {FULL_STEPS}" if descent else ""),
        "kinds": kinds,
    }


def measure_growth() -> dict[str, Any]:
    """Seconds on one kernel 2048 x 2048 over K at r = 8, and over r at K = 4."""
    shape = {"kernel": (2048, 2048)}
    rows = ["fedit", "lora_fair closed form", "flora_na", "flora", "flexlora"]
    axes = {
        "K": [(2**i, 8) for i in range(1, 9)],
        "r": [(4, 2**i) for i in range(2, 8)],
    }
    result: dict[str, Any] = {"kernel": [2048, 2048], "fixed": {"K": "r = 8", "r": "K = 4"}}
    for axis, points in axes.items():
        result[axis] = {"at": [point[axis == "r"] for point in points]}
        for row in rows:
            seconds = []
            for count, rank in points:
                stacked = adapters(0, count, rank, shape)
                call = bind(row, count, rank, shape)
                jax.block_until_ready(call(stacked))
                seconds.append(min(timed(functools.partial(call, stacked), _REPEATS.value)))
            half = len(points) // 2
            slope = np.polyfit(np.log(result[axis]["at"][half:]), np.log(seconds[half:]), 1)[0]
            result[axis][row] = {"seconds": seconds, "exponent": round(float(slope), 2)}
    return result


def measure_memory(row: str) -> dict[str, Any]:
    """The memory of a round of `fedit`; a row is, for example, `4,128,chunked`."""
    clients, length, name = row.split(",", 2)
    loss, remat = LOSSES[name]
    planned = programs.working_bytes(
        "fedit",
        blocks=_BLOCKS.value,
        clients=int(clients),
        rank=_RANK.value,
        loss=loss,
        length=int(length),
        remat=remat,
        clients_per_chunk=None,
    )
    return {"working_bytes": planned}


def worker(task: str, **environment: str) -> dict[str, Any]:
    """Runs a measurement in a process of its own, which flags are passed on to.

    Args:
      task: Kind and name, with a colon between.
      **environment: Variables of the process, besides those of this one.
    """
    command = [sys.executable, "-m", "experiments.benchmark", f"--worker={task}"]
    of_streaming = (_COHORT, _IMAGES, _ROUNDS, _MEMORY, _FOLDER)
    for flag in (_CLIENTS, _RANK, _LAYERS, _BLOCKS, _SEED, _REPEATS, *of_streaming):
        command.append(f"--{flag.name}={flag.value}")
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        raise RuntimeError(f"{task} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, Any]:
    """What a figure depends on."""
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
        "seed": _SEED.value,
        "clients": _CLIENTS.value,
        "rank": _RANK.value,
        "layers": _LAYERS.value,
        "blocks": _BLOCKS.value,
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def rows_of(known: Iterable[str]) -> list[str]:
    """The rows that are asked for."""
    rows = _ONLY.value or list(known)
    unknown = set(rows) - set(known)
    if unknown:
        raise app.UsageError(f"unknown rows {sorted(unknown)}; there are: {', '.join(known)}")
    return rows


def write(name: str, results: dict[str, Any], page: str, figure: Any = None) -> None:
    """Prints a page, and writes it and the results, and a picture if there is one."""
    print(page)
    output = Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_{results['environment']['platform']}"
    (output / f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n")
    (output / f"{stem}.md").write_text(page + "\n")
    if figure is not None:
        figure.savefig(output / f"{stem}.png", dpi=120)
    print(f"written to {output / stem}.json and .md", file=sys.stderr)


def aggregation_table() -> None:
    """Measures all rows and the dense code, prints the tables and writes them."""
    rows = rows_of(ROWS)
    results: dict[str, Any] = {"environment": environment(), "ours": {}, "dense": {}}
    for row in rows:
        print(f"{row} ...", file=sys.stderr, flush=True)
        results["ours"][row] = worker(f"row:{row}")
    if _REFERENCE.value:
        names = [name for name in dict.fromkeys(ROWS[row][2] for row in rows) if name]
        if "flexlora" in rows:
            names += ["svd_by_qr"] * ("svd_by_qr" not in names) + ["svd_full"] * _FULL_SVD.value
            results["kinds"] = {"flexlora": worker("kinds:flexlora")}
        for name in names:
            print(f"dense {name} ...", file=sys.stderr, flush=True)
            results["dense"][name] = worker(f"dense:{name}")
    write("aggregation", results, report(results))


def report(results: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    facts = results["environment"]
    table = []
    for row, ours in results["ours"].items():
        reference = results["dense"].get(ROWS[row][2])
        mark = "~" if reference and reference["extrapolated"] else ""
        table.append(
            [
                row,
                f"{1e3 * ours['best_s']:.0f}",
                f"{ours['passes']:.1f}",
                f"{ours['first_call_s']:.1f}",
                f"{ours['grown_over_stacked']:.2f}",
                f"{ours['error']:.2g}",
                f"`{ROWS[row][2]}` {mark}{reference['best_s']:.3g} s" if reference else "",
                f"{mark}{reference['best_s'] / ours['best_s']:.3g}" if reference else "",
            ]
        )
    read = min(ours["read_pass_s"] for ours in results["ours"].values())
    size = next(iter(results["ours"].values()))["stacked_bytes"]
    lines = [
        "# Aggregation: speed and memory",
        "",
        f"{7 * facts['layers']} kernels of a Llama-3.2-1B, K = {facts['clients']}, r = "
        f"{facts['rank']}: {size / 1e9:.2f} GB of stacked factors in float32; one pass of reading "
        f"them takes {1e3 * read:.0f} ms. {facts['date']}, {facts['device']}, {facts['cores']} "
        f"cores, jax {facts['versions']['jax']}, torch {facts['versions']['torch']}, load average "
        f"{facts['load_average_at_start']} when it began.",
        "",
        tabulate(
            table,
            headers=[
                "function",
                "ms",
                "passes",
                "first call, s",
                "growth / factors",
                "error",
                "dense code",
                "times faster",
            ],
            tablefmt="github",
            colalign=("left", *["right"] * 7),
        ),
        "",
        "`ms`: best of the calls after the first, whole model. `passes`: that over one pass of "
        "reading. `growth`: most resident memory above the start, the result included. A tilde: "
        "multiplied up from one kernel of each kind, descents also from "
        f"{DENSE_STEPS} of {FULL_STEPS} steps.",
    ]
    if "kinds" in results:
        table = []
        for kind, ours in results["kinds"]["flexlora"].items():
            line = [kind, f"{1e3 * ours['best_s']:.1f}", f"{ours['error']:.6f}"]
            for name in ("svd_by_qr", "svd_lowrank", "svd_full"):
                if name in results["dense"]:
                    other = results["dense"][name]["kinds"][kind]
                    ratio = other["best_s"] / ours["best_s"]
                    line.append(
                        f"{1e3 * other['best_s']:.1f} ({ratio:.1f} x), {other['error']:.6f}"
                    )
            table.append(line)
        names = [n for n in ("svd_by_qr", "svd_lowrank", "svd_full") if n in results["dense"]]
        headers = ["one kernel", "flexlora, ms", "error", *(f"torch {n}: ms, error" for n in names)]
        lines += ["", tabulate(table, headers=headers, tablefmt="github", disable_numparse=True)]
    return "\n".join(lines)


def programs_table() -> None:
    """Measures the program of every method, prints the table and writes it."""
    results: dict[str, Any] = {"environment": environment(), "methods": {}}
    for name in rows_of(sorted(methods.REGISTRY)):
        print(f"{name} ...", file=sys.stderr, flush=True)
        results["methods"][name] = worker(f"program:{name}")
    write("programs", results, programs_report(results))


def programs_report(results: dict[str, Any]) -> str:
    """The table of programs, as Markdown."""
    facts = results["environment"]

    def gigabytes(size: int | None) -> str:
        return "" if size is None else f"{size / 1e9:.2f}"

    table = [
        [
            name,
            line["lines"],
            f"{line['trace_s']:.0f}",
            f"{line['compile_s']:.0f}",
            gigabytes(line["peak_bytes"]),
            gigabytes(line["held_bytes"]),
            gigabytes(line["working_bytes"]),
        ]
        for name, line in results["methods"].items()
    ]
    headers = ["method", "lines", "trace, s", "compile, s", "peak, GB", "held, GB", "working, GB"]
    lines = [
        "# Programs: size, and what compiling takes",
        "",
        f"A round on the shapes of a SmolLM2-135M with {facts['blocks']} blocks, "
        f"{7 * facts['blocks']} adapted kernels at r = {facts['rank']}, {facts['clients']} clients "
        f"one at a time. {facts['date']}, {facts['device']}, {facts['cores']} cores, jax "
        f"{facts['versions']['jax']}, load average {facts['load_average_at_start']} when it began.",
        "",
        tabulate(table, headers=headers, tablefmt="github", colalign=("left", *["right"] * 6)),
        "",
        "`lines`: of StableHLO. `peak`: most resident memory of the process that traced and "
        "compiled. `held`: state and data of the round; `working`: what it needs besides, as the "
        "compiler plans it.",
    ]
    return "\n".join(lines)


def memory_table() -> None:
    """Plans the memory of rounds, prints the table and writes it."""
    results: dict[str, Any] = {"environment": environment(), "rounds": []}
    for count, length in ((1, 128), (4, 128), (1, 512), (4, 512)):
        line: dict[str, Any] = {"clients": count, "length": length}
        for name in rows_of(LOSSES):
            print(f"{count} clients, {length} tokens, {name} ...", file=sys.stderr, flush=True)
            line[name] = worker(f"memory:{count},{length},{name}")["working_bytes"]
        results["rounds"].append(line)
    write("memory", results, memory_report(results))


def memory_report(results: dict[str, Any]) -> str:
    """The table of memory, as Markdown."""
    facts, rounds = results["environment"], results["rounds"]
    names = [name for name in LOSSES if name in rounds[0]]
    per_token = 4e-9 * programs.BATCH_SIZE * programs.SMOLLM2["vocab_size"]
    table = [
        [
            line["clients"],
            line["length"],
            f"{line['clients'] * (line['length'] - 1) * per_token:.2f}",
            *(f"{line[name] / 1e9:.2f}" for name in names),
        ]
        for line in rounds
    ]
    headers = ["clients", "tokens", "logits, GB", *(f"{name}, GB" for name in names)]
    lines = [
        "# Memory of a language model's round",
        "",
        f"A round of `fedit` on the shapes of a SmolLM2-135M with {facts['blocks']} blocks, all "
        f"linear layers adapted at r = {facts['rank']}, clients side by side, batches of "
        f"{programs.BATCH_SIZE} texts, float32. {facts['date']}, {facts['device']}, jax "
        f"{facts['versions']['jax']}.",
        "",
        tabulate(table, headers, tablefmt="github", colalign=["right"] * len(headers)),
        "",
        "What a round needs besides its state and data, as the compiler plans it. `logits`: the "
        "size of one array of those of all clients' batches. `whole`: they are kept; `chunked`: "
        "those of 128 tokens at a time, made again in the backward pass. `remat`: the blocks are "
        "computed again, too.",
    ]
    return "\n".join(lines)


def round_table() -> None:
    """Times rounds of both sides, prints the tables and writes them."""
    rows = rows_of([*rounds.CASES, "per_client"])
    missing = [name for name in ("torch", "transformers", "peft") if not find_spec(name)]
    if _REFERENCE.value and missing:
        raise app.UsageError(
            f"{', '.join(missing)} not installed: pip install 'fedlora-jax[parity]', or leave "
            "PyTorch out with --noreference"
        )
    try:
        chunks = rounds.sizes(_CHUNKS.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    # Processes share a GPU, where there is one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    results: dict[str, Any] = {"environment": environment(), "cases": {}, "per_client": {}}
    for row in rows:
        print(f"{row} ...", file=sys.stderr, flush=True)
        if row == "per_client":
            results[row] = rounds.measure_cohorts(_REPEATS.value)
        else:
            results["cases"][row] = rounds.measure(row, chunks, _REPEATS.value, _REFERENCE.value)
    write("round", results, rounds.report(results))


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
    print(f"writing images to {folder} ...", file=sys.stderr, flush=True)
    streaming.write(folder, size.clients * size.images)
    found = worker("streaming")
    write("streaming", {"environment": environment(), **found}, streaming_report(found))


def streaming_report(found: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    per_round = [
        [index, f"{seconds:.2f}", f"{waiting:.3f}", f"{100 * waiting / seconds:.1f}%"]
        for index, (seconds, waiting) in enumerate(
            zip(found["seconds"], found["seconds_waiting"], strict=True)
        )
    ]
    headers = ["round", "seconds", "waiting for data", "share"]
    bound = f"{found['memory'] / 1e9:.1f} GB" if found["memory"] else "anything"
    files, decoded, held = (
        f"{found[name] / 1e9:.2f} GB"
        for name in ("files_bytes", "decoded_bytes", "most_held_bytes")
    )
    return f"""# Images that do not fit the memory

{found["clients"]} clients with {found["images"]} JPEG files each of 224 x 224 pixels,
{found["cohort"]} clients and {found["images_a_round"]} images a round.
{found["images_in_all"]} files of {files}, decoded {decoded}; the process might hold {bound}
(`RLIMIT_DATA`), and held {held} at most. Trained on {found["device_of_training"]}.

Decoded alone: {found["decoded_a_second"]:.0f} images a second. After the first round, whose
images are read before it begins, the device waited {100 * found["share_waiting"]:.1f}% of the time.

{tabulate(per_round, headers=headers, tablefmt="github")}
"""


def clients_table() -> None:
    """Measures rounds against N and K, prints the table and writes it and a picture."""
    results: dict[str, Any] = {"environment": environment(), "points": []}
    for name in rows_of(clients.METHODS):
        for num_clients, cohort_size in clients.points():
            print(f"{name}, N = {num_clients}, K = {cohort_size} ...", file=sys.stderr, flush=True)
            point = worker(f"clients:{name},{num_clients},{cohort_size}")
            results["points"].append(point)
    write("clients", results, clients.page(results), clients.draw(results))


def mesh_table() -> None:
    """Counts what devices compute and send, prints the table and writes it."""
    results: dict[str, Any] = {"environment": environment(), "methods": {}}
    devices = {"JAX_NUM_CPU_DEVICES": str(mesh.DEVICES), "JAX_PLATFORMS": "cpu"}
    for name in rows_of(mesh.names()):
        print(f"{name} ...", file=sys.stderr, flush=True)
        results["methods"][name] = worker(f"mesh:{name}", **devices)
    write("mesh", results, mesh.page(results))


def tree_table() -> None:
    """Aggregates in trees, prints the table and writes it and a picture."""
    results: dict[str, Any] = {"environment": environment(), "methods": {}}
    for name in rows_of(tree.METHODS):
        seeds = results["methods"].setdefault(name, {})
        for seed in range(_SEEDS.value):
            print(f"{name}, seed {seed} ...", file=sys.stderr, flush=True)
            seeds[str(seed)] = worker(f"tree:{name},{seed}")
    write("tree", results, tree.page(results), tree.draw(results))


def growth_plot() -> None:
    """Measures growth with K and r, prints exponents, writes them and a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = {"environment": environment(), "growth": worker("growth:")}
    growth = results["growth"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, panel in zip(("K", "r"), panels, strict=True):
        at = growth[axis]["at"]
        for row, line in growth[axis].items():
            if row != "at":
                label = f"{row}: {axis}^{line['exponent']:.2g}"
                panel.loglog(at, [1e3 * s for s in line["seconds"]], marker="o", label=label)
        panel.set(xlabel=f"{axis} ({growth['fixed'][axis]})", xticks=at, xticklabels=at)
        panel.minorticks_off()
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms, one kernel 2048 x 2048")
    figure.tight_layout()
    output = Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    stem = f"growth_{results['environment']['platform']}"
    figure.savefig(output / f"{stem}.png", dpi=120)
    (output / f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n")
    table = [
        [row, *(growth[axis][row]["exponent"] for axis in "Kr")]
        for row in growth["K"]
        if row != "at"
    ]
    print(tabulate(table, headers=["function", "exponent in K", "exponent in r"]))
    print("Exponents are fitted to the upper half of the points.")


def main(argv: list[str]) -> None:
    """Runs what the command line asks for."""
    if _WORKER.value:
        kind, _, name = _WORKER.value.partition(":")
        if kind == "round":
            rounds.serve(**json.loads(name))
            return
        tasks: dict[str, Callable[[], dict[str, Any]]] = {
            "row": lambda: measure(name),
            "kinds": lambda: measure_kinds(name),
            "dense": lambda: measure_dense(name),
            "growth": measure_growth,
            "program": lambda: programs.measure(
                name, blocks=_BLOCKS.value, clients=_CLIENTS.value, rank=_RANK.value
            ),
            "memory": lambda: measure_memory(name),
            "streaming": measure_streaming,
            "clients": lambda: clients.measure(*clients.point_of(name)),
            "mesh": lambda: mesh.measure(name),
            "tree": lambda: tree.measure(*tree.task_of(name)),
        }
        print(json.dumps(tasks[kind]()))
        return
    commands = {
        "aggregation": aggregation_table,
        "clients": clients_table,
        "growth": growth_plot,
        "memory": memory_table,
        "mesh": mesh_table,
        "programs": programs_table,
        "round": round_table,
        "streaming": streaming_table,
        "tree": tree_table,
    }
    if len(argv) != 2 or argv[1] not in commands:
        raise app.UsageError(f"name one of: {', '.join(commands)}")
    commands[argv[1]]()


if __name__ == "__main__":
    app.run(main)
