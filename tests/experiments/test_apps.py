"""What the programs share: whole rounds under signals, and jobs that several processes share."""

import os
import signal

import pytest

from experiments.shared import apps
from fedlora_jax import locks


def test_a_signal_waits_for_the_end_of_a_round():
    before = signal.getsignal(signal.SIGTERM)
    done = []
    with pytest.raises(SystemExit) as ended:
        with apps.progress_bar(3) as bar, apps.whole_rounds(bar) as advance:
            for index in range(3):
                if index == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                done.append(index)
                advance()
    assert done == [0, 1] and ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_does_not_wait():
    with pytest.raises(SystemExit):
        with apps.progress_bar(1) as bar, apps.whole_rounds(bar):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")


def test_work_that_another_process_does_comes_last(monkeypatch):
    monkeypatch.setattr(apps, "_PAUSE", 0.0)
    tried = []

    def do(job):
        tried.append(job)
        if job == "b" and tried.count("b") < 3:
            raise locks.Held("b is in use by somebody")
        return job.upper()

    assert apps.shared_work("abc", do) == {"a": "A", "b": "B", "c": "C"}
    assert tried == ["a", "b", "c", "b", "b"]
