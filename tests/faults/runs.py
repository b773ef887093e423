"""Runs of `experiments.train`, and what they have come to, to the bit."""

import json
import time

import jax
import numpy as np

from fedlora_jax.experiment import records


def arguments(program, method, workdir, *more):
    return (f"--config={program.config}:method={method}", f"--workdir={workdir}", *more)


def outcome(workdir):
    """The metrics but for seconds, the final adapters, and the newest states of clients."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = records.load_trainable(workdir / "adapters.npz")
    files = (workdir / "clients").glob("*.npy")
    return (
        [{name: x for name, x in row.items() if name != "seconds"} for row in rows],
        [np.asarray(x).tobytes() for x in jax.tree.leaves(trained)],
        {path.name: path.read_bytes() for path in files},
    )


def wait_for(command, condition, seconds=120.0):
    """Until the condition holds; False if the program ends before."""
    end = time.monotonic() + seconds
    while not _holds(condition):
        if not command.process.is_alive():
            return False
        assert time.monotonic() < end, command.wait(1)
        time.sleep(0.002)
    return True


def _holds(condition):
    try:
        return condition()
    except FileNotFoundError:  # It was there a moment ago.
        return False


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
