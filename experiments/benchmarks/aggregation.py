"""Aggregation of all adapted kernels of a Llama-3.2-1B, beside dense code in PyTorch."""

import functools
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from fedlora_jax import Factors, aggregation


class Size(NamedTuple):
    """What is aggregated, and how often it is timed.

    Attributes:
      clients: K.
      rank: r.
      layers: Of the Transformer.
      seed: Of the adapters.
      repeats: Calls after the first one.
    """

    clients: int
    rank: int
    layers: int
    seed: int
    repeats: int


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
    "lora_fair sgd 1000 steps": ("lora_fair", {"units": "raw"}, "fair_sgd"),
    "flora_na": ("flora_na", {}, "flora_na_descent"),
    "fedsvd": ("fedsvd", {}, ""),
    "flexlora": ("flexlora", {}, "svd_lowrank"),
    "spectral": ("spectral", {}, "svd_by_qr"),
}
# Rows of functions that take one `a` of all clients.
COMMON_A = ("ffa_lora", "rolora", "fedsvd")
TREES = {"frlora": "initial", "fedrot_lora": "reference"}


def adapters(
    seed: int,
    count: int,
    rank: int,
    kernels: dict[str, tuple[int, int]],
    *,
    common_a: bool = False,
) -> Any:
    """Stacked adapters as training leaves them: a start in common, and clients of unequal size."""
    rng = np.random.default_rng(seed)
    tree = {}
    for name, (d_in, d_out) in kernels.items():
        a = rng.standard_normal((count, d_in, rank), dtype=np.float32)
        a = (0.0 if common_a else 0.5) * a + rng.standard_normal((d_in, rank), dtype=np.float32)
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
        self._start_peak = self._peak()
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

    @staticmethod
    def _peak() -> int:
        """The most that the accelerator has ever held, which it knows itself; 0 without one."""
        statistics_of_device = jax.devices()[0].memory_stats()
        return statistics_of_device["peak_bytes_in_use"] if statistics_of_device else 0

    def run(self) -> None:
        """Watches until it is stopped."""
        while not self._done.wait(0.003):
            self.most = max(self.most, self._now())

    def stop(self) -> int:
        """Bytes above the start."""
        self._done.set()
        self.join()
        if (peak := self._peak()) > self._start_peak:
            self.most = peak
        return self.most - self.start_bytes


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of several calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(row: str, size: Size) -> dict[str, Any]:
    """One row of the table, in this process."""
    count, rank, kernels = size.clients, size.rank, model(size.layers)
    stacked = adapters(size.seed, count, rank, kernels, common_a=row in COMMON_A)
    stacked_bytes = sum(x.nbytes for x in jax.tree.leaves(stacked))
    read = jax.jit(lambda tree: [jnp.sum(x) for x in jax.tree.leaves(tree)])
    pass_seconds = min(timed(lambda: read(stacked), 1 + size.repeats)[1:])
    call = bind(row, count, rank, kernels)
    memory = Memory()
    memory.start()
    first = timed(lambda: call(stacked), 1)[0]
    later = timed(lambda: call(stacked), size.repeats)
    grown = memory.stop()
    aggregated = call(stacked)
    error = aggregation.error(stacked, weights_of(count), aggregated)
    return {
        "first_call_s": first,
        "best_s": min(later),
        "median_s": statistics.median(later),
        "read_pass_s": pass_seconds,
        "passes": min(later) / pass_seconds,
        "stacked_bytes": stacked_bytes,
        "grown_bytes": grown,
        "grown_over_stacked": grown / stacked_bytes,
        "error": float(error),
    }


def measure_kinds(row: str, size: Size) -> dict[str, Any]:
    """The best time of one kernel of each kind, and its error, for comparison with dense code."""
    count, rank = size.clients, size.rank
    result = {}
    for kind, shape in distinct().items():
        stacked = adapters(size.seed, count, rank, {kind: shape})
        call = bind(row, count, rank, {kind: shape})
        call(stacked)
        seconds = min(timed(functools.partial(call, stacked), size.repeats))
        error = float(aggregation.error(stacked, weights_of(count), call(stacked)))
        result[kind] = {"best_s": seconds, "error": error}
    return result


def distinct() -> dict[str, tuple[int, int]]:
    """One kernel of each shape."""
    return {" x ".join(map(str, shape)): shape for shape in KERNELS.values()}


def how_many(shape: tuple[int, int], layers: int) -> int:
    """How many kernels of the model have this shape."""
    return list(KERNELS.values()).count(shape) * layers


def measure_dense(name: str, size: Size) -> dict[str, Any]:
    """Dense code on one kernel of each kind; the whole model is multiplied up from that.

    On the GPU, if there is one.
    """
    import torch

    from experiments.benchmarks import dense

    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_device(device)

    def tensors(node: Any) -> tuple[Any, ...]:
        return tuple(torch.from_numpy(np.array(x)).to(device) for x in node)

    def finished(result: Any) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    descent = name in ("fair_sgd", "flora_na_descent")
    count, rank = size.clients, size.rank
    function = getattr(dense, name)
    if descent:
        function = function(DENSE_STEPS)
    (p,) = tensors([weights_of(count) / weights_of(count).sum()])
    if name in ("means", "stacking"):  # a single kernel would stay in the cache
        tree = adapters(size.seed, count, rank, model(size.layers))
        pairs = [tensors(node) for node in tree.values()]
        del tree
        seconds = timed(lambda: finished([function(a, b, p) for a, b in pairs]), 1 + size.repeats)
        best = min(seconds[1:])
        return {"best_s": best, "extrapolated": ""}
    kinds, total = {}, 0.0
    for kind, shape in distinct().items():
        node = adapters(size.seed, count, rank, {kind: shape})[kind]
        a, b = tensors(node)
        finished(function(a, b, p))
        start_s, seconds = 0.0, []
        for _ in range(1 if name == "svd_full" else 3):
            start = time.perf_counter()
            result = finished(function(a, b, p))
            seconds.append(time.perf_counter() - start)
        best = min(seconds)
        if descent:
            start = time.perf_counter()
            finished(dense.mean_of_products(a, b, p))
            start_s = time.perf_counter() - start
            best = start_s + max(best - start_s, 0) * FULL_STEPS / DENSE_STEPS
        kinds[kind] = {"best_s": best}
        if not descent and isinstance(result, tuple):
            # In float64: torch's norm of as many float32 numbers is off in the fourth digit.
            ideal = dense.mean_of_products(a, b, p).double()
            distance = torch.linalg.norm(ideal - (result[0] @ result[1]).double())
            kinds[kind]["error"] = float(distance / torch.linalg.norm(ideal))
        total += best * how_many(shape, size.layers)
    return {
        "best_s": total,
        "extrapolated": "one kernel of each kind, times their number"
        + (f"; {DENSE_STEPS} steps of {FULL_STEPS}" if descent else ""),
        "kinds": kinds,
    }


def page(results: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    facts = results["environment"]
    table = []
    for row, ours in results["ours"].items():
        reference = results["dense"].get(ROWS[row][2])
        mark = "~" if reference and reference["extrapolated"] else ""
        table.append(
            [
                row,
                f"{1e3 * ours['best_s']:.3g}",
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
        f"{facts['rank']}: {size / 1e9:.3g} GB of stacked factors in float32; one pass of reading "
        f"them takes {1e3 * read:.3g} ms at best. {facts['date']}, {facts['device']}, "
        f"{facts['cores']} cores, jax {facts['versions']['jax']}, torch "
        f"{facts['versions']['torch']}, load average "
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
        "reading, timed beside it. `growth`: most memory above the start, the result and what "
        "compiling takes included. `error`: of `ffa_lora`, `rolora` and `fedsvd` with one `a` of "
        "all clients, which they need. A tilde: "
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
