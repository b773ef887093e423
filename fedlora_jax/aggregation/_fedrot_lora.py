"""FedRot-LoRA: rotate the clients' factors into one frame before they are averaged."""

import functools

import jax
import jax.numpy as jnp

from fedlora_jax import _linalg, bounds, lowrank
from fedlora_jax.aggregation import _base
from fedlora_jax.aggregation._base import Aggregated, PyTree, Weights
from fedlora_jax.aggregation._fedit import _fedit
from fedlora_jax.aggregation._rolora import is_b
from fedlora_jax.lowrank import Factors, matmul


def fedrot_lora(
    stacked: PyTree,
    weights: Weights,
    *,
    reference: PyTree,
    aligned: str | jax.Array | bool = "a",
    strength: jax.Array | float = 1.0,
    reflections: bool = False,
) -> Aggregated:
    r"""Rotates each client's factors towards the last global ones, then averages.

    A product :math:`a b = (a R)(R^T b)` leaves the rotation R free, and clients drift apart in it;
    their mean then cancels what they have in common. For each client

    .. math::
      R_k = \arg\min_{R^T R = I,\, \det R = 1} \lVert a_k R - a_{ref} \rVert_F
      \;\text{ or }\; \lVert R^T b_k - b_{ref} \rVert_F, \qquad
      \text{adapters} = \Big(\sum_k p_k a_k R_k,\; \sum_k p_k R_k^T b_k\Big)

    Authors align `a` in odd rounds and `b` in even ones. The soft version takes the orthogonal
    matrix nearest to :math:`(1 - \lambda) I + \lambda R_k`. With any lambda above 1, and they ship
    1.5, their code does something else, which is `reflections=True` here: lambda is not used, and
    R may have determinant -1. What of R the factors leave open (both are zero there, or of
    deficient rank) is as near to the identity as can be. No client's product changes; the product
    of the means is still biased, usually less than FedIT's.

    Cost: :math:`O(K r^2 (d_{in} + d_{out}) + K r^3)`. Up and down a kernel:
    :math:`r (d_{in} + d_{out})`, as FedIT.

    Args:
      stacked: Adapter tree of `Factors(a [K, d_in, r], b [K, r, d_out])`.
      weights: `[K]`, non-negative; normalised inside.
      reference: Adapter tree of `Factors(a [d_in, r], b [r, d_out])`, the last global factors.
        Where the factor to be aligned is zero (`b` at the start) nothing is rotated.
      aligned: `'a'` or `'b'`; or, where the round is a traced value, a boolean: whether `b` is.
      strength: lambda, from 0 (FedIT) to 1.
      reflections: Whether R may be a reflection too.

    Returns:
      `Aggregated(adapters, None)`.

    Raises:
      ValueError: On a reference of other kernels or a larger rank, an unknown factor, a strength
        outside of 0 to 1, or weights or factors that cannot be used, see `fedlora_jax.aggregation`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from fedlora_jax import Factors, aggregation
      >>> turn = jnp.array([[0., 1.], [-1., 0.]])
      >>> one = Factors(jnp.array([[1., 0.], [0., 2.]]), jnp.array([[3., 1.], [0., 1.]]))
      >>> two = Factors(one.a @ turn, turn.T @ one.b)  # the same product
      >>> stacked = aggregation.stack([{'dense': one}, {'dense': two}])
      >>> mean = aggregation.fedrot_lora(stacked, jnp.ones(2), reference={'dense': one})
      >>> bool(jnp.allclose(mean.adapters['dense'].a, one.a, atol=1e-5))
      True

    References:
      *FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA*, 2026.
    """
    bounds.check("fedrot_lora", strength=strength)
    return _base.run(
        _fedrot_lora,
        stacked,
        weights,
        trees=[reference],
        arrays={
            "b_aligned": is_b(aligned, "aligned factor"),
            "strength": jnp.asarray(strength, jnp.float32),
        },
        reflections=reflections,
    )


def _fedrot_lora(
    clients: Factors,
    weights: jax.Array,
    reference: Factors,
    *,
    b_aligned: jax.Array,
    strength: jax.Array,
    reflections: bool,
) -> Aggregated:
    # A rotation does not depend on the size of either.
    reference, _ = lowrank.of_size_one(lowrank.pad(reference, clients.rank))
    strength = strength.astype(weights.dtype)
    identity = jnp.eye(clients.rank, dtype=weights.dtype)

    def rotate(client: Factors) -> Factors:
        (a, b), _ = lowrank.of_size_one(client)
        core = jnp.where(b_aligned, matmul(b, reference.b.T), matmul(a.T, reference.a))
        turn = _nearest_rotation(core, reflections)
        soft = _nearest_rotation((1 - strength) * identity + strength * turn, True)
        turn = jnp.where(strength < 1, soft, turn)
        return Factors(matmul(client.a, turn), matmul(turn.T, client.b))

    return _fedit(jax.vmap(rotate)(clients), weights)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _nearest_rotation(core: jax.Array, reflections: bool) -> jax.Array:
    """The R that maximises `trace(R^T core)`: orthogonal, and det R = 1 unless `reflections`."""
    return _rotation_and_frame(core, reflections)[0]


def _rotation_and_frame(core: jax.Array, reflections: bool) -> tuple[jax.Array, ...]:
    """`R = u v`, and the singular values s of the core in these bases."""
    # Where both are padded by zeros R is the identity, by an entry above all singular values.
    size = lowrank.vector_norm(core)
    padded = jnp.all(core == 0, axis=0) & jnp.all(core == 0, axis=1)
    core += jnp.diag(jnp.where(padded, jnp.where(size > 0, 2 * size, 1), 0))
    # Rows and columns of very different size are kept apart by a decomposition of large ones first.
    rows, columns = (jnp.max(jnp.abs(core), axis=axis) for axis in (1, 0))
    row_order, column_order = jnp.argsort(-rows), jnp.argsort(-columns)
    u, s, v = _linalg.svd(core[row_order][:, column_order])
    u, v = jnp.zeros_like(u).at[row_order].set(u), jnp.zeros_like(v).at[:, column_order].set(v)
    # A core of deficient rank leaves R free in part: there it is the one nearest to the identity.
    # Singular values of `among` are one, but for those of that part; its directions do not mix.
    # Rounding is that of the rows and columns which the direction is made of.
    sizes = matmul(rows, jnp.abs(u)), matmul(jnp.abs(v), columns)
    rounding = len(s) * jnp.finfo(s.dtype).eps * sizes[0] * (sizes[1] / s[0])
    free = (s <= rounding) | (s == 0)
    s = jnp.where(free, 0, s)
    here = u * free
    among = matmul(u * ~free, v) + matmul(matmul(here, here.T), matmul(v.T * free, v))
    left, _, right = _linalg.svd(among)
    u = matmul(matmul(left, right), v.T)
    if not reflections:
        sign = jnp.where(_linalg.det(matmul(u, v)) < 0, -1.0, 1.0).astype(core.dtype)
        u, s = u.at[:, -1].multiply(sign), s.at[-1].multiply(sign)
    return matmul(u, v), u, s, v


@_nearest_rotation.defjvp
@_linalg.numpy_promotion()
def _nearest_rotation_jvp(
    reflections: bool, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    rotation, u, s, v = _rotation_and_frame(*primals, reflections)
    inner = matmul(matmul(u.T, tangents[0]), v.T)
    sums = s[:, None] + s
    good = jnp.abs(sums) > 1e-6 * s[0]
    turning = jnp.where(good, (inner - inner.T) / jnp.where(good, sums, 1), 0)
    return rotation, matmul(matmul(u, turning), v)
