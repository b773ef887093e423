"""Adaptive federated optimisation: the server steps along the mean change of its clients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedlora_jax.aggregation import Aggregated
from fedlora_jax.methods import Method, Server, check_combination
from fedlora_jax.methods._base import PyTree
from fedlora_jax.transforms import _base

SERVER_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "fedavgm": lambda rate, momentum, second_moment, adaptivity: optax.sgd(rate, momentum),
    "fedadam": lambda rate, momentum, second_moment, adaptivity: optax.adam(
        rate, momentum, second_moment, eps=adaptivity
    ),
    "fedyogi": lambda rate, momentum, second_moment, adaptivity: optax.yogi(
        rate, momentum, second_moment, eps=adaptivity
    ),
    "fedadagrad": lambda rate, momentum, second_moment, adaptivity: optax.adagrad(
        rate, initial_accumulator_value=0.0, eps=adaptivity**2
    ),
}
"""By name: `(learning_rate, momentum, second_moment, adaptivity) -> optax optimiser`. They are
optax's, with its bias correction in Adam and Yogi, which the paper leaves out."""


def server_optimizer(method: Method, optimizer: optax.GradientTransformation) -> Method:
    r"""Takes the method's averages as a direction, not as the next state.

    .. math::
      \theta \leftarrow \theta + \text{optimizer}\left( -(\bar\theta - \theta) \right)

    with :math:`\theta` the server's adapters and head and :math:`\bar\theta` what the method makes
    of its clients. Plain SGD of learning rate 1 is the method itself. The aggregation error of a
    round remains that of :math:`\bar\theta`.

    Args:
      method: A method that returns averages.
      optimizer: Any optax optimiser; FedAvgM, FedAdam, FedYogi and FedAdagrad by name in
        `SERVER_OPTIMIZERS`.

    Raises:
      ValueError: If the method returns no averages.

    References:
      Reddi et al., *Adaptive Federated Optimization*, ICLR 2021, arXiv:2003.00295. Hsu et al.,
      *Measuring the Effects of Non-Identical Data Distribution for Federated Visual
      Classification*, arXiv:1909.06335 (FedAvgM).
    """
    check_combination(method, "server_optimizer", "a server optimiser")

    def init(key: jax.Array, server: Server) -> tuple[Server, PyTree]:
        server, client = method.init(key, server)
        return _base.outer(server, optimizer.init(server.trainable)), client

    def aggregate(
        server: Server, uploads: PyTree, weights: jax.Array
    ) -> tuple[Server, Aggregated | None]:
        changed, aggregated = method.aggregate(_base.inner(server), uploads, weights)
        against = jax.tree.map(jnp.subtract, server.trainable, changed.trainable)
        updates, state = optimizer.update(against, server.memory.own, server.trainable)
        trainable = optax.apply_updates(server.trainable, updates)
        return _base.outer(changed._replace(trainable=trainable), state), aggregated

    return _base.around(method, init=init, aggregate=aggregate)
