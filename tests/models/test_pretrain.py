from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from fedlora_jax.data import images
from fedlora_jax.models import pretrain
from tests.damage import cut, flip


class Linear(nn.Module):
    """Compiles faster than a ViT."""

    num_classes: int = 2

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


MODEL = Linear()


@pytest.fixture(scope="module")
def examples():
    """Noise that is brighter in the upper or in the lower half."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 64)
    pixels = generator.integers(0, 100, (64, 16, 16, 1))
    upper = (np.arange(16) < 8)[None, :, None, None]
    bright = np.where(labels[:, None, None, None] == 0, upper, ~upper)
    return {"image": (pixels + 100 * bright).astype(np.uint8), "label": labels.astype(np.int32)}


@pytest.fixture(scope="module")
def params(examples):
    return pretrain.pretrain(MODEL, examples, steps=60, batch_size=32, seed=0)


def _equal(x, y):
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), x, y))


def test_it_learns(params, examples):
    logits = MODEL.apply({"params": params}, images.normalize(examples["image"]))
    assert (logits.argmax(axis=-1) == examples["label"]).mean() > 0.9


def test_only_the_seed_matters(params, examples):
    again, other = (
        pretrain.pretrain(MODEL, examples, steps=60, batch_size=32, seed=seed) for seed in (0, 1)
    )
    assert _equal(params, again) and not _equal(params, other)


def test_checkpoint_keeps_every_bit(params, tmp_path):
    pretrain.save(tmp_path / "a" / "b", params)
    assert _equal(pretrain.restore(tmp_path / "a" / "b", params), params)


def test_checkpoint_errors(params, tmp_path):
    path = tmp_path / "params"
    with pytest.raises(FileNotFoundError):
        pretrain.restore(path, params)
    pretrain.save(path, params)
    with pytest.raises(ValueError, match="already exists"):
        pretrain.save(path, params)
    with pytest.raises(ValueError, match="not compatible"):
        shapes = jax.eval_shape(Linear(3).init, jax.random.key(0), np.zeros((1, 16, 16, 1)))
        pretrain.restore(path, shapes["params"])


def test_cached_trains_once(examples, tmp_path, monkeypatch):
    first = pretrain.cached(tmp_path / "params", MODEL, examples, steps=2)
    monkeypatch.setattr(pretrain, "pretrain", None)
    assert _equal(pretrain.cached(tmp_path / "params", MODEL, examples, steps=2), first)


def test_no_progress_bar_in_a_log_file(examples, capfd):
    pretrain.pretrain(MODEL, examples, steps=1)
    assert capfd.readouterr().err == ""


def test_a_damaged_backbone_is_made_anew(examples, tmp_path):
    path = tmp_path / "params"
    first = pretrain.cached(path, MODEL, examples, steps=2)
    largest = max(path.rglob("d/*"), key=lambda file: file.stat().st_size)
    for damage in (flip, cut, Path.unlink):
        damage(largest)
        with pytest.warns(UserWarning, match="made anew"):
            assert _equal(pretrain.cached(path, MODEL, examples, steps=2), first)
        largest = max(path.rglob("d/*"), key=lambda file: file.stat().st_size)
    assert _equal(pretrain.cached(path, MODEL, examples, steps=2), first)


def test_nothing_is_trained_for_a_place_that_cannot_be_written(examples, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(pretrain, "pretrain", None)
    with pytest.raises(OSError, match=r"cannot write in .*file/backbones: Not a directory"):
        pretrain.cached(tmp_path / "file" / "backbones" / "params", MODEL, examples, steps=2)


def test_of_two_at_once_one_makes_the_backbone(examples, tmp_path, monkeypatch):
    made, train = [], pretrain.pretrain
    monkeypatch.setattr(pretrain, "pretrain", lambda *x, **y: made.append(1) or train(*x, **y))
    with ThreadPoolExecutor() as pool:
        futures = [
            pool.submit(pretrain.cached, tmp_path / "params", MODEL, examples, steps=2)
            for _ in range(2)
        ]
        one, two = (future.result() for future in futures)
    assert _equal(one, two) and len(made) == 1
