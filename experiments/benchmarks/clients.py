"""Whole rounds of the experiment loop against the number of clients, N, and the cohort's, K.

A point is a run of `experiment.run`, in a process of its own: cohort, states from and to disk,
training, metrics with a panel, checkpoint. Of small images and a small Vision Transformer, with
random weights, since speed and memory know nothing of what is learned.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from tabulate import tabulate

from configs import digits
from experiments.benchmarks.programs import peak_bytes
from fedlora_jax import experiment, models
from fedlora_jax.data import images, sources
from fedlora_jax.experiment import Setting
from fedlora_jax.federated.task import Batch, classification

METHODS = ("fedit", "fedsa_lora", "fedsmooth_lora")
NUM_CLIENTS = (100, 10_000, 100_000, 1_000_000)
COHORTS = (16, 256, 2_048, 10_000)
# Where the other of the two varies.
FIXED_COHORT, FIXED_CLIENTS = 16, 100_000
CHUNK = 16
EXAMPLES_PER_CLIENT = 2
HELD_OUT = 200
# The first round compiles, and is told apart.
ROUNDS = 5


def points() -> list[tuple[int, int]]:
    """The pairs (N, K) that are measured, each once."""
    over_clients = [(number, FIXED_COHORT) for number in NUM_CLIENTS]
    over_cohorts = [(FIXED_CLIENTS, size) for size in COHORTS]
    return list(dict.fromkeys(over_clients + over_cohorts))


def point_of(text: str) -> tuple[str, int, int]:
    """Method, N and K of `fedit,100,16`."""
    method, num_clients, cohort_size = text.split(",")
    return method, int(num_clients), int(cohort_size)


def configuration(method: str, num_clients: int, cohort_size: int) -> ml_collections.ConfigDict:
    """The demo with a smaller model, few steps and equally many examples for each client."""
    config = digits.get_config(f"method={method}")
    config.rounds = ROUNDS
    config.clients_per_round = cohort_size
    config.clients_per_chunk = str(CHUNK)
    config.data.partition = "iid"
    with config.data.unlocked():
        config.data.partition_options = {"num_clients": num_clients}
    config.model.options.update(width=32, depth=1, num_heads=2)
    config.local.update(steps=2, batch_size=EXAMPLES_PER_CLIENT, schedule="constant")
    return config


def setting_of(config: ml_collections.ConfigDict, num_clients: int) -> Setting:
    """Digits of 8 x 8 pixels, repeated until every client has its own, and random weights."""
    train, domains = experiment.training_examples(config)
    some = slice(None, None, 1_200 // HELD_OUT)
    test = {name: x[some] for name, x in sources.load("digits_domains", "test").items()}
    test = {name: test[name] for name in train}
    chosen = np.resize(np.arange(len(train["label"])), EXAMPLES_PER_CLIENT * num_clients)
    train, test = ({**each, "image": each["image"][:, ::2, ::2]} for each in (train, test))
    model = models.get(config.model.name, **config.model.options)

    def inputs(batch: Batch) -> tuple[jax.Array, ...]:
        return (images.normalize(batch["image"], statistics=config.data.statistics),)

    first = inputs({"image": jnp.asarray(train["image"][:1])})
    params = model.init(jax.random.key(0), *first)["params"]
    task = classification(model, inputs, config.metrics)
    return Setting(task, params, {k: v[chosen] for k, v in train.items()}, test, domains)


def measure(method: str, num_clients: int, cohort_size: int) -> dict[str, Any]:
    """One point, in this process, of which the peak memory is.

    Seconds are medians over the rounds after the first, and those called `cpu` are of processor
    time of all threads, which other work on the machine does not lengthen. `train_s` is from
    reading the states of a cohort to having the new ones on the host, `evaluate_cpu_s` the metrics
    of models; `start_cpu_s` is all before the second round but one round: partition, first state,
    data, tracing, compilation.
    """
    config = configuration(method, num_clients, cohort_size)
    setting = setting_of(config, num_clients)
    before = peak_bytes()
    program = experiment.compile_program(config, setting)
    ends: list[tuple[float, float]] = []
    judged: list[float] = []

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def evaluate(*arguments: Any) -> Any:
        began = time.process_time()
        found = program.evaluate(*arguments)
        judged.append(time.process_time() - began)
        return found

    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory) / "run"
        began = time.process_time()
        rows = experiment.run(
            config,
            setting,
            program._replace(evaluate=evaluate),
            workdir,
            advance=lambda: ends.append(now()),
        )
        round_s, round_cpu_s = np.median(np.diff(ends, axis=0), axis=0).tolist()
        return {
            "method": method,
            "num_clients": num_clients,
            "cohort_size": cohort_size,
            "round_s": round_s,
            "round_cpu_s": round_cpu_s,
            "train_s": statistics.median(row["seconds"] for row in rows[1:]),
            "evaluate_cpu_s": statistics.median(judged[1:]),
            "start_cpu_s": ends[0][1] - began - round_cpu_s,
            "peak_bytes": peak_bytes(),
            "before_bytes": before,
            "data_bytes": sum(x.nbytes for x in setting.train.values()),
            "checkpoint_bytes": _size(workdir / "checkpoints" / str(ROUNDS)),
            "states_bytes": _size(workdir / "clients") // ROUNDS,
            "partition_bytes": (workdir / "partition.json").stat().st_size,
        }


def _size(directory: Path) -> int:
    """Bytes of all files below a directory; 0 if there is none."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def page(results: dict[str, Any]) -> str:
    """The table, as Markdown."""
    facts = results["environment"]
    table = [
        [
            point["method"],
            f"{point['num_clients']:,}",
            f"{point['cohort_size']:,}",
            f"{point['round_cpu_s']:.2f}",
            f"{1e3 * point['round_cpu_s'] / point['cohort_size']:.1f}",
            f"{point['evaluate_cpu_s']:.2f}",
            f"{point['round_s']:.2f}",
            f"{point['start_cpu_s']:.0f}",
            f"{point['peak_bytes'] / 1e9:.2f}",
            f"{point['data_bytes'] / 1e6:.1f}",
            f"{point['states_bytes'] / 1e6:.2f}",
            f"{point['checkpoint_bytes'] / 1e6:.2f}",
        ]
        for point in results["points"]
    ]
    headers = [
        "method",
        "N",
        "K",
        "round, s",
        "a client, ms",
        "of it metrics, s",
        "round by the clock",
    ]
    headers += ["start, s", "peak, GB", "data, MB", "states, MB", "checkpoint, MB"]
    align = ["left", *["right"] * (len(headers) - 1)]
    lines = [
        "# Rounds against the number of clients",
        "",
        "Whole rounds of `experiment.run`: a Vision Transformer of one block, width 32, r = 4, two "
        f"steps of {EXAMPLES_PER_CLIENT} images a client, {CHUNK} clients at once, each client "
        f"{EXAMPLES_PER_CLIENT} images of its own; {HELD_OUT} held-out images, a panel of 128. "
        f"{facts['date']}, {facts['device']}, {facts['cores']} cores, jax "
        f"{facts['versions']['jax']}, load average {facts['load_average_at_start']} when it began.",
        "",
        tabulate(table, headers, tablefmt="github", colalign=align, disable_numparse=True),
        "",
        "Seconds are of processor time, of all threads, medians over the rounds after the first; "
        "other work on the machine lengthens only those by the clock. `start`: once a run, with "
        "reading, the partition, the first state and compilation. `peak`: most resident memory of "
        "the process, with all its libraries. `data`: the training images, which are in it twice, "
        "on the host and on the device. `states`: the file of a round with the states of its "
        "clients. `checkpoint`: the server's state.",
    ]
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> Any:
    """Time and memory against N and against K, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 6), sharex="col", sharey="row")
    columns = (
        ("num_clients", "cohort_size", FIXED_COHORT, "N (K = {:,})"),
        ("cohort_size", "num_clients", FIXED_CLIENTS, "K (N = {:,})"),
    )
    values = (("round_cpu_s", 1, "round, s of processor"), ("peak_bytes", 1e-9, "peak memory, GB"))
    for column, (axis, other, fixed, label) in enumerate(columns):
        for row, (value, unit, title) in enumerate(values):
            panel = panels[row][column]
            for method in dict.fromkeys(point["method"] for point in results["points"]):
                mine = sorted(
                    (point[axis], point[value] * unit)
                    for point in results["points"]
                    if point["method"] == method and point[other] == fixed
                )
                panel.plot(*zip(*mine, strict=True), marker="o", label=method)
            panel.set(xscale="log", yscale="linear" if row else "log")
            panel.grid(alpha=0.3)
            if not column:
                panel.set_ylabel(title)
        panels[1][column].set_xlabel(label.format(fixed))
    panels[0][0].legend(loc="upper left")
    panels[1][0].set_ylim(bottom=0)
    figure.tight_layout()
    return figure
