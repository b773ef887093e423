"""The command `experiments.aggregate`, from the outside and in its parts."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import aggregate
from fedlora_jax import Factors
from fedlora_jax.interop import peft

ROOT = Path(__file__).parents[2]


def run(*arguments):
    """As a user does, so that this one also finds what it needs to start."""
    command = [sys.executable, "-m", "experiments.aggregate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_command(program, tmp_path):
    for seed in range(2):
        rng = np.random.default_rng(seed)
        adapters = {
            f"layers.{i}.q_proj": Factors(rng.normal(size=(8, 2)), rng.normal(size=(2, 6)))
            for i in range(3)
        }
        peft.save(tmp_path / f"client_{seed}", adapters, scale=seed + 1.0)
    clients = f"--adapters={tmp_path}/client_0,{tmp_path}/client_1"
    code, _, err = program.run("aggregate", clients, f"--out={tmp_path}/out")
    assert code == 1 and "the scale is 1 (alpha 2, r 2)" in err
    assert "Traceback" not in err
    code, _, err = program.run("aggregate", clients, f"--out={tmp_path}/client_1", "--rescale")
    assert code == 1 and "client_1: choose another directory" in err

    done = run(
        clients,
        f"--out={tmp_path}/out",
        "--weights=1,2",
        "--method=lora_fair",
        "--set=similarity=frobenius",
        "--set=solver=closed_form",
        "--rescale",
    )
    assert done.returncode == 0, done.stderr
    assert "lora_fair of 2 clients: 3 layers of rank 2, scale 1, error 0." in done.stdout
    assert len(peft.load(tmp_path / "out").adapters) == 3
    numbers = json.loads((tmp_path / "out" / "aggregation.json").read_text())
    assert numbers["options"] == {"similarity": "frobenius", "solver": "closed_form"}
    assert len(numbers["layers"]["layers.0.q_proj"]["singular_values"]) == 2


def test_parsing():
    assert aggregate.parse_weights(None, 2) == [1.0, 1.0]
    with pytest.raises(ValueError, match="--adapters names 2 checkpoints, --weights has 1"):
        aggregate.parse_weights(["1"], 2)
    with pytest.raises(ValueError, match="--weights=1,x: expected numbers"):
        aggregate.parse_weights(["1", "x"], 2)
    options = aggregate.parse_options(["steps=3", "solver=als", "shared=True"])
    assert options == {"steps": 3, "solver": "als", "shared": True}
    with pytest.raises(ValueError, match="--set steps: expected name=value"):
        aggregate.parse_options(["steps"])


def test_measures_of_a_spectrum():
    assert aggregate.effective_rank(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert aggregate.rank_of_energy(np.array([10.0, 1.0, 0.1]), 0.99) == 1
    assert aggregate.rank_of_energy(np.array([1.0, 1.0, 1.0]), 0.99) == 3
