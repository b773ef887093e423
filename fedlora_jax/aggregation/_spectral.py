"""Spectral selection: keep the singular directions of the mean product that carry signal."""

from typing import Literal

import jax
import jax.numpy as jnp

from fedlora_jax import bounds, lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.lowrank import Factors
from fedlora_jax.names import check_choices

Selection = Literal["energy", "noise"]

_BISECTIONS = 50


def spectral(
    stacked: PyTree,
    weights: Weights,
    *,
    selection: Selection = "energy",
    threshold: jax.Array | float = 0.99,
    rank: int | None = None,
    key: jax.Array | None = None,
) -> Aggregated:
    r"""The truncated SVD of the mean product, at a rank that the spectrum of each kernel decides.

    .. math::
      M = U S V^T, \qquad \text{adapters} = (U_{r^*},\; S_{r^*} V_{r^*}^T)

    * `selection='energy'` (FLoRIST): the fewest directions with
      :math:`\sum_{i \le r^*} \sigma_i^2 \ge \tau \lVert M \rVert_F^2`.
    * `selection='noise'`: those above ScreeNOT's threshold, which estimates the noise's spectrum
      from the singular values beyond `rank` and minimises the error of the denoised matrix.
      It sees the K r singular values of M, so it needs K r > 2 `rank` to have something to look at.
      The first direction is always kept: where all of M looks like noise, a server that kept
      nothing would throw the round away.

    When: what goes down must shrink with what was learned. A flat spectrum (many clients that
    disagree) has no energy threshold that helps.

    Arrays cannot change their shape with the data: the result has the fixed rank `rank`. Columns
    beyond :math:`r^*` are Gaussian in `a` (of norm about one, as the others) and zero in `b`, free
    for the next round; count :math:`r^*` columns as sent.

    Cost: as `flexlora`; `'noise'` needs all K r singular values. Up a kernel:
    :math:`r_k (d_{in} + d_{out})`; down: :math:`r^* (d_{in} + d_{out})`.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.
      selection: `'energy'` or `'noise'`.
      threshold: tau of `'energy'`, in (0, 1].
      rank: Rank of the result and most directions that are kept; by default that of `stacked`.
      key: Random key of the Gaussian columns, the same for every kernel; a fixed one by default.

    Returns:
      `Aggregated(adapters, None)`.

    Raises:
      ValueError: On an unknown selection or an impossible rank, or weights or factors that cannot
        be used, see `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> client = Factors(jnp.eye(4)[:, :2], jnp.array([[9., 0., 0.], [0., 1., 0.]]))
      >>> stacked = aggregation.stack([{'dense': client}])
      >>> kept = aggregation.spectral(stacked, jnp.ones(1), threshold=0.9).adapters['dense']
      >>> print(jnp.round(jnp.linalg.norm(kept.b, axis=1), 4))
      [9. 0.]

    References:
      *FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of
      Large Language Models*, arXiv:2506.09199. Donoho, Gavish, Romanov, *ScreeNOT: Exact
      MSE-optimal singular value thresholding in correlated noise*, Annals of Statistics 2023.
    """
    check_choices(spectral, selection=selection)
    _base.check_rank("spectral", rank, stacked)
    bounds.check("spectral", threshold=threshold)
    key = jax.random.key(0) if key is None else key
    return _base.run(
        _spectral,
        stacked,
        weights,
        arrays={"threshold": jnp.asarray(threshold, jnp.float32), "key": key},
        selection=selection,
        rank=rank,
    )


def _spectral(
    clients: Factors,
    weights: jax.Array,
    *,
    threshold: jax.Array,
    key: jax.Array,
    selection: Selection,
    rank: int | None,
) -> Aggregated:
    ideal = lowrank.weighted_sum(clients, weights)
    rank = clients.rank if rank is None else rank
    best = lowrank.truncate(ideal, rank)
    # The singular values, in a unit in which they can be squared: `a` is orthonormal.
    unit = lowrank.power_of_two(best.b)[0]
    s = lowrank.safe_sqrt(jnp.sum((best.b / unit) ** 2, axis=1))
    if selection == "energy":
        # Not by Gram blocks: of clients that cancel nothing would be left of it but rounding.
        total = jnp.maximum((lowrank.norm(ideal) / unit) ** 2, jnp.sum(s**2))
        before = jnp.cumsum(s**2) - s**2
        keep = (before < threshold.astype(s.dtype) * total) & (s > 0)
    else:
        values = lowrank.singular_values(ideal) / unit
        noise_level = _screenot(values, max(clients.a.shape[1], clients.b.shape[2]), rank)
        keep = (s > noise_level) | (jnp.arange(len(s)) == 0)
    d_in = best.a.shape[0]
    noise = jax.random.normal(key, best.a.shape, best.a.dtype) * d_in**-0.5
    kept = Factors(jnp.where(keep, best.a, noise), jnp.where(keep[:, None], best.b, 0))
    return Aggregated(adapters=kept, residual=None)


def _screenot(s: jax.Array, columns: int, bound: int) -> jax.Array:
    """ScreeNOT's threshold for singular values `s`, descending, of which `bound` may be signal.

    The leading values are replaced by what noise would show there; then the threshold T is the
    root of `Psi(T) = -4`, Psi being the logarithmic derivative of the noise's D-transform.
    """
    count = len(s)
    bound = min(bound, (count - 1) // 2)
    if bound:
        step = (s[bound] - s[2 * bound]) / (2 ** (2 / 3) - 1)
        imputed = s[bound] + step * (1 - (jnp.arange(bound) / bound) ** (2 / 3))
        s = jnp.concatenate([imputed.astype(s.dtype), s[bound:]])
    unit = jnp.where(s[0] > 0, s[0], 1)
    z = s / unit
    gamma = count / max(columns, count)

    def psi(y: jax.Array) -> jax.Array:
        phi = jnp.mean(y / (y**2 - z**2))
        slope = -jnp.mean((y**2 + z**2) / (y**2 - z**2) ** 2)
        other = gamma * phi + (1 - gamma) / y
        return y * (slope / phi + (gamma * slope - (1 - gamma) / y**2) / other)

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        below = psi(middle) < -4
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    ends = jnp.full_like(unit, 1 + 1e-5), jnp.full_like(unit, 10.0)
    return jax.lax.fori_loop(0, _BISECTIONS, halve, ends)[1] * jnp.where(s[0] > 0, unit, 0)
