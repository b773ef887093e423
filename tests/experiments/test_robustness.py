"""`experiments.robustness`: its table, and that it goes on from what is there."""

import pytest

from experiments import robustness

KINDS = ["none", "nan", "dropout", "huge"]


def test_a_study_is_a_table_and_goes_on(digits, tmp_path, monkeypatch):
    config = digits.copy_and_resolve_references()
    config.rounds = 2
    what = (["flora"], ["none", "median"], KINDS, 1)
    title, results = robustness.study(config, tmp_path, *what)
    text = robustness.page(results, title, *what)
    assert text.startswith("Accuracy (%) after the last round, mean over seeds")
    cells = [[cell.strip() for cell in row.split("|")[1:4]] for row in text.splitlines()[2:]]
    assert cells[0] == ["flora", "none", "median"]
    rows = {name: values for name, *values in cells[2:]}
    # It reads each client's factors, of which there is no median.
    assert set(rows) == set(KINDS) and {row[1] for row in rows.values()} == {"-"}
    assert rows["nan"] == rows["dropout"] and all(float(row[0]) >= 0 for row in rows.values())

    def never(*_):
        raise AssertionError("what is there is run again")

    monkeypatch.setattr(robustness, "_compiled", never)
    assert robustness.study(config, tmp_path, *what)[1] == results
    config.faults.share = 0.4
    with pytest.raises(ValueError, match="another configuration"):
        robustness.study(config, tmp_path, *what)
