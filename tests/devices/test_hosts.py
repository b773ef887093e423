"""Runs on two hosts of two devices each, over loopback, beside the same run on one device."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """
from pathlib import Path

from tests.tiny import tiny_digits

def get_config(arg=None):
    config = tiny_digits(Path({directory!r}), arg)
    config.clients_per_round = 6
    config.lora.rank = 2
    config.local.schedule = "constant"
    config.faults.kind = "dropout"
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


def finish(process, status=0):
    """What it said, when it is done."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == status, err
    return out + err


def pair(directory, workdirs, *arguments, mesh=(4, 1)):
    """Two hosts that run together, on a mesh of so many devices along clients and model."""
    shared = [f"--config.mesh.{axis}={n}" for axis, n in zip(("clients", "model"), mesh)]
    shared += (f"--coordinator=127.0.0.1:{free_port()}", "--num_hosts=2")
    return [
        train(directory, workdir, 2, 2, *shared, f"--host={i}", *arguments)
        for i, workdir in enumerate(workdirs)
    ]


@pytest.fixture
def directory(tmp_path):
    """Where runs are, with their configuration."""
    (tmp_path / "tiny.py").write_text(CONFIG.format(directory=str(tmp_path)))
    return tmp_path


def test_two_hosts_find_what_one_device_finds_and_it_goes_on_alone(directory):
    """One round, ended by a signal to one of them; one of images that are read; one alone.

    One client of six drops out. The first host also pretrains the backbone, which is split for the
    second round.
    """
    hosts = pair(directory, ["together"] * 2)
    while not (directory / "together" / "config.json").exists():
        assert all(host.poll() is None for host in hosts), [finish(host) for host in hosts]
        time.sleep(0.05)
    # Before the first round is compiled: that one is finished.
    hosts[1].send_signal(signal.SIGTERM)
    assert all("terminated after a whole round" in finish(host, 143) for host in hosts)
    assert len((directory / "together" / "metrics.jsonl").read_text().splitlines()) == 1
    # Each has written the states of its own clients.
    files = sorted(path.name for path in (directory / "together" / "clients").iterdir())
    assert files == ["000000.1.npy", "000000.npy"]
    hosts = pair(directory, ["together"] * 2, "--config.data.streaming=True", mesh=(2, 2))
    said = [finish(host) for host in hosts]
    assert "report.md" in said[0] and "report.md" not in said[1]
    # What four devices wrote is read on one.
    finish(train(directory, "together", 3, 1))
    finish(train(directory, "alone", 3, 1))
    alone, together = (
        [json.loads(line) for line in (directory / name / "metrics.jsonl").open()]
        for name in ("alone", "together")
    )
    assert len(alone) == len(together) == 3
    assert "seconds_waiting" in together[1] and "seconds_waiting" not in together[2]
    for one, other in zip(alone, together, strict=True):
        assert one["cohort"] == other["cohort"]
        assert one["absent_clients"] == other["absent_clients"] == 1
        for name in ("loss", "client_loss", "client_accuracy", "megabytes_up"):
            np.testing.assert_allclose(numbers(one, name), numbers(other, name), rtol=1e-5)


def test_what_one_host_cannot_do_ends_both_with_a_message(directory):
    """A work directory that the second one cannot write: the first one does not wait for it."""
    (directory / "file").write_text("")
    said = [finish(host, 1) for host in pair(directory, ["fine", "file/below"])]
    assert "another host cannot go on" in said[0] and "file" in said[1]
    assert not (directory / "fine" / "metrics.jsonl").exists()
