"""What the clients' updates look like, and how an aggregate stands to them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedlora_jax import lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree
from fedlora_jax.aggregation._error import shared
from fedlora_jax.lowrank import Factors


class Diagnostics(NamedTuple):
    """Of one kernel, or of the whole tree (there `spectrum` is None).

    Attributes:
      spectrum: Singular values of the ideal update, descending, `[min(K r, d_in, d_out)]`.
      effective_rank: `exp(entropy(s / sum(s)))` of them: how many directions the ideal has. Over
        the tree the mean of the kernels'.
      norm: Frobenius norm of the ideal update.
      dropped: `|M - SVD_r(M)| / |M|`: the share of the ideal that no adapter of rank r can hold, in
        the unit of `error`, which is never below it for a server that returns such.
      drift_a: `sqrt(sum_k p_k |a_k - mean a|^2) / |mean a|`: how far clients' `a` are apart.
      drift_b: The same of `b`.
      error: As `aggregation.error`; this and the following are None without an aggregate.
      cosine: Cosine of the product (with the residual) to the ideal.
      cosine_a: Cosine of the aggregate's `a` to the mean `a`; None without adapters.
      cosine_b: The same of `b`: what a correction has changed.
    """

    spectrum: jax.Array | None
    effective_rank: jax.Array
    norm: jax.Array
    dropped: jax.Array
    drift_a: jax.Array
    drift_b: jax.Array
    error: jax.Array | None = None
    cosine: jax.Array | None = None
    cosine_a: jax.Array | None = None
    cosine_b: jax.Array | None = None


def diagnostics(
    stacked: PyTree,
    weights: jax.Array,
    aggregated: Aggregated | None = None,
    *,
    rank: int | None = None,
) -> tuple[Diagnostics, dict[str, Diagnostics]]:
    """Describes the ideal update of a round, and an aggregate beside it.

    Cost: as `lowrank.singular_values`.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.
      aggregated: What an aggregation function returned for them.
      rank: r of `dropped`; by default that of the clients' adapters.

    Returns:
      Of the whole tree, and a dict from kernel path to that of one kernel.

    Raises:
      ValueError: As `aggregation.error`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> stacked = {'dense': Factors(jnp.array([[[1.]], [[3.]]]), jnp.array([[[1.]], [[3.]]]))}
      >>> whole, kernels = aggregation.diagnostics(stacked, jnp.ones(2))
      >>> print(kernels['dense'].spectrum, whole.drift_a)  # means 2, deviations 1
      [5.] 0.5
    """
    given = aggregated if aggregated is not None else Aggregated(None, None)
    trees = [part for part in given if part is not None]
    rows = _base.each_kernel(
        _describe, stacked, weights, trees=trees, adapted=given.adapters is not None, rank=rank
    )
    kernels = {
        name: _ratios(moments, spectrum=spectrum, effective_rank=rank)
        for name, (moments, spectrum, rank) in zip(_base.names(stacked), rows, strict=True)
    }
    sums = jax.tree.map(lambda *x: jnp.sum(jnp.stack(x)), *(moments for moments, _, _ in rows))
    ranks = jnp.mean(jnp.stack([rank for _, _, rank in rows]))
    return _ratios(sums, spectrum=None, effective_rank=ranks), kernels


class _Moments(NamedTuple):
    """Squares and inner products, which add up over kernels."""

    ideal: jax.Array
    dropped: jax.Array
    spread_a: jax.Array
    spread_b: jax.Array
    mean_a: jax.Array
    mean_b: jax.Array
    distance: jax.Array | None = None
    reached: jax.Array | None = None
    alignment: jax.Array | None = None
    a: jax.Array | None = None
    b: jax.Array | None = None
    along_a: jax.Array | None = None
    along_b: jax.Array | None = None


def _describe(
    clients: Factors, weights: jax.Array, *parts: Factors, adapted: bool, rank: int | None
) -> tuple[_Moments, jax.Array, jax.Array]:
    ideal = lowrank.weighted_sum(clients, weights)
    average = lowrank.mean(clients, weights)
    spectrum = lowrank.singular_values(ideal)
    total = jnp.sum(spectrum)
    shares = spectrum / jnp.where(total > 0, total, 1)
    logs = jnp.log(jnp.where(shares > 0, shares, 1))
    effective = jnp.where(total > 0, jnp.exp(-jnp.sum(shares * logs)), 0)
    dropped = lowrank.vector_norm(spectrum[rank or clients.rank :]) ** 2
    spread = [
        jnp.einsum("k,kij->", weights, (x - mean) ** 2)
        for x, mean in zip(clients, average, strict=True)
    ]
    moments = _Moments(
        lowrank.norm(ideal) ** 2, dropped, *spread, *(jnp.sum(x**2) for x in average)
    )
    if parts:
        parts = tuple(shared(part, weights) for part in parts)
        reached = lowrank.concatenate(parts)
        moments = moments._replace(
            distance=lowrank.norm(lowrank.subtract(ideal, reached)) ** 2,
            reached=lowrank.norm(reached) ** 2,
            alignment=lowrank.inner(ideal, reached),
        )
    if adapted and parts[0].rank == average.rank:
        a, b = parts[0]
        moments = moments._replace(
            a=jnp.sum(a**2),
            b=jnp.sum(b**2),
            along_a=jnp.sum(a * average.a),
            along_b=jnp.sum(b * average.b),
        )
    return moments, spectrum, effective


def _ratios(m: _Moments, *, spectrum: jax.Array | None, effective_rank: jax.Array) -> Diagnostics:
    def ratio(x: jax.Array, y: jax.Array) -> jax.Array:
        return x / jnp.where(y > 0, y, 1)

    def cosine(along: jax.Array | None, x: jax.Array | None, y: jax.Array) -> jax.Array | None:
        if along is None or x is None:
            return None
        return ratio(along, lowrank.safe_sqrt(x) * lowrank.safe_sqrt(y))

    root = lowrank.safe_sqrt
    return Diagnostics(
        spectrum=spectrum,
        effective_rank=effective_rank,
        norm=root(m.ideal),
        dropped=ratio(root(m.dropped), root(m.ideal)),
        drift_a=ratio(root(m.spread_a), root(m.mean_a)),
        drift_b=ratio(root(m.spread_b), root(m.mean_b)),
        error=None if m.distance is None else ratio(root(m.distance), root(m.ideal)),
        cosine=cosine(m.alignment, m.reached, m.ideal),
        cosine_a=cosine(m.along_a, m.a, m.mean_a),
        cosine_b=cosine(m.along_b, m.b, m.mean_b),
    )
