"""Adaptive federated optimisation: the server steps along the mean change of its clients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedlora_jax.aggregation import Aggregated
from fedlora_jax.methods import Method, Server, check_combination
from fedlora_jax.methods._base import PyTree
from fedlora_jax.transforms import _base


class _Moments(NamedTuple):
    """The paper's m and v."""

    mean: PyTree
    square: PyTree


def _adaptive(
    rate: float,
    momentum: float,
    adaptivity: float,
    squared: Callable[[jax.Array, jax.Array], jax.Array],
) -> optax.GradientTransformation:
    """Algorithm 2 of Reddi et al., in which nothing corrects the bias of m and v.

    Args:
      rate: eta.
      momentum: beta_1.
      adaptivity: tau; v begins at its square, the least that the paper allows.
      squared: From v and the squared direction to the next v.
    """

    def init(params: PyTree) -> _Moments:
        return _Moments(
            jax.tree.map(jnp.zeros_like, params),
            jax.tree.map(lambda x: jnp.full_like(x, adaptivity**2), params),
        )

    def update(
        updates: PyTree, state: _Moments, params: PyTree | None = None
    ) -> tuple[PyTree, _Moments]:
        mean = jax.tree.map(lambda m, x: momentum * m + (1 - momentum) * x, state.mean, updates)
        square = jax.tree.map(lambda v, x: squared(v, x**2), state.square, updates)
        step = jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + adaptivity), mean, square)
        return step, _Moments(mean, square)

    return optax.GradientTransformation(init, update)


SERVER_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "fedavgm": lambda rate, momentum, second_moment, adaptivity: optax.sgd(rate, momentum),
    "fedadam": lambda rate, momentum, second_moment, adaptivity: _adaptive(
        rate, momentum, adaptivity, lambda v, x: second_moment * v + (1 - second_moment) * x
    ),
    "fedyogi": lambda rate, momentum, second_moment, adaptivity: _adaptive(
        rate, momentum, adaptivity, lambda v, x: v - (1 - second_moment) * x * jnp.sign(v - x)
    ),
    "fedadagrad": lambda rate, momentum, second_moment, adaptivity: _adaptive(
        rate, 0.0, adaptivity, lambda v, x: v + x
    ),
}
"""By name: `(learning_rate, momentum, second_moment, adaptivity) -> optax optimiser`. FedAvgM is
optax's SGD; the adaptive ones are the paper's algorithm 2 to the letter, which optax's differ from
in correcting the bias of their moments, in where the adaptivity enters and in where they begin.
FedAdagrad has no momentum, as in the paper's experiments."""


def server_optimizer(method: Method, optimizer: optax.GradientTransformation) -> Method:
    r"""Takes the method's averages as a direction, not as the next state.

    .. math::
      \theta \leftarrow \theta + \text{optimizer}\left( -(\bar\theta - \theta) \right)

    with :math:`\theta` the server's adapters and head and :math:`\bar\theta` what the method makes
    of its clients. Plain SGD of learning rate 1 is the method itself. The aggregation error of a
    round remains that of :math:`\bar\theta`.

    Args:
      method: A method that returns averages.
      optimizer: Any optax optimiser; FedAvgM, FedAdam, FedYogi and FedAdagrad, as their papers
        have them, by name in `SERVER_OPTIMIZERS`.

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

    return _base.around(
        method,
        init=init,
        aggregate=aggregate,
        free_basis=False,
        refuses={**method.refuses, "server_step": "its server steps already, in that of factors"},
    )
