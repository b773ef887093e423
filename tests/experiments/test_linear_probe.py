"""The linear probe on frozen features."""

import jax
import numpy as np
import pytest

from configs import digits, python_stdlib_smollm2
from experiments import linear_probe
from fedlora_jax.experiment import Setting
from fedlora_jax.federated.task import classification
from fedlora_jax.models import ViT


def test_features_are_what_the_head_sees():
    model = ViT(num_classes=3, patch_size=4, width=8, depth=1, num_heads=2)
    images = np.random.default_rng(0).normal(size=(70, 8, 8, 1)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    task = classification(model, lambda batch: (batch["image"],))
    logits = jax.jit(model.apply)({"params": params}, images)
    labels = np.asarray(logits.argmax(axis=1))
    examples = {"image": images, "label": labels}
    setting = Setting(task, params, examples, examples, ("all",))

    features = linear_probe.features(setting, examples)
    head = params["head"]
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits, atol=1e-5)
    accuracy, _ = linear_probe.probe(setting)  # Labels that are linear in the features.
    assert accuracy > 0.7


@pytest.mark.parametrize("task", ["causal_lm", "regression"])
def test_what_has_no_classes_is_refused_before_any_work(task, monkeypatch):
    monkeypatch.setattr(linear_probe.experiment, "prepare", None)
    config = python_stdlib_smollm2.get_config()
    config.task = task
    with pytest.raises(ValueError, match=f"wants a classification task, config.task is {task}"):
        linear_probe.main(config)


def test_images_that_stay_in_their_files_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(linear_probe.experiment, "prepare", None)
    config = digits.get_config()
    config.data.streaming = True
    with pytest.raises(ValueError, match="all images in memory: set config.data.streaming=False"):
        linear_probe.main(config)
