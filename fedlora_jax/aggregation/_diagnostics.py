"""What the clients' updates look like, and how an aggregate stands to them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedlora_jax import lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
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
    weights: Weights,
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
        name: _ratios(sizes, spectrum=spectrum, effective_rank=rank)
        for name, (sizes, spectrum, rank) in zip(_base.names(stacked), rows, strict=True)
    }
    every = jax.tree.map(lambda *x: jnp.stack(x), *(sizes for sizes, _, _ in rows))
    ranks = jnp.mean(jnp.stack([rank for _, _, rank in rows]))
    return _ratios(every, spectrum=None, effective_rank=ranks), kernels


class _Pair(NamedTuple):
    """Two things of a kernel by their norms, and the cosine between them."""

    one: jax.Array
    other: jax.Array
    cosine: jax.Array


class _Sizes(NamedTuple):
    """Norms of a kernel, or of several with a leading axis; none of them is ever squared."""

    ideal: jax.Array
    dropped: jax.Array
    spread_a: jax.Array
    spread_b: jax.Array
    mean_a: jax.Array
    mean_b: jax.Array
    distance: jax.Array | None = None
    product: _Pair | None = None
    a: _Pair | None = None
    b: _Pair | None = None


def _describe(
    clients: Factors, weights: jax.Array, *parts: Factors, adapted: bool, rank: int | None
) -> tuple[_Sizes, jax.Array, jax.Array]:
    ideal = lowrank.weighted_sum(clients, weights)
    average = lowrank.mean(clients, weights)
    spectrum = lowrank.singular_values(ideal)
    unit = lowrank.power_of_two(spectrum)
    total = jnp.sum(spectrum / unit)
    shares = spectrum / unit / jnp.where(total > 0, total, 1)
    logs = jnp.log(jnp.where(shares > 0, shares, 1))
    effective = jnp.where(total > 0, jnp.exp(-jnp.sum(shares * logs)), 0)
    sizes = _Sizes(
        lowrank.norm(ideal),
        lowrank.vector_norm(spectrum[rank or clients.rank :]),
        _spread(clients.a, average.a, weights),
        _spread(clients.b, average.b, weights),
        lowrank.vector_norm(average.a),
        lowrank.vector_norm(average.b),
    )
    if parts:
        parts = tuple(shared(part, weights) for part in parts)
        reached = lowrank.concatenate(parts)
        sizes = sizes._replace(
            distance=lowrank.norm(lowrank.subtract(ideal, reached)),
            product=_products(reached, ideal),
        )
    if adapted and parts[0].rank == average.rank:
        a, b = parts[0]
        sizes = sizes._replace(a=_arrays(a, average.a), b=_arrays(b, average.b))
    return sizes, spectrum, effective


def _spread(clients: jax.Array, mean: jax.Array, weights: jax.Array) -> jax.Array:
    """The root of the weighted mean of `|x_k - mean|^2`."""
    apart = jnp.where(weights[:, None, None] > 0, clients - mean, 0)
    unit = lowrank.power_of_two(apart)[0, 0, 0]
    return unit * lowrank.safe_sqrt(lowrank.einsum("k,kij->", weights, (apart / unit) ** 2))


def _products(x: Factors, y: Factors) -> _Pair:
    """Two products of one kernel."""
    sizes = lowrank.norm(x), lowrank.norm(y)
    (x, one), (y, other) = (_near_one(*pair) for pair in zip((x, y), sizes, strict=True))
    return _Pair(*sizes, _ratio(_ratio(lowrank.inner(x, y), one), other))


def _near_one(factors: Factors, size: jax.Array) -> tuple[Factors, jax.Array]:
    """Factors without their size, and what is left of that of their product."""
    small, units = lowrank.of_size_one(factors)
    return small, size / units.a[0, 0] / units.b[0, 0]


def _arrays(x: jax.Array, y: jax.Array) -> _Pair:
    sizes = lowrank.vector_norm(x), lowrank.vector_norm(y)
    return _Pair(*sizes, jnp.sum(_ratio(x, sizes[0]) * _ratio(y, sizes[1])))


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    return x / jnp.where(y > 0, y, 1)


def _cosine(pair: _Pair | None) -> jax.Array | None:
    """Of all kernels together."""
    if pair is None:
        return None
    one, other = (_ratio(x, lowrank.vector_norm(x)) for x in (pair.one, pair.other))
    return jnp.sum(one * other * pair.cosine)


def _ratios(sizes: _Sizes, *, spectrum: jax.Array | None, effective_rank: jax.Array) -> Diagnostics:
    def relative(x: jax.Array, y: jax.Array) -> jax.Array:
        return _ratio(lowrank.vector_norm(x), lowrank.vector_norm(y))

    return Diagnostics(
        spectrum=spectrum,
        effective_rank=effective_rank,
        norm=lowrank.vector_norm(sizes.ideal),
        dropped=relative(sizes.dropped, sizes.ideal),
        drift_a=relative(sizes.spread_a, sizes.mean_a),
        drift_b=relative(sizes.spread_b, sizes.mean_b),
        error=None if sizes.distance is None else relative(sizes.distance, sizes.ideal),
        cosine=_cosine(sizes.product),
        cosine_a=_cosine(sizes.a),
        cosine_b=_cosine(sizes.b),
    )
