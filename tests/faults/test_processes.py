"""Signals, full disks, directories that cannot be written, and two processes at once."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from tests.experiments.commands import ROOT
from tests.faults.runs import arguments, lines, outcome, wait_for

METHOD = "fedsa_lora"
LONG = "--config.rounds=40"


@pytest.fixture(scope="session")
def whole(program, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    code, _, err = program.run("train", *arguments(program, METHOD, workdir))
    assert code == 0, err
    return outcome(workdir)


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGINT, 130, "interrupted; the same command goes on"),
        (signal.SIGTERM, 143, "terminated after a whole round"),
    ],
)
def test_a_signal_ends_with_one_line_and_nothing_lost(
    program, tmp_path, whole, number, code, message
):
    run = tmp_path / "run"
    options = ("--config.local.schedule=constant", "--config.local.learning_rate=0.01")
    command = program.start("train", *arguments(program, METHOD, run, LONG, *options))
    assert wait_for(command, lambda: lines(run) >= 2)
    os.kill(command.process.pid, number)
    ended, _, err = command.wait()
    assert ended == code and message in err and len(err.splitlines()) == 1, err
    if number == signal.SIGTERM:
        saved = max(int(x.name) for x in (run / "checkpoints").iterdir() if x.name.isdecimal())
        assert saved == lines(run) < 40


def test_a_full_disk_ends_with_a_message_and_the_run_goes_on_when_there_is_room(
    program, tmp_path, whole
):
    run = tmp_path / "run"
    command = program.start("train", *arguments(program, METHOD, run))
    assert wait_for(command, lambda: lines(run) >= 1)
    resource.prlimit(command.process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    code, _, err = command.wait()
    assert code == 1 and "error:" in err and len(err.splitlines()) < 25, err
    code, _, err = program.run("train", *arguments(program, METHOD, run))
    assert code == 0, err
    assert outcome(run) == whole


def test_two_comparisons_at_once_share_the_runs_and_say_the_same(program, tmp_path):
    arguments = (
        *(f"--config={program.config}", f"--workdir={tmp_path}"),
        *("--methods=fedit,local", "--seeds=2"),
    )
    both = [program.start("compare", *arguments) for _ in range(2)]
    ended = [command.wait() for command in both]
    for code, _, err in ended:
        assert code == 0, err
    assert any("in use by process" in err for *_, err in ended)
    for name in ("fedit", "local"):
        assert all(lines(tmp_path / name / f"seed_{seed}") == 4 for seed in range(2))


def test_two_first_starts_make_one_backbone(program, tmp_path):
    backbones = f"--config.backbone_dir={tmp_path / 'backbones'}"
    both = [
        program.start("train", *arguments(program, METHOD, tmp_path / str(i), backbones))
        for i in range(2)
    ]
    ended = [command.wait() for command in both]
    for code, _, err in ended:
        assert code == 0, err
    assert outcome(tmp_path / "0") == outcome(tmp_path / "1")


@pytest.mark.parametrize("which", ["workdir", "backbones"])
def test_a_read_only_directory_is_named_before_any_work(program, tmp_path, which):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    workdir = locked / "run" if which == "workdir" else tmp_path / "run"
    backbones = locked / "backbones" if which == "backbones" else tmp_path / "backbones"
    unprivileged = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("the superuser may write everywhere")
    done = subprocess.run(
        [
            *(unprivileged if os.geteuid() == 0 else []),
            *(sys.executable, "-m", "experiments.train"),
            *arguments(program, METHOD, workdir, f"--config.backbone_dir={backbones}"),
        ],
        cwd=ROOT,
        env={**os.environ, "FEDLORA_DATA_DIR": str(tmp_path / "data")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert f"error: cannot write in {locked}" in done.stderr, done.stderr
    assert "Permission denied" in done.stderr and len(done.stderr.splitlines()) < 4
