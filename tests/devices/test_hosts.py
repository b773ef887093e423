"""One run on two hosts of two devices each, over loopback, beside the same run on one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
CONFIG = """
from pathlib import Path

from tests.tiny import tiny_digits

def get_config(arg=None):
    config = tiny_digits(Path({directory!r}), arg)
    config.clients_per_round = 6
    config.lora.rank = 2
    config.local.schedule = "constant"
    return config
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def numbers(row, name):
    return np.array(row[name], float)


def train(directory, workdir, rounds, devices, *arguments):
    """Starts `experiments.train` with so many devices."""
    command = [
        *(sys.executable, "-m", "experiments.train"),
        f"--config={directory / 'tiny.py'}:method=fedsa_lora",
        f"--config.rounds={rounds}",
        f"--workdir={directory / workdir}",
        *arguments,
    ]
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "FEDLORA_DATA_DIR": str(directory / "data"),
    }
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process):
    """What it said, when it is done."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return out


def test_two_hosts_find_what_one_device_finds_and_it_goes_on_alone(tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG.format(directory=str(tmp_path)))
    finish(train(tmp_path, "alone", 3, 1))
    shared = ("--config.mesh.clients=4", f"--coordinator=127.0.0.1:{free_port()}", "--num_hosts=2")
    hosts = [train(tmp_path, "together", 2, 2, *shared, f"--host={i}") for i in range(2)]
    said = [finish(host) for host in hosts]
    assert "report.md" in said[0] and "report.md" not in said[1]
    # What four devices wrote is read on one.
    finish(train(tmp_path, "together", 3, 1))
    alone, together = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("alone", "together")
    )
    assert len(alone) == len(together) == 3
    for one, other in zip(alone, together, strict=True):
        assert one["cohort"] == other["cohort"]
        for name in ("loss", "client_loss", "client_accuracy", "megabytes_up"):
            np.testing.assert_allclose(numbers(one, name), numbers(other, name), rtol=1e-5)
