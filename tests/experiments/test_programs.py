"""`experiments.compare`, `experiments.train` and `experiments.benchmark` from the outside."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.damage import cut

METHODS = "--methods=fedit,local"


def metrics(workdir):
    """All metrics in a work directory but the seconds, by run."""
    found = {}
    for path in sorted(workdir.glob("**/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row.pop("seconds")
        found[str(path.relative_to(workdir))] = rows
    return found


def compiled(program):
    """The rounds that are kept on disk."""
    return {path.name for path in program.compiled.glob("jit_round_function-*")}


@pytest.fixture(scope="session")
def unbroken(program, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    code, out, err = program.run(
        "compare", f"--config={program.config}", f"--workdir={workdir}", METHODS, "--seeds=2"
    )
    assert code == 0, err
    return workdir, out, err


def test_comparison_leaves_all_that_it_promises(unbroken):
    workdir, out, _ = unbroken
    for name in ("report.md", "accuracy.png", "domains.png", "aggregation_error.png"):
        assert (workdir / name).stat().st_size > 100
    report = (workdir / "report.md").read_text()
    assert "experiments.compare" in report and "partition.png" in report
    for method in ("fedit", "local"):
        assert method in out and f"| {method}" in report
        run = workdir / method / "seed_1"
        config = json.loads((run / "config.json").read_text())
        assert config["method"] == method and config["seed"] == 1
        assert list(run.glob("events.out.tfevents.*")) and list(run.glob("checkpoints/4"))
        with np.load(run / "adapters.npz") as adapters:
            assert adapters["block_0/attention/query.a"].shape == (16, 2)
            assert all(np.isfinite(x).all() for x in adapters.values())


def test_metrics_are_whole_and_say_the_same_for_all_methods(unbroken):
    runs = metrics(unbroken[0])
    assert set(runs) == {
        f"{method}/seed_{seed}/metrics.jsonl" for method in ("fedit", "local") for seed in (0, 1)
    }
    for rows in runs.values():
        assert [row["round"] for row in rows] == [0, 1, 2, 3]
        for row in rows:
            accuracies = list(row["domain_accuracy"].values())
            assert len(accuracies) == 6 and np.isclose(row["accuracy"], np.mean(accuracies))
            assert len(row["cohort"]) == len(set(row["cohort"])) == len(row["client_loss"]) == 18
    for seed in (0, 1):
        one, two = (runs[f"{method}/seed_{seed}/metrics.jsonl"] for method in ("fedit", "local"))
        assert [row["cohort"] for row in one] == [row["cohort"] for row in two]
        assert one[0]["client_loss"] == two[0]["client_loss"]
    assert runs["fedit/seed_0/metrics.jsonl"] != runs["fedit/seed_1/metrics.jsonl"]


def test_no_progress_bar_in_a_log_file(unbroken):
    _, out, err = unbroken
    assert "\r" not in out + err and "%|" not in out + err


def test_killed_comparison_ends_with_the_same_numbers(program, unbroken, tmp_path):
    """At whatever moment comes, with one run behind it; no round is compiled again."""
    before = compiled(program)
    arguments = (f"--config={program.config}", f"--workdir={tmp_path}", METHODS, "--seeds=2")
    command = program.start("compare", *arguments)
    path = tmp_path / "fedit/seed_1/metrics.jsonl"
    while command.process.is_alive() and not (
        path.exists() and len(path.read_text().splitlines()) >= 2
    ):
        time.sleep(0.005)
    assert command.process.is_alive(), command.wait()
    command.process.kill()
    assert command.wait()[0] == -signal.SIGKILL
    code, out, err = program.run("compare", *arguments)
    assert code == 0, err
    assert metrics(tmp_path) == metrics(unbroken[0])
    assert before and compiled(program) == before


def test_a_directory_of_another_run_is_found_before_any_training(program, unbroken, tmp_path):
    theirs = tmp_path / "local" / "seed_1"
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_bytes((unbroken[0] / "local/seed_1/config.json").read_bytes())
    arguments = (f"--config={program.config}", f"--workdir={tmp_path}", METHODS, "--seeds=2")
    code, out, err = program.run("compare", *arguments, "--config.clients_per_round=17")
    assert code == 1 and "Traceback" not in err
    assert f"{theirs} holds a run of another configuration" in err
    assert "config.clients_per_round is 18 there, 17 here" in err
    assert not out and not (tmp_path / "fedit").exists()


def test_training_one_method_equals_its_part_of_the_comparison(program, unbroken, tmp_path):
    code, out, err = program.run(
        "train", f"--config={program.config}:method=fedit", f"--workdir={tmp_path}"
    )
    assert code == 0, err
    assert "fedit" in out and (tmp_path / "report.md").exists()
    assert metrics(tmp_path) == {
        "metrics.jsonl": metrics(unbroken[0])["fedit/seed_0/metrics.jsonl"]
    }
    code, _, err = program.run(
        "train",
        f"--config={program.config}:method=fedit",
        f"--workdir={tmp_path}",
        "--config.local.learning_rate=0.5",
    )
    assert code != 0 and "local.learning_rate" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=fedit,lorafair"], "Did you mean 'lora_fair'"),
        (["--config.roundz=3"], "unknown field of config: 'roundz'. Did you mean 'rounds'?"),
        (["--config.options.lora_fair.stepz=3"], "Did you mean 'steps'?"),
        (["--config.locl.steps=3"], "unknown field of config: 'locl'. Did you mean 'local'?"),
        (["--config.rounds=three"], "flag --config.rounds=three: invalid literal for int()"),
        (["--config.lora.head=["], "'[' is no regular expression"),
        (["--config.model.options.num_classes=5"], "'label' of example"),
        (["--workdir=pyproject.toml"], "cannot write in pyproject.toml: it is no directory"),
        (["--config.lora.targets=('quary',)"], "matches no layer"),
        (["--config.lora.rank=40"], "rank 40 is impossible"),
        (["--config.clients_per_round=31"], "only 30 clients"),
        (["--config.rounds=0"], "rounds must be at least 1"),
        (["--config.data.name=digit_domains"], "digits_domains"),
        (["--config.data.partition=diriclet"], "dirichlet"),
        (["--config.local.optimizer=sdg"], "sgd"),
        (["--config.seed=-1"], "config.seed must be from 0 to 4294967295, got -1"),
        (["--config.seed=1"], "config.seed is 1, but --seeds=1 runs the seed 0"),
        (["--num_hosts=2", "--host=1"], "--coordinator must say"),
        (
            ["--config=configs/linear.py"],
            "is one of experiments.linear, not of experiments.comp",
        ),
    ],
)
def test_mistakes_end_with_a_message(program, tmp_path, arguments, message):
    code, out, err = program.run(
        "compare", f"--config={program.config}", f"--workdir={tmp_path}", "--seeds=1", *arguments
    )
    assert code != 0
    assert message in err, err
    assert err.startswith("error: ") and "Traceback" not in err
    assert "runs failed" not in err and not list(tmp_path.glob("**/metrics.jsonl"))


def test_a_method_that_diverges_is_left_out_and_reported(program, tmp_path):
    rates = tmp_path / "rates.json"
    rates.write_text('{"learning_rates": {"fedit": 1e30, "local": 0.02}}')
    arguments = (f"--config={program.config}", f"--workdir={tmp_path}", METHODS, "--seeds=1")
    code, out, err = program.run(
        "compare", *arguments, f"--learning_rates={rates}", "--config.local.clip_norm=1e30"
    )
    assert code == 1 and "Traceback" not in err
    assert "error: training diverged for fedit\nfedit: under seed 0, round 0: every client" in err
    assert "after round -1" not in err
    report = (tmp_path / "report.md").read_text()
    assert "| local" in report and "Left out: training diverged for fedit" in report
    assert len((tmp_path / "local" / "seed_0" / "metrics.jsonl").read_text().splitlines()) == 4


def test_runs_that_fail_are_reported_when_all_others_have_run(program, unbroken, tmp_path):
    workdir = tmp_path / "runs"
    shutil.copytree(unbroken[0], workdir)
    for path in (workdir / "fedit" / "seed_0" / "checkpoints").glob("*/checksums.json"):
        cut(path)
    for name in ("fedit", "local"):
        shutil.rmtree(workdir / name / "seed_1")
    (workdir / "fedit" / "seed_1").touch()
    (workdir / "report.md").unlink()
    code, _, err = program.run(
        "compare", f"--config={program.config}", f"--workdir={workdir}", METHODS, "--seeds=2"
    )
    assert code == 1 and "Traceback" not in err
    said = "runs failed for fedit\nfedit: under seed 0, no checkpoint of .* can be used: .*\n"
    said += "fedit: under seed 1, cannot write in .*/fedit/seed_1: it is no directory"
    assert re.search(f"error: {said}", err)
    report = (workdir / "report.md").read_text()
    assert "| local" in report and "| fedit" not in report
    assert re.search(f"Left out: {said}", report)
    run = "local/seed_1/metrics.jsonl"
    assert metrics(workdir)[run] == metrics(unbroken[0])[run]


@pytest.mark.skipif(
    not os.path.exists(f"/proc/self/task/{os.getpid()}/children"), reason="reads Linux's /proc"
)
def test_a_benchmark_that_is_stopped_keeps_its_rows_and_no_worker(program, tmp_path):
    """Its first row is finished; of a table that is there nothing is replaced."""
    table = tmp_path / "aggregation_cpu.json"
    table.write_text("of an earlier run")
    smallest = ["--clients=1", "--rank=1", "--layers=1", "--repeats=1", "--noreference"]
    command = program.start(
        "benchmark", "aggregation", "--only=fedit,flora", *smallest, f"--output={tmp_path}"
    )
    rows, worker = tmp_path / "aggregation_cpu.partial.json", Path("nowhere")
    while command.process.is_alive() and not (rows.exists() and worker.exists()):
        time.sleep(0.05)
        tasks = Path(f"/proc/{command.process.pid}/task")
        children = [path.read_text().split() for path in tasks.glob("*/children")]
        worker = next((Path("/proc", *each) for each in children if each), worker)
    os.kill(command.process.pid, signal.SIGTERM)
    code, _, err = command.wait()
    assert code == 143 and f"stopped; finished rows are in {rows}" in err, err
    assert list(json.loads(rows.read_text())["ours"]) == ["fedit"] and not worker.exists()
    assert table.read_text() == "of an earlier run" and "Traceback" not in err
