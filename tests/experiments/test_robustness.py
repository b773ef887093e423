"""`experiments.robustness`: its table, and that it goes on from what is there."""

import jax.numpy as jnp
import pytest

from experiments import robustness
from fedlora_jax import experiment
from fedlora_jax.federated import faults, metrics

KINDS = ["none", "nan", "dropout", "huge"]


def test_a_study_is_a_table_and_goes_on(digits, tmp_path, monkeypatch):
    config = digits.copy_and_resolve_references()
    config.rounds = 2
    what = (["flora"], ["none", "median"], KINDS, 1)
    metric, results = robustness.study(config, tmp_path, *what)
    text = robustness.page(results, metric, *what)
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


def test_numbers_are_shown_as_their_metric_is():
    """Nats that differ by a hundredth are not one number."""
    results = {("fedit", "none", "zeros", seed): 2.604 + 0.006 * seed for seed in range(2)}
    text = robustness.page(results, metrics.get("nll"), ["fedit"], ["none"], ["zeros"], 2)
    assert "2.607 ± 0.004" in text and "(nats/token)" in text and "lower is better" in text


@pytest.mark.parametrize("weights", ["examples", "equal"])
def test_clients_weigh_what_is_configured(digits, monkeypatch, weights):
    config = digits.copy_and_resolve_references()
    config.weights = weights
    found = []

    def run_round(recipe, *state):
        found.append((recipe.equal_weights, recipe.clients_per_chunk))
        return state

    monkeypatch.setattr(robustness, "run_round", run_round)
    program = experiment.compile_program(config, experiment.prepare(config))
    make = robustness._compiled(program)
    make(3)(faults.make("nan", share=0.2, factor=1.0), *jnp.zeros(2))
    assert found == [(weights == "equal", 3)]


def test_a_mesh_and_data_in_files_are_refused_before_any_work(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "prepare", None)
    config = digits.copy_and_resolve_references()
    config.mesh.clients = 2
    with pytest.raises(ValueError, match="this study runs on one device: .* config.mesh.clients=1"):
        robustness.study(config, tmp_path, ["fedit"], ["none"], ["none"], 1)
    config.mesh.clients = 1
    config.data.streaming = True
    with pytest.raises(ValueError, match="holds its data in memory: set config.data.streaming=Fal"):
        robustness.study(config, tmp_path, ["fedit"], ["none"], ["none"], 1)
