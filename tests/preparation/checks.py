"""What every prepared data set of images is put through."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorflow_datasets as tfds
from etils import epath

from fedlora_jax.data import images, sources
from tests.preparation import published

SIZE = 16


def serve(monkeypatch, directory):
    """Downloads come out of a directory, by the last part of their address; all else is real."""

    def download(self, urls):
        if isinstance(urls, dict):
            return {key: download(self, url) for key, url in urls.items()}
        path = epath.Path(directory) / urls.rpartition("/")[2]
        assert path.exists(), urls
        return path

    manager = tfds.download.DownloadManager
    monkeypatch.setattr(manager, "download", download)
    monkeypatch.setattr(
        manager, "download_and_extract", lambda self, urls: self.extract(self.download(urls))
    )


def read(name, split, data_dir):
    """The examples of a split, with images that show what their labels say."""
    size = None if name.startswith("cifar") else SIZE
    arrays = sources.load(name, split, data_dir, size=size)
    pixels, labels = arrays["image"], arrays["label"]
    domains = arrays.get("domain", np.zeros_like(labels))
    assert pixels.dtype == np.uint8 and pixels.shape[1:] == (size or 32,) * 2 + (3,)
    assert labels.dtype == np.int32
    wanted = [published.colour(label, domain) for label, domain in zip(labels, domains)]
    np.testing.assert_allclose(pixels.mean((1, 2)), wanted, atol=4)
    return arrays


@jax.jit
def _train(pixels, labels):
    kernel = jnp.zeros((SIZE * SIZE * 3, 345))

    def loss(kernel):
        inputs = images.normalize(pixels, "clip").reshape(len(pixels), -1)
        logits = inputs @ kernel
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    before, gradient = jax.value_and_grad(loss)(kernel)
    return before, loss(kernel - 1e-4 * gradient)


def train(arrays):
    """One step of training lowers the loss."""
    before, after = _train(arrays["image"][:2, :SIZE, :SIZE], arrays["label"][:2])
    assert after < before
