"""The floor of a study: a linear classifier on what the frozen pretrained backbone gives.

    python -m experiments.linear_probe --config=configs/python_docs_minilm.py

All training examples in one place, no adapters: what any federated fine-tuning has to beat. The
regularisation is chosen by cross-validation on the training examples.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler

from experiments.shared.apps import run
from fedlora_jax import experiment
from fedlora_jax.experiment import Setting
from fedlora_jax.experiment.setting import is_streamed
from fedlora_jax.lora import Params

_BATCH = 64


def main(config: ConfigDict) -> None:
    """Fits the probe and prints its accuracy.

    Raises:
      ValueError: If the task has no classes, or images stay in their files; before any work.
    """
    if config.task != "classification":
        raise ValueError(f"the probe wants a classification task, config.task is {config.task}")
    if is_streamed(config):
        raise ValueError("the probe wants all images in memory: set config.data.streaming=False")
    setting = experiment.prepare(config)
    accuracy, chosen = probe(setting)
    print(
        f"linear probe: {100 * accuracy:.1f}% of {len(setting.test['label'])} test examples, "
        f"{len(setting.train['label'])} training examples, C = {chosen:g}"
    )


def probe(setting: Setting) -> tuple[float, float]:
    """Test accuracy of a logistic regression on frozen features, and its C."""
    train, test = (features(setting, split) for split in (setting.train, setting.test))
    scaler = StandardScaler().fit(train)
    grid = {"C": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]}
    search = GridSearchCV(LogisticRegression(max_iter=500), grid, cv=5)
    search.fit(scaler.transform(train), setting.train["label"])
    accuracy = search.score(scaler.transform(test), setting.test["label"])
    return float(accuracy), search.best_params_["C"]


def features(setting: Setting, examples: dict[str, np.ndarray]) -> np.ndarray:
    """What the head of the model sees, `[M, width]`."""

    def skip_head(run: Any, inputs: Any, options: Any, context: Any) -> Any:
        return inputs[0] if context.module.path == ("head",) else run(*inputs, **options)

    @jax.jit
    def head_input(params: Params, batch: dict[str, jax.Array]) -> Any:
        with nn.intercept_methods(skip_head):
            return setting.task.model.apply({"params": params}, *setting.task.inputs(batch))

    count, params = len(examples["label"]), jax.device_put(setting.params)
    found = []
    for start in range(0, count, _BATCH):
        index = np.arange(start, start + _BATCH).clip(max=count - 1)
        found.append(head_input(params, {name: x[index] for name, x in examples.items()}))
    return np.concatenate(found)[:count]


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
    flags.mark_flag_as_required("config")
    run(lambda: main(_CONFIG.value))
