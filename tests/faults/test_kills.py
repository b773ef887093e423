"""SIGKILL at random moments, also amid a checkpoint: the end is the same to the bit.

FAULTS_KILLS says how many over all methods, FAULTS_SECONDS after how long no further method begins.
"""

import os
import random
import signal
import time

import pytest

from fedlora_jax import methods
from tests.faults.runs import arguments, lines, outcome, wait_for

KILLS = int(os.environ.get("FAULTS_KILLS", "2"))
SECONDS = float(os.environ.get("FAULTS_SECONDS", "60"))
NAMES = sorted(methods.REGISTRY, key=lambda name: (name != "fedsa_lora", name))


@pytest.fixture(scope="module")
def began():
    return time.monotonic()


def kills_of(name):
    """The kills of a method, of all that there are."""
    return range(NAMES.index(name), KILLS, len(NAMES))


def unfinished(workdir):
    """The checkpoints that are being written, or were when a run was killed."""
    return {path.stat().st_ino for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")}


@pytest.mark.parametrize("method", [name for name in NAMES if kills_of(name)])
def test_a_killed_run_ends_as_one_that_was_not(program, began, tmp_path, method):
    if time.monotonic() - began > SECONDS:
        pytest.skip("no time is left")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    every = f"--config.checkpoint_every={1 + NAMES.index(method) % 2}"
    command = program.start("train", *arguments(program, method, whole, every))
    assert wait_for(command, lambda: lines(whole))
    started = time.monotonic()
    code, _, err = command.wait()
    assert code == 0, err
    taken = time.monotonic() - started
    for kill in kills_of(method):
        moment = random.Random(kill)
        known, before = lines(killed), unfinished(killed)
        command = program.start("train", *arguments(program, method, killed, every))
        if kill % 2:
            there = wait_for(command, lambda before=before: unfinished(killed) - before)
        else:
            there = wait_for(command, lambda known=known: lines(killed) > known)
        time.sleep(moment.uniform(0, 0.02 if kill % 2 else taken))
        command.process.kill()
        assert command.wait()[0] in (-signal.SIGKILL, 0) or not there
    code, _, err = program.run("train", *arguments(program, method, killed, every))
    assert code == 0, err
    assert outcome(killed) == outcome(whole)
    assert not (killed / "damaged").exists()
