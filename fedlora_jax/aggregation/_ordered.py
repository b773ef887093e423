"""The same adapters in a basis of which the first columns are the best."""

import jax
import jax.numpy as jnp

from fedlora_jax import lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import PyTree
from fedlora_jax.lowrank import Factors


def ordered(adapters: PyTree) -> PyTree:
    r"""Rewrites adapters so that `cut` gives the best approximation at every smaller rank.

    .. math::
      a b = U S V^T, \qquad a' = \alpha U, \quad b' = S V^T / \alpha, \qquad
      \alpha = \max_j \lVert a_j \rVert

    with singular values descending: the product is the same, and by Eckart and Young its first q
    directions are the nearest to it of rank q. The size of `a`, on which the pace of training
    depends, is that of its longest column: means over clients of unequal ranks shorten the columns
    that few have, and a mean size would fall, and `b` grow, from round to round. Where a singular
    value is zero there is a column of `a` of that size too. A product that is zero has no order:
    its factors stay as they are.

    When: clients of unequal ranks continue from the factors of a function that leaves them in any
    order, and nothing but the product is remembered from round to round. `flexlora`, `fedsvd` and
    `spectral` return directions in order themselves.

    Cost: a QR of each factor and an SVD of an r x r core, :math:`O(r^2 (d_{in} + d_{out}))`.

    Args:
      adapters: Adapter tree of `Factors(a [d_in, r], b [r, d_out])`.

    Returns:
      Adapter tree of the same shapes.

    Raises:
      ValueError: On factors that are not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> tree = {'dense': Factors(jnp.eye(2), jnp.array([[1., 0.], [0., 5.]]))}
      >>> new = aggregation.cut(aggregation.ordered(tree), [1])['dense']
      >>> print(jnp.round(new.a[0] @ new.b[0], 4))
      [[0. 0.]
       [0. 5.]]
    """
    alone = jax.tree.map(lambda x: jnp.asarray(x)[None], adapters)
    results = _base.each_kernel(_ordered, alone, jnp.ones(1))
    nodes = [
        jax.tree.map(lambda x, y, some=some: jnp.where(some, x.astype(y.dtype), y), new, old)
        for (new, some), old in zip(results, _base.leaves(adapters), strict=True)
    ]
    return _base.unflatten(adapters, nodes)


def _ordered(clients: Factors, weights: jax.Array) -> tuple[Factors, jax.Array]:
    """The factors in order, and whether there is any: the product is not zero."""
    old = Factors(*(x[0] for x in clients))
    size = jnp.max(jax.vmap(lowrank.vector_norm, in_axes=1)(old.a))
    best = lowrank.truncate(old, old.rank)
    some = jnp.any(best.b != 0)
    return Factors(size * best.a, best.b / jnp.where(some, size, 1)), some
