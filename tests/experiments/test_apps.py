"""What the programs share: answers to mistakes, whole rounds under signals, shared jobs."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver
from ml_collections import config_flags

from configs import digits, linear
from experiments.shared import apps
from fedlora_jax import locks
from fedlora_jax.checksums import Damaged
from tests.experiments.commands import ROOT

CONFIG = f"--config={digits.__file__}"


@pytest.fixture
def values(monkeypatch):
    """Makes these arguments those of the program; its flags, of which none is parsed yet."""

    def make(*arguments):
        made = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=made)
        monkeypatch.setattr(flags, "FLAGS", made)
        monkeypatch.setattr("sys.argv", ["program", *arguments])
        return made

    return make


@pytest.fixture
def answer(values):
    """The last words of a program with these arguments."""

    def parse(*arguments):
        values(*arguments)
        with pytest.raises(SystemExit) as ended:
            apps._parse(["program", *arguments])
        return ended.value.code

    return parse


@pytest.mark.parametrize("ended", [False, True])
def test_a_trace_has_the_rounds_after_the_first_that_is_run(tmp_path, ended):
    """Of which three are found finished, and the last may be missing."""
    work = [jax.jit(function) for function in (jnp.sin, jnp.cos, jnp.tan, jnp.tanh)]
    finished = []
    with apps.traced(2, tmp_path, lambda: finished.append(1)) as (begin, advance):
        for _ in range(3):
            advance()
        begin()
        for function in work[: 3 if ended else 4]:
            function(jnp.ones(3)).block_until_ready()
            advance()
    assert len(finished) == 3 + (3 if ended else 4)
    (path,) = tmp_path.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    seen = {
        dict(event.stats).get("hlo_module")
        for plane in planes
        for line in plane.lines
        for event in line.events
    }
    assert {"jit_cos", "jit_tan"} <= seen
    assert not {"jit_sin", "jit_tanh"} & seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [CONFIG, "--config.local.learning_rat=1"],
            "error: unknown field of config.local: 'learning_rat'. Did you mean 'learning_rate'?",
        ),
        (["--config", digits.__file__, "--config.roundz", "3"], "Did you mean 'rounds'?"),
        ([CONFIG, "--config.rounds.more=3"], "config.rounds is no group of fields"),
        ([CONFIG, "--config.rounds=x"], "error: flag --config.rounds=x: invalid literal"),
        (
            [CONFIG + ":methd=fedit"],
            "error: unknown config argument 'methd'. Did you",
        ),
        (["--config=nowhere.py", "--config.rounds=3"], "nowhere.py"),
        ([CONFIG, "--confg.rounds=3"], "error: Unknown command line flag 'confg.rounds'"),
    ],
)
def test_a_mistake_is_one_line(answer, arguments, message):
    said = answer(*arguments)
    assert message in said and said.startswith("error: ") and "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file", "x/y"), "x/y: No such file"),
        (FileExistsError(17, "File exists", "x"), "x: File exists: a directory is wanted"),
        (ValueError("plain"), "plain"),
    ],
)
def test_reasons(error, message):
    assert apps._reason(error) == message


@pytest.mark.parametrize(
    ("given", "several_hosts", "message"),
    [
        ({"num_hosts": 2, "host": 1}, True, "--num_hosts=2 and --host=1 .* --coordinator must say"),
        ({"host": 1}, True, "--coordinator must say"),
        ({"num_hosts": 2}, False, "runs on one host: leave out --coordinator, --num_hosts and"),
        ({"coordinator": "auto"}, False, "runs on one host"),
    ],
)
def test_none_of_several_hosts_trains_alone(given, several_hosts, message):
    with flagsaver.flagsaver(**given), pytest.raises(ValueError, match=message):
        apps._join(several_hosts)


@pytest.mark.parametrize(
    ("coordinator", "host", "message"),
    [
        ("node0", 0, "--coordinator must be address:port, or auto; got 'node0'"),
        (":1234", 0, "address:port"),
        ("node0:port", 0, "address:port"),
        ("node0:1234", 2, "--host must be less than --num_hosts=2, got 2"),
        ("auto", 0, "knows no cluster here .*defined.*; give --coordinator=address:port"),
    ],
)
def test_what_no_host_can_join_is_said(coordinator, host, message, monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(apps.hosts.jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=message):
        apps.hosts.join(coordinator, 2, host)


def test_one_host_needs_no_coordinator():
    apps._join(True)
    apps._join(False)


@pytest.fixture
def given(values):
    """The configuration of a program with these arguments."""

    def parse(*arguments):
        made = values(*arguments)
        made(["program", *arguments])
        return made.config

    return parse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([CONFIG, "--config.seed=7"], "config.seed is 7, but --seeds=3 runs the seeds 0 to 2"),
        ([CONFIG + ":method=flora"], "config.method is 'flora', but --methods names fedit, local"),
        ([CONFIG + ":runlocal,method=flora"], "config.method is 'flora'"),
        ([CONFIG, "--config.method=flora"], "config.method is 'flora'"),
    ],
)
def test_a_method_or_seed_that_would_not_run_is_refused(given, arguments, message):
    config = given(*arguments)
    with pytest.raises(ValueError, match=message):
        apps.check_asked(config, ["fedit", "local"], 3)
    apps.check_asked(config, ["fedit", "flora"], 8)


def test_what_a_configuration_has_by_default_is_not_asked_for(given):
    apps.check_asked(given(CONFIG, "--config.seed=0"), ["local"], 1)


def test_a_configuration_is_for_some_programs():
    federation, regression = digits.get_config(), linear.get_config()
    apps.check_made_for("linear", regression)
    apps.check_made_for("train", federation)
    with pytest.raises(ValueError, match="is one of experiments.linear, not of experiments.train"):
        apps.check_made_for("train", regression)
    with pytest.raises(ValueError, match="experiments.linear wants one like configs/linear.py"):
        apps.check_made_for("linear", federation)


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_waits_for_the_end_of_a_round(times):
    """`timeout` sends it twice, to the program and to its group."""
    before = signal.getsignal(signal.SIGTERM)
    done = []
    with pytest.raises(SystemExit) as ended:
        with apps.progress_bar(3) as bar, apps.whole_rounds(bar) as advance:
            for index in range(3):
                if index == 1:
                    for _ in range(times):
                        os.kill(os.getpid(), signal.SIGTERM)
                done.append(index)
                advance()
    assert done == [0, 1] and ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_does_not_wait_for_compiled_code(number, status):
    """Here a minute or more of it, during which Python calls no handler."""
    code = """
import hashlib, signal
from experiments.shared import apps
# What a shell starts in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
with apps.progress_bar(1) as bar, apps.whole_rounds(bar):
    print("began", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "began\n"
            time.sleep(1)
            end = time.monotonic() + 20
            while process.poll() is None and time.monotonic() < end:
                process.send_signal(number)
                time.sleep(0.2)
            assert process.poll() == status
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("error", "goes_on"),
    [
        (ValueError("rank 40 is impossible"), [False, True]),
        (Damaged("no checkpoint can be used"), [True, True]),
        (OSError("the disk is full"), [True, True]),
        (locks.Held("in use"), [False, False]),
    ],
)
def test_of_an_error_of_one_run_others_go_on(error, goes_on, monkeypatch):
    assert [apps.is_of_one_run(error, first=first) for first in (True, False)] == goes_on
    monkeypatch.setattr(apps.hosts, "are_several", lambda: True)
    assert not apps.is_of_one_run(error, first=False)


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
