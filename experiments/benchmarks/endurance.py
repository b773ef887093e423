"""Thousands of rounds of every method: finite, of one program, in memory that does not grow.

A row is a process of its own. `float32` and `bfloat16` are the type of the model's arithmetic, and
a row of theirs runs the compiled round that `experiment.run` runs, with the states of clients put
back by hand; a row `loop` is `experiment.run` itself, with metrics, checkpoints and states on disk.
"""

import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import psutil
from tabulate import tabulate

from experiments.benchmarks import clients
from fedlora_jax import experiment, methods
from fedlora_jax.experiment import records
from fedlora_jax.experiment.program import schedule
from fedlora_jax.experiment.state import first_state
from fedlora_jax.federated import cohort

ARITHMETIC = ("float32", "bfloat16")
LOOP = "loop"
# Of each kind one: no state, states on disk, a backbone that changes besides.
LOOPS = ("fedit", "fedsa_lora", "fedsmooth_lora")
NUM_CLIENTS, COHORT = 6, 3
# Memory is compared from the end of the first tenth on, and may grow by so much.
WARM, MOST = 10, 0.02
# Bytes that a checkpoint loses besides: tensorstore 0.1.86 keeps what `Spec.to_json`, which orbax
# calls for every array, and its metrics give to Python.
LOST = 60_000


class Memory(NamedTuple):
    """What is held: resident bytes of the process, and JAX's arrays, their number and bytes."""

    resident: int
    arrays: int
    array_bytes: int


def names() -> list[str]:
    """The rows, `METHOD:KIND`."""
    every = [f"{name}:{kind}" for name in sorted(methods.REGISTRY) for kind in ARITHMETIC]
    return every + [f"{name}:{LOOP}" for name in LOOPS]


def configuration(method: str, compute: str, rounds: int) -> ml_collections.ConfigDict:
    """Few clients, small steps of small models, as many rounds as are wanted."""
    config = clients.configuration(method, NUM_CLIENTS, COHORT)
    config.rounds = rounds
    config.clients_per_chunk = "all"
    config.model.options.update(width=16, num_heads=2)
    config.lora.rank = 2
    config.lora.targets = ("attention/query", "mlp/fc1")
    config.local.update(steps=1, schedule="cosine", learning_rate=5e-3)
    config.options.fedsmooth_lora.calibration_batches = 1
    config.precision.compute = compute
    return config


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One row, in this process.

    Seconds a round are medians over the end of the first tenth, and over the end of the run.
    """
    method, kind = name.split(":")
    config = configuration(method, ARITHMETIC[0] if kind == LOOP else kind, rounds)
    setting = clients.setting_of(config, NUM_CLIENTS)
    program = experiment.compile_program(config, setting)
    if kind == LOOP:
        return _loop(config, setting, program)
    return _rounds(config, setting, program)


def _loop(
    config: ml_collections.ConfigDict, setting: experiment.Setting, program: experiment.Program
) -> dict[str, Any]:
    memory: dict[int, Memory] = {}
    ends: list[float] = []

    def advance() -> None:
        ends.append(time.perf_counter())
        if len(ends) in (config.rounds // WARM, config.rounds):
            memory[len(ends)] = held()

    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory) / "run"
        rows = experiment.run(config, setting, program, workdir, advance)
        trained = records.load_trainable(workdir / "adapters.npz")
    judged = [row[name] for row in rows for name in config.metrics]
    excluded = sum(row["excluded_clients"] for row in rows)
    start = first_state(config, setting, program.method)
    programs = program.make_round(start.cohort_size).num_programs()
    finite = all(isinstance(x, float) for x in judged) and bool(np.isfinite(judged).all())
    finite = finite and _finite(trained)
    row = _result(finite, excluded, programs, memory, np.diff(ends).tolist())
    return row | {"checkpoints": config.rounds - config.rounds // WARM}


def _rounds(
    config: ml_collections.ConfigDict, setting: experiment.Setting, program: experiment.Program
) -> dict[str, Any]:
    start = first_state(config, setting, program.method)
    function, rate_of = program.make_round(None), schedule(config)
    seed = jax.random.key(config.seed)
    server, num_clients = start.server, len(start.ranks)
    states = jax.tree.map(lambda x: np.repeat(x[None], num_clients, axis=0), start.client)
    memory: dict[int, Memory] = {}
    finite, excluded, seconds = True, 0, []
    for index in range(config.rounds):
        began = time.perf_counter()
        chosen = np.asarray(
            cohort.sample(seed, index, num_clients=num_clients, cohort_size=start.cohort_size)
        )
        own = jax.tree.map(lambda x, who=chosen: jnp.asarray(x[who]), states)
        rest = (start.ranks, start.data, jnp.asarray(chosen), seed, jnp.float32(rate_of(index)))
        server, new, measured = function(server, own, *rest)
        for kept, values in zip(jax.tree.leaves(states), jax.tree.leaves(new), strict=True):
            kept[chosen] = values
        excluded += int(measured.excluded)
        finite = finite and bool(np.isfinite(measured.loss))
        seconds.append(time.perf_counter() - began)
        if index + 1 in (config.rounds // WARM, config.rounds):
            finite = finite and _finite((server, states))
            del own, new, measured, rest
            memory[index + 1] = held()
    return _result(finite, excluded, function.num_programs(), memory, seconds)


def held() -> Memory:
    """What this process holds, of what is not garbage."""
    gc.collect()
    arrays = jax.live_arrays()
    resident = psutil.Process().memory_info().rss
    return Memory(resident, len(arrays), sum(x.nbytes for x in arrays))


def _finite(tree: Any) -> bool:
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return all(bool(np.isfinite(x.astype(np.float32)).all()) for x in leaves)


def _result(
    finite: bool, excluded: int, programs: int, memory: dict[int, Memory], seconds: list[float]
) -> dict[str, Any]:
    some = max(1, len(seconds) // WARM // 2)
    first, last = (memory[index]._asdict() for index in sorted(memory))
    return {
        "finite": finite,
        "excluded": excluded,
        "programs": programs,
        "memory_early": first,
        "memory_late": last,
        "seconds_early": statistics.median(seconds[some : 2 * some]),
        "seconds_late": statistics.median(seconds[-some:]),
    }


def faults(row: dict[str, Any]) -> list[str]:
    """What is not as it has to be; nothing if all is well."""
    early, late = row["memory_early"], row["memory_late"]
    lost = row.get("checkpoints", 0) * LOST
    found = {
        "not finite": not row["finite"] or row["excluded"] > 0,
        "compiled again": row["programs"] != 1,
        "more arrays": any(late[x] > early[x] for x in ("arrays", "array_bytes")),
        "more memory": late["resident"] > (1 + MOST) * early["resident"] + lost,
    }
    return [fault for fault, there in found.items() if there]


def page(results: dict[str, Any]) -> str:
    """The table, as Markdown."""
    facts = results["environment"]
    table = []
    for name, row in results["rows"].items():
        early, late = row["memory_early"], row["memory_late"]
        method, kind = name.split(":")
        table.append(
            [
                method,
                kind,
                ", ".join(faults(row)) or "yes",
                row["programs"],
                f"{late['resident'] / 1e6:.0f}",
                f"{100 * (late['resident'] / early['resident'] - 1):+.2f}",
                late["arrays"] - early["arrays"],
                f"{1e3 * row['seconds_early']:.1f}",
                f"{1e3 * row['seconds_late']:.1f}",
            ]
        )
    headers = ["method", "arithmetic", "holds", "programs", "resident, MB", "grown, %"]
    headers += ["arrays more", "round early, ms", "round late, ms"]
    align = ["left", "left", "left", *["right"] * (len(headers) - 3)]
    rounds = results["rounds"]
    lines = [
        f"# {rounds:,} rounds of every method",
        "",
        f"A Vision Transformer of one block, width 16, r = 2, {COHORT} of {NUM_CLIENTS} clients a "
        "round, one step each, learning rate 5e-3 falling along a cosine. "
        f"{facts['date']}, {facts['device']}, {facts['cores']} cores, jax "
        f"{facts['versions']['jax']}, Python {facts['python']}, load average "
        f"{facts['load_average_at_start']} when it began.",
        "",
        tabulate(table, headers, tablefmt="github", colalign=align, disable_numparse=True),
        "",
        "`holds`: at the end all of the server's and the clients' state is finite, no client was "
        "left out in any round, one program was compiled, there are no more arrays than after "
        f"{rounds // WARM} rounds, and the process's resident memory is within {MOST:.0%} of what "
        f"it was then. `{LOOP}`: `experiment.run` in float32, with metrics, checkpoints and states "
        "on disk; the other rows are its compiled round alone. A checkpoint may lose "
        f"{LOST / 1e3:.0f} kB besides: tensorstore, with which orbax writes, keeps what it turns "
        "into JSON. Rounds are timed by the clock.",
    ]
    return "\n".join(lines)
