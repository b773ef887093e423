"""`experiments.robustness`: its table, and that it goes on from what is there."""

import json


def test_command(program, tmp_path):
    options = [f"--config={program.config}", f"--out={tmp_path}", "--seeds=1", "--methods=flora"]
    options += ["--config.rounds=2", "--kinds=none,nan,dropout,huge"]
    code, out, err = program.run("robustness", *options, "--rules=none,median")
    assert code == 0, err
    page = (tmp_path / "README.md").read_text()
    assert "experiments.robustness" in page and out.strip() in page
    cells = {
        row[1].strip(): [cell.strip() for cell in row[2:4]]
        for row in (line.split("|") for line in out.splitlines())
        if len(row) == 5
    }
    assert cells["flora"] == ["none", "median"]
    # It reads each client's factors, of which there is no median.
    assert {cells[kind][1] for kind in ("none", "nan", "dropout", "huge")} == {"-"}
    assert cells["nan"] == cells["dropout"]
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["kind"] for run in runs] == ["none", "nan", "dropout", "huge"]
    # What is there is not run again, and what is of another configuration is not mixed with it.
    kept = json.loads((tmp_path / "results.json").read_text())
    kept["runs"][0]["value"] = 12.3
    (tmp_path / "results.json").write_text(json.dumps(kept))
    code, out, err = program.run("robustness", *options, "--rules=none")
    assert code == 0 and "12.3" in out, err
    code, _, err = program.run("robustness", *options, "--config.faults.share=0.4")
    assert code == 1 and "another configuration" in err
    code, _, err = program.run("robustness", *options, "--rules=medain")
    assert code == 1 and "Did you mean 'median'" in err
