"""One run on two hosts of two devices each, over loopback, beside the same run on one device."""

import json
import socket

import numpy as np


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def numbers(row, name):
    return np.array(row[name], float)


def test_two_hosts_find_what_one_device_finds_and_it_goes_on_alone(program, tmp_path, monkeypatch):
    def arguments(workdir, rounds):
        return [
            f"--config={program.config}:method=fedsa_lora",
            f"--workdir={tmp_path / workdir}",
            f"--config.rounds={rounds}",
            "--config.clients_per_round=6",
            "--config.local.schedule=constant",
            "--config.clients_per_chunk=all",
        ]

    code, _, err = program.run("train", *arguments("alone", 3))
    assert code == 0, err
    port = free_port()
    monkeypatch.setitem(program.environment, "JAX_NUM_CPU_DEVICES", "2")
    hosts = [
        program.start(
            "train",
            *arguments("together", 2),
            "--config.mesh.clients=4",
            f"--coordinator=127.0.0.1:{port}",
            "--num_hosts=2",
            f"--host={host}",
        )
        for host in range(2)
    ]
    said = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert "report.md" in said[0][0] and "report.md" not in said[1][0]
    # What four devices wrote is read on one.
    monkeypatch.setitem(program.environment, "JAX_NUM_CPU_DEVICES", "1")
    code, _, err = program.run("train", *arguments("together", 3))
    assert code == 0, err
    alone, together = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("alone", "together")
    )
    assert len(alone) == len(together) == 3
    for one, other in zip(alone, together, strict=True):
        assert one["cohort"] == other["cohort"]
        for name in ("loss", "client_loss", "client_accuracy", "megabytes_up"):
            np.testing.assert_allclose(numbers(one, name), numbers(other, name), rtol=1e-5)
