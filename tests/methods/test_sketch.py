"""FedSmoothLoRA's gradient estimate on the demo's ViT: from a sketch, and from whole gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from configs import digits
from fedlora_jax import lora, methods, models
from fedlora_jax.data import digits_domains, images
from fedlora_jax.data.clients import client_data
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.round import create, train_cohort
from fedlora_jax.federated.task import classification
from fedlora_jax.methods import Server, Trainable

CLIENTS = jnp.array([0, 1])


@pytest.fixture(scope="module")
def federation():
    """Two clients, one of slanted and one of outlined digits, and the model that the demo has."""
    config, source = digits.get_config(), load_digits()
    examples = {
        "image": np.stack(
            [
                digits_domains.draw(digits_domains._enlarge(source.images[i] / 16), domain, i)
                for domain in ("sheared", "outlined")
                for i in range(64)
            ]
        ),
        "label": np.tile(source.target[:64], 2).astype(np.int32),
    }
    model = models.get(config.model.name, **config.model.options)
    task = classification(model, lambda batch: (images.normalize(batch["image"]),))
    params = jax.jit(model.init)(jax.random.key(0), images.normalize(examples["image"][:1]))
    backbone, head = lora.split_head(params["params"], config.lora.head)
    adapters = lora.init(
        jax.random.key(1), backbone, targets=config.lora.targets, rank=config.lora.rank
    )
    server = Server(backbone, Trainable(adapters, head), jnp.float32(2), (), jnp.int32(0))
    return task, server, client_data(examples, np.split(np.arange(128), 2))


def offsets(federation, gradient):
    """The frozen `- a_ga b_ga` of both clients."""
    task, server, data = federation
    method = methods.fedsmooth_lora(calibration_batches=2, gradient=gradient)
    training = LocalTraining(optax.sgd(1.0), batch_size=16, steps=1)

    def start(state):
        arguments = (state, data, CLIENTS, jax.random.key(0), 0.0)
        return train_cohort(task, method, training, *arguments).start.offset

    found = jax.jit(start)(create(jax.random.key(2), method, server, len(CLIENTS)))
    return jax.tree.map(np.float64, found)


def test_sketch_finds_the_subspaces_of_the_whole_gradients(federation):
    sketch, dense = (offsets(federation, kind) for kind in ("sketch", "dense"))
    assert len(sketch) == 12

    def angle(x, y):
        """The sine of the largest angle between the spans of two sets of columns."""
        x, y = np.linalg.qr(x)[0], np.linalg.qr(y)[0]
        return np.linalg.norm(x - y @ (y.T @ x), 2)

    for path, found in sketch.items():
        for client in range(len(CLIENTS)):
            one, two = (jax.tree.map(lambda x, c=client: x[c], f) for f in (found, dense[path]))
            # Directions 1 to r on the side of the input, r + 1 to 2 r on that of the output: the
            # latter are less far from what follows them.
            assert angle(one.a, two.a) < 1e-3, path
            assert angle(one.b.T, two.b.T) < 5e-2, path
            for x, y in zip(one, two, strict=True):
                np.testing.assert_allclose(np.linalg.norm(x), np.linalg.norm(y), rtol=1e-5)
