"""`experiments.smoothness`: what it measures, and that it goes on from what is there."""

import jax
import numpy as np
import pytest

from experiments import smoothness
from fedlora_jax import experiment, lora


def test_cosine_and_directions_of_known_kernels():
    rng = np.random.default_rng(0)
    one = {"x": rng.normal(size=(6, 4)), "y": rng.normal(size=(3, 5))}
    flat = np.concatenate([x.ravel() for x in one.values()])
    other = {name: rng.normal(size=x.shape) for name, x in one.items()}
    more = np.concatenate([x.ravel() for x in other.values()])
    wanted = flat @ more / np.linalg.norm(flat) / np.linalg.norm(more)
    assert smoothness.cosine(one, other) == pytest.approx(wanted)
    assert smoothness.cosine(one, {k: -2 * x for k, x in one.items()}) == pytest.approx(-1)
    assert np.isnan(smoothness.cosine(one, {k: 0 * x for k, x in one.items()}))
    u, v = (np.linalg.qr(rng.normal(size=(n, 3)))[0] for n in (9, 7))
    assert smoothness.directions(u @ np.diag([1.0, 1.0, 1.0]) @ v.T) == 3
    # The third holds 0.5% of the squares.
    assert smoothness.directions(u @ np.diag([1.0, 1.0, 0.1]) @ v.T) == 2
    assert smoothness.directions(np.zeros((3, 4))) == 0


def test_a_study_is_a_table_and_goes_on(digits, tmp_path, monkeypatch):
    config = digits.copy_and_resolve_references()
    config.rounds, config.lora.rank = 3, 2
    found = smoothness.study(config, tmp_path, ["fedit", "random_basis_lora"], 1)
    fedit, ours = found
    assert all(len(row["cosines"]) == 2 and len(row["loss"]) == 3 for row in found)
    assert -1 <= min(fedit["cosines"]) <= max(fedit["cosines"]) <= 1
    # All begin with the same model and batch; adapters of rank 2 are what FedIT moves, ours more.
    assert fedit["first_loss"][0] == pytest.approx(ours["first_loss"][0], rel=1e-5)
    assert fedit["directions"] <= 2 < ours["directions"]
    text = smoothness.page(found)
    assert "cosine of consecutive changes" in text and "| random_basis_lora" in text

    def never(*_):
        raise AssertionError("what is there is run again")

    monkeypatch.setattr(smoothness, "_followed", never)
    again = smoothness.study(config, tmp_path, ["fedit", "random_basis_lora"], 1)
    assert [row["cosines"] for row in again] == [row["cosines"] for row in found]
    config.local.learning_rate *= 2
    with pytest.raises(ValueError, match="another configuration"):
        smoothness.study(config, tmp_path, ["fedit"], 1)
    with pytest.raises(ValueError, match="local has no model for all"):
        smoothness.study(config, tmp_path / "other", ["local"], 1)


def test_the_first_step_is_that_of_the_round(digits, tmp_path):
    """Where there is one alone it is all of them."""
    config = digits.copy_and_resolve_references()
    config.rounds, config.local.steps, config.local.epochs = 2, 1, 0
    (row,) = smoothness.study(config, tmp_path, ["fedit"], 1)
    np.testing.assert_allclose(row["first_loss"], row["loss"], rtol=1e-5)
    assert row["loss"][0] != row["loss"][1]


def test_a_run_that_diverges_is_named(digits, tmp_path):
    config = digits.copy_and_resolve_references()
    config.rounds, config.local.learning_rate, config.local.clip_norm = 3, 1e30, 1e30
    with pytest.raises(
        FloatingPointError, match="fedit diverged under seed 0, round [012]: .*kept"
    ):
        smoothness.study(config, tmp_path, ["fedit"], 1)


def test_the_model_is_that_of_the_run(digits):
    """What it looks at is the merged model that is judged."""
    config = digits.copy_and_resolve_references()
    setting = experiment.prepare(config)
    state = experiment.first_state(
        config, setting, experiment.compile_program(config, setting).method
    )
    adapters = state.server.trainable.adapters
    moved = jax.tree.map(lambda x: x + 0.1, adapters)
    server = state.server._replace(trainable=state.server.trainable._replace(adapters=moved))
    merged = lora.kernels(lora.merge(server.backbone, moved, scale=server.scale))
    for path, kernel in smoothness.kernels(server).items():
        np.testing.assert_allclose(kernel.ravel(), np.ravel(merged[path]), rtol=1e-5, atol=1e-6)


def test_a_mesh_and_data_in_files_are_refused_before_any_work(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "prepare", None)
    config = digits.copy_and_resolve_references()
    config.mesh.clients = 2
    with pytest.raises(ValueError, match="this study runs on one device: .* config.mesh.clients=1"):
        smoothness.study(config, tmp_path, ["fedit"], 1)
    config.mesh.clients = 1
    config.data.streaming = True
    with pytest.raises(ValueError, match="holds its data in memory: set config.data.streaming=Fal"):
        smoothness.study(config, tmp_path, ["fedit"], 1)
