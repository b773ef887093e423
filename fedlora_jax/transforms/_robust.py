"""Aggregation that a minority of hostile clients cannot carry away."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from fedlora_jax import aggregation, bounds
from fedlora_jax.aggregation import Aggregated
from fedlora_jax.methods import Method, Server, check_combination
from fedlora_jax.methods._base import ROBUST, PyTree
from fedlora_jax.names import lookup

Rule: TypeAlias = Literal[
    "norm_clip", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median"
]

ROBUST_RULES: dict[str, str] = {
    "norm_clip": "robust_weights",
    "median": "robust_entries",
    "trimmed_mean": "robust_entries",
    "krum": "robust_selection",
    "multi_krum": "robust_selection",
    "geometric_median": "robust_weights",
}
"""By name of the rule: what of `methods.COMBINATIONS` it is."""


def robust(
    method: Method, *, rule: Rule, norm: float | None = None, byzantine: float = 0.2
) -> Method:
    r"""The server follows a robust rule instead of the clients' own weights.

    Four rules go by the changes of the whole model, s times the product of each kernel and the head
    together, compared in factored form (`aggregation.gram`). They say how much each client counts,
    and the method aggregates with that:

    * `norm_clip`: no change is larger than `norm`, or than the median of the cohort's. As weights:
      a client whose change is to be :math:`c_k` times itself counts :math:`c_k p_k`, and a client
      that has learned nothing the rest, :math:`\sum_k (1 - c_k) p_k`. For a method that is exact
      the change of the model is that of the clipped ones; it sends what it would for K + 1 clients.
    * `krum`: the one client with the nearest neighbours; `multi_krum`: the mean of those.
    * `geometric_median`: the weights of the geometric median.

    Two go entry by entry over factors and head, clients counting equally, and the method
    aggregates as if one client had sent that (`aggregation.coordinate_median`):

    * `median`, `trimmed_mean`. These are not of products: they make sense where clients train in
      one basis, and a method that averages factors has no more to lose.

    How many hostile clients of n a rule tolerates: `norm_clip` bounds what each can do; `krum` and
    `multi_krum` f with n >= 2 f + 3, f the share `byzantine` of n rounded up; `trimmed_mean` f;
    `median` and `geometric_median` less than half, the latter by weight. Clients of weight zero are
    absent, as are those whose change is too large to be squared; if the four are left with nobody,
    the server keeps its state, and a server's step around it sees no change.

    The aggregation error of a round is then the distance from the plain mean of what was sent.

    Args:
      method: Any method whose clients send something; `robust_entries` need one whose server reads
        the mean of what they send.
      rule: See above.
      norm: Of `norm_clip`, positive; by default the median.
      byzantine: Share of a cohort that may be hostile, at least 0 and below 1/2.

    Raises:
      ValueError: If there is no such rule, it makes no sense with the method, or a number is out of
        its bounds.

    References:
      See the functions in `fedlora_jax.aggregation`. That weights serve any method is ours.
    """
    combination = lookup(ROBUST_RULES, rule, "robust rule")
    check_combination(method, combination, f"the robust rule {rule}")
    bounds.check("robust", norm=norm, byzantine=byzantine)

    def by_weights(
        server: Server, uploads: PyTree, weights: jax.Array
    ) -> tuple[Server, Aggregated | None]:
        unmoved = method.unmoved(server)
        gram = aggregation.gram(uploads, weights, reference=unmoved, scale=server.scale)
        if rule == "norm_clip":
            scales = aggregation.clip_scales(gram, weights, norm=norm)
            rest = jnp.sum(jnp.where(scales > 0, weights * (1 - scales), 0))
            uploads = jax.tree.map(
                lambda x, own: jnp.concatenate([x, own[None].astype(x.dtype)]), uploads, unmoved
            )
            counts = jnp.append(weights * scales, rest)
        elif rule == "geometric_median":
            counts = aggregation.geometric_median_weights(gram, weights) * jnp.sum(weights)
        else:
            multi = rule == "multi_krum"
            chosen = aggregation.krum_weights(gram, weights, byzantine=byzantine, multi=multi)
            counts = chosen * jnp.sum(weights)
        changed, aggregated = method.aggregate(server, uploads, counts)
        anybody = jnp.any(counts > 0)
        kept = jax.tree.map(
            lambda new, old: new if new is old else jnp.where(anybody, new, old), changed, server
        )
        if aggregated is not None and aggregated.residual is not None:
            merged = jax.tree.map(lambda x: jnp.where(anybody, x, 0), aggregated.residual)
            aggregated = aggregated._replace(residual=merged)
        return kept, aggregated

    def by_entries(
        server: Server, uploads: PyTree, weights: jax.Array
    ) -> tuple[Server, Aggregated | None]:
        if rule == "median":
            middle = aggregation.coordinate_median(uploads, weights)
        else:
            middle = aggregation.coordinate_trimmed_mean(uploads, weights, byzantine=byzantine)
        one = jax.tree.map(lambda x: x[None], middle)
        return method.aggregate(server, one, jnp.ones(1))

    refuses = {
        **method.refuses,
        **dict.fromkeys(ROBUST, "it has a robust rule already"),
        "scaffold": "its control variates would be averaged without the robust rule",
        "privacy": "a robust rule reads each client's update",
    }
    if combination == "robust_entries":
        refuses["unequal_ranks"] = (
            "most clients have nothing but zeros in the last columns, so that their median is zero"
        )
        return method._replace(aggregate=by_entries, equal_weights=True, refuses=refuses)
    return method._replace(aggregate=by_weights, refuses=refuses)
