"""FedProx: clients are held near where they started."""

import jax
import jax.numpy as jnp

from fedlora_jax import bounds
from fedlora_jax.methods import Method, Server, Start, Trainable, check_combination
from fedlora_jax.methods._base import PyTree


def fedprox(method: Method, *, mu: float) -> Method:
    r"""Adds a proximal term to the loss of each client, on what it trains.

    .. math:: \frac{\mu}{2} \lVert \theta - \theta_{server} \rVert^2

    with :math:`\theta` the trained factors and the head, and :math:`\theta_{server}` the values
    that the server sent, from which the client starts.

    Args:
      method: A method whose clients start from the server's factors.
      mu: Strength, non-negative.

    Raises:
      ValueError: If mu is negative, or the method's clients start from something else.

    References:
      Li et al., *Federated Optimization in Heterogeneous Networks*, MLSys 2020, arXiv:1812.06127.
    """
    check_combination(method, "fedprox", "FedProx")
    bounds.check("fedprox", mu=mu)

    def penalty(server: Server, client: PyTree, start: Start, trainable: Trainable) -> jax.Array:
        squares = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), trainable, start.trainable)
        proximal = mu / 2 * jax.tree.reduce(jnp.add, squares)
        if method.penalty is None:
            return proximal
        return proximal + method.penalty(server, client, start, trainable)

    return method._replace(penalty=penalty)
