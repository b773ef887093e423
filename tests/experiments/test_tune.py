"""`experiments.tune`: its choice, and the whole of it from the outside."""

import json
from pathlib import Path

import pytest

from configs import digits, python_docs_minilm
from experiments import tune
from fedlora_jax.federated import metrics


def test_choice():
    found = {
        "fedit": {0.1: [0.5, 0.6], 0.2: [0.7, 0.5], 0.3: [0.4, 0.4]},
        "flora": {0.1: [0.5, 0.5], 0.2: [0.5, 0.5], 0.3: None},  # equal: the smaller
        "local": {0.1: None, 0.2: None, 0.3: None},
    }
    accuracy = metrics.get("accuracy")
    chosen = tune.choose(found, accuracy)
    assert chosen == {"fedit": 0.2, "flora": 0.1}
    lines = tune.render(found, chosen, accuracy).splitlines()
    assert "60.0 ± 14.1 *" in lines[2] and lines[2].endswith(" 0.2")
    assert "50.0 ± 0.0 *" in lines[3] and "diverged" in lines[3] and "0.1 (edge)" in lines[3]
    assert lines[4].split() == ["local", "diverged", "diverged", "diverged", "-"]


def test_choice_where_lower_is_better():
    found = {"fedit": {0.1: [2.5, 2.6], 0.2: [2.1, 2.3], 0.3: [2.25, 2.15]}}
    nll = metrics.get("nll")
    chosen = tune.choose(found, nll)
    assert chosen == {"fedit": 0.2}  # Of equal means the smaller rate.
    assert "2.200 ± 0.141 *" in tune.render(found, chosen, nll)


def test_grid():
    assert tune.parse_learning_rates(["0.1", "2e-2", "0.1"]) == [0.02, 0.1]
    for wrong in ([], ["x"], ["0"], ["-1"], ["nan"], ["inf", "1"]):
        with pytest.raises(ValueError, match="--learning_rates=.*: expected positive numbers"):
            tune.parse_learning_rates(wrong)


def test_test_split_is_never_seen():
    splits = tune.judged_on_validation(digits.get_config()).data.splits
    assert dict(splits) == {"train": "federated", "validation": "validation", "test": "validation"}
    with pytest.raises(ValueError, match="no 'validation'.* it has test='test', train="):
        tune.judged_on_validation(python_docs_minilm.get_config())


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
        "--seeds=1",
        "--config.rounds=2",
        "--config.local.clip_norm=1e30",
    )
    code, out, err = program.run(*arguments)
    assert code == 0, err
    assert "\r" not in out + err and "%|" not in out + err
    for method in ("fedit", "local"):
        assert f"{method}, learning rate 0.02, seed 0: " in out
        assert f"{method}, learning rate 1e+30, seed 0: diverged" in out
        run = workdir / method / "rate_0.02" / "seed_0"
        config = json.loads((run / "config.json").read_text())
        assert config["data"]["splits"]["test"] == "validation"
        assert config["local"]["learning_rate"] == 0.02
    text = (workdir / "learning_rates.json").read_text()
    record = json.loads(text)
    assert record["learning_rates"] == {"fedit": 0.02, "local": 0.02}
    assert record["validation_accuracy"]["fedit"]["1e+30"] is None
    assert 0 <= record["validation_accuracy"]["fedit"]["0.02"][0] <= 1
    assert "learning_rates.png" in (workdir / "report.md").read_text()
    assert (workdir / "learning_rates.png").stat().st_size > 1000

    before = state(workdir)
    code, _, err = program.run(*arguments)
    assert code == 0, err
    assert (workdir / "learning_rates.json").read_text() == text
    assert state(workdir) == before and any("diverged" in path for path in before)


def test_comparison_at_chosen_rates(program, tmp_path):
    chosen = tmp_path / "learning_rates.json"
    chosen.write_text('{"learning_rates": {"fedit": 0.01, "local": 0.03, "flora": 0.5}}')
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
    assert "learning rate" in out
    for method, rate in (("fedit", 0.01), ("local", 0.03)):
        config = json.loads((tmp_path / method / "seed_0" / "config.json").read_text())
        assert config["local"]["learning_rate"] == rate
