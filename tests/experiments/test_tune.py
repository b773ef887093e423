"""`experiments.tune`: its choice, and the whole of it from the outside."""

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from configs import digits
from experiments import tune
from experiments.tune import Point
from fedlora_jax import experiment
from fedlora_jax.checksums import Damaged
from fedlora_jax.experiment import loop, records
from fedlora_jax.federated import metrics


def of(values, rounds=4):
    """What was found of a method without a server's step, by learning rate."""
    return {Point(rate): {rounds: x} for rate, x in values.items()}


def test_choice():
    found = {
        "fedit": of({0.1: [0.5, 0.6], 0.2: [0.7, 0.5], 0.3: [0.4, 0.4]}),
        "flora": of({0.1: [0.5, 0.5], 0.2: [0.5, 0.5], 0.3: None}),  # equal: the smaller
        "local": of({0.1: None, 0.2: None, 0.3: None}),
    }
    accuracy = metrics.get("accuracy")
    chosen = tune.choose(found, accuracy, 4)
    assert chosen == {"fedit": Point(0.2), "flora": Point(0.1)}
    lines = tune.render(found, chosen, accuracy).splitlines()
    assert "60.0 ± 14.1 *" in lines[2] and lines[2].endswith(" 0.2")
    assert "50.0 ± 0.0 *" in lines[3] and "diverged" in lines[3] and "0.1 (edge)" in lines[3]
    assert lines[4].split() == ["local", "-", "diverged", "diverged", "diverged", "-"]


def test_choice_of_a_step():
    """Of points that were left behind the last values are shown, and none is chosen."""
    found = {
        "fedit": {
            Point(0.1, 1.0): {2: [0.9]},
            Point(0.2, 1.0): {2: [0.5], 4: [0.6]},
            Point(0.1, 2.0): {2: [0.4], 4: [0.7]},
            Point(0.2, 2.0): {2: None},
        },
        "local": of({0.1: [0.1], 0.2: [0.2]}),
    }
    accuracy = metrics.get("accuracy")
    chosen = tune.choose(found, accuracy, 4)
    assert chosen == {"fedit": Point(0.1, 2.0), "local": Point(0.2)}
    cells = [
        re.split(r"\s{2,}", line.strip())
        for line in tune.render(found, chosen, accuracy).splitlines()
    ]
    assert cells[2] == ["fedit", "1", "90.0 [2]", "60.0", "-"]
    assert cells[3] == ["fedit", "2", "70.0 *", "diverged", "0.1 (edge), 2 (edge)"]
    assert cells[4] == ["local", "-", "10.0", "20.0 *", "0.2 (edge)"]


@pytest.mark.parametrize("points", [1, 2, 3, 10, 20])
@pytest.mark.parametrize("rounds", [1, 2, 4, 12, 30])
@pytest.mark.parametrize("halving", [1, 2, 3, 5])
def test_plan(points, rounds, halving):
    rungs = tune.plan(points, rounds, halving)
    assert rungs[0].points == points and rungs[-1].rounds == rounds
    assert all(rung.points >= 1 and rung.rounds >= 1 for rung in rungs)
    for one, other in itertools.pairwise(rungs):
        assert one.rounds < other.rounds <= halving * one.rounds
        assert other.points == -(-one.points // halving) < one.points
    assert len(rungs) == 1 or halving > 1
    spent = sum(a.points * (a.rounds - b) for a, b in zip(rungs, [0, *(r.rounds for r in rungs)]))
    assert spent <= points * rounds
    assert tune._rounds(rungs) == spent


def test_plan_of_the_demo():
    assert tune.plan(20, 12, 3) == [(2, 20), (4, 7), (12, 3)]


@pytest.mark.parametrize("name", ["accuracy", "nll"])
def test_search_keeps_the_best_that_do_not_diverge(name):
    """Later points are better; of the best few the very best diverges in the second rung."""
    metric = metrics.get(name)
    sign = 1 if metric.higher_is_better else -1
    points = [Point(float(n), step) for n in range(1, 6) for step in (1.0, 2.0)]
    calls = []

    def run_to(point, rounds):
        calls.append((point, rounds))
        bad = point == points[-1] and rounds > 2
        return None if bad else [sign * points.index(point) + x for x in (-rounds, rounds)]

    found = tune.search(points, tune.plan(10, 18, 3), run_to, metric)
    assert [r for _, r in calls] == [2] * 10 + [6] * 5 + [18] * 2
    assert [p for p, r in calls if r == 6] == points[:-6:-1]
    assert [p for p, r in calls if r == 18] == [points[-2], points[-3]]
    assert found[points[-1]] == {2: [sign * 9 - 2, sign * 9 + 2], 6: None}
    assert tune.choose({"fedit": found}, metric, 18) == {"fedit": points[-2]}


def test_a_search_run_again_finds_what_a_run_had_reached_before_it_diverged(tmp_path, monkeypatch):
    """Without trying the round again in which it did."""
    asked = []

    def run(config, setting, program, workdir, advance, until):
        asked.append(until)
        workdir.mkdir(parents=True, exist_ok=True)
        rows = [{"round": index, "accuracy": 0.5 + index / 10} for index in range(2)]
        (workdir / records.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if until > 2:
            raise FloatingPointError
        return rows

    monkeypatch.setattr(experiment, "run", run)
    monkeypatch.setattr(tune._Runs, "_program", lambda *_: None)
    setting = SimpleNamespace(task=SimpleNamespace(metrics=(metrics.get("accuracy"),)))
    grid = tune._grid(digits.get_config(), "fedit", [0.1], [1.0])
    for _ in range(2):
        runs = tune._Runs(grid, setting, tmp_path, 1, tqdm(disable=True), lambda: None)
        found = [runs.to(Point(0.1, 1.0), rounds) for rounds in (1, 2, 4)]
        assert found == [[0.5], [0.6], None]
    assert asked == [1, 2, 4, 1, 2]


def test_choice_where_lower_is_better():
    found = {"fedit": of({0.1: [2.5, 2.6], 0.2: [2.1, 2.3], 0.3: [2.25, 2.15]})}
    nll = metrics.get("nll")
    chosen = tune.choose(found, nll, 4)
    assert chosen == {"fedit": Point(0.2)}  # Of equal means the smaller rate.
    assert "2.200 ± 0.141 *" in tune.render(found, chosen, nll)


def test_grid():
    assert tune.parse_positive("server_steps", ["0.1", "2e-2", "0.1"]) == [0.02, 0.1]
    for wrong in ([], ["x"], ["0"], ["-1"], ["nan"], ["inf", "1"]):
        with pytest.raises(ValueError, match="--server_steps=.*: expected positive numbers"):
            tune.parse_positive("server_steps", wrong)


def test_a_round_that_was_not_evaluated_is_no_reason_to_drop_a_point(tmp_path):
    assert tune._judged({"round": 1, "accuracy": 0.5}, "accuracy", tmp_path) == 0.5
    with pytest.raises(ValueError, match=f"round 1 of the run in {tmp_path} was not evaluated"):
        tune._judged({"round": 1}, "accuracy", tmp_path)


def test_test_split_is_never_seen():
    splits = tune.judged_on_validation(digits.get_config()).data.splits
    assert dict(splits) == {"train": "federated", "validation": "validation", "test": "validation"}
    without = digits.get_config()
    without.data.splits = {"train": "federated", "test": "test"}
    with pytest.raises(ValueError, match="no 'validation'.* it has test='test', train="):
        tune.judged_on_validation(without)


def test_a_directory_of_another_run_is_found_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "prepare", None)
    config = digits.get_config()
    point = tune.judged_on_validation(config)
    point.method, point.local.learning_rate, point.rounds, point.seed = "local", 0.02, 5, 1
    directory = tmp_path / "local" / "rate_0.02" / "seed_1"
    directory.mkdir(parents=True)
    loop._claim(point, directory)
    with pytest.raises(ValueError, match=f"{directory} holds a run of .*config.rounds is 5 there"):
        tune.tune(config, tmp_path, ["fedit", "local"], [0.01, 0.02], [1.0], 2, 1)


def test_a_method_of_which_a_run_fails_is_left_out(tmp_path, monkeypatch):
    def to(runs, point, rounds):
        name = next(iter(runs._grid.values())).method
        if name in failing:
            raise failing[name]
        return [point.rate]

    monkeypatch.setattr(tune._Runs, "to", to)
    task = SimpleNamespace(metrics=[metrics.get("accuracy")])
    monkeypatch.setattr(experiment, "prepare", lambda _: SimpleNamespace(task=task))
    arguments = (digits.get_config(), tmp_path, ["fedit", "local"], [0.1, 0.2], [1.0], 1, 1)
    failing = {"fedit": Damaged("no checkpoint can be used")}
    with pytest.raises(ValueError, match="^runs failed for fedit\nfedit: no checkpoint"):
        tune.tune(*arguments)
    found = json.loads((tmp_path / "learning_rates.json").read_text())
    assert found["learning_rates"] == {"local": 0.2}
    assert "Left out: runs failed for fedit" in (tmp_path / "report.md").read_text()
    # What may be wrong with all of them, before anything has trained.
    failing = {"fedit": ValueError("rank 40 is impossible")}
    with pytest.raises(ValueError, match="^rank 40 is impossible"):
        tune.tune(*arguments)


def state(workdir: Path) -> dict[str, int]:
    """When each file that records work was last written."""
    paths = [
        *workdir.glob("**/checkpoints/*"),
        *workdir.glob("**/diverged.json"),
        *workdir.glob("**/config.json"),
    ]
    return {str(path): path.stat().st_mtime_ns for path in paths}


def test_tuning(program, tmp_path):
    workdir = tmp_path / "tuned"
    arguments = (
        "tune",
        f"--config={program.config}",
        f"--workdir={workdir}",
        "--methods=fedit,local",
        "--learning_rates=1e30,0.02",
        "--server_steps=1,2",
        "--halving=2",
        "--seeds=1",
        "--config.rounds=2",
        "--config.local.clip_norm=1e30",
    )
    code, out, err = program.run(*arguments)
    assert code == 0, err
    assert "\r" not in out + err and "%|" not in out + err
    runs = {("fedit", step): f"rate_0.02_step_{step}" for step in (1.0, 2.0)}
    for (method, step), directory in ({("local", 1.0): "rate_0.02"} | runs).items():
        said = f", server step {step:g}" * (method == "fedit")
        assert f"{method}, learning rate 0.02{said}, seed 0: " in out
        assert f"{method}, learning rate 1e+30{said}, seed 0: diverged" in out
        run = workdir / method / directory / "seed_0"
        config = json.loads((run / "config.json").read_text())
        assert config["data"]["splits"]["test"] == "validation"
        assert config["local"]["learning_rate"] == 0.02
        assert config["server"]["step"] == step
    text = (workdir / "learning_rates.json").read_text()
    record = json.loads(text)
    assert record["learning_rates"] == {"fedit": 0.02, "local": 0.02}
    points = record["validation_accuracy"]["fedit"]
    assert [x["after"] for x in points if x["rate"] == 1e30] == [{"1": None}] * 2
    ended = [x for x in points if "2" in x["after"]]
    assert len(points) == 4 and len(ended) == 2
    best = max(ended, key=lambda x: x["after"]["2"])
    assert record["server_steps"] == {"fedit": best["step"], "local": None}
    assert record["spent"]["fedit"]["points"] == 4
    assert record["spent"]["fedit"]["rounds"] == sum(max(map(int, x["after"])) for x in ended)
    assert record["spent"]["fedit"]["seconds"] > 0
    assert "Spent: 6 points, 6 rounds, " in out
    assert "learning_rates.png" in (workdir / "report.md").read_text()
    assert (workdir / "learning_rates.png").stat().st_size > 1000

    before = state(workdir)
    code, _, err = program.run(*arguments)
    assert code == 0, err
    assert (workdir / "learning_rates.json").read_text() == text
    assert state(workdir) == before and any("diverged" in path for path in before)


def test_comparison_at_chosen_rates(program, tmp_path):
    chosen = tmp_path / "learning_rates.json"
    rates = {"fedit": 0.01, "local": 0.03, "flora": 0.5}
    steps = {"fedit": 2, "local": None, "flora": 3}
    chosen.write_text(json.dumps({"learning_rates": rates, "server_steps": steps}))
    code, out, err = program.run(
        "compare",
        f"--config={program.config}",
        f"--workdir={tmp_path}",
        "--methods=local,fedit",
        "--seeds=1",
        f"--learning_rates={chosen}",
        "--config.rounds=2",
    )
    assert code == 0, err
    assert "learning rate" in out and "server step" in out
    for method, rate, step in (("fedit", 0.01, 2), ("local", 0.03, 1)):
        config = json.loads((tmp_path / method / "seed_0" / "config.json").read_text())
        assert config["local"]["learning_rate"] == rate and config["server"]["step"] == step
