"""FedSmoothLoRA: starts that continue a client's own state and follow its own gradient."""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from fedlora_jax import _linalg, aggregation, lowrank
from fedlora_jax.aggregation import Aggregated
from fedlora_jax.lora import Adapters
from fedlora_jax.lowrank import Factors, Split
from fedlora_jax.methods._base import (
    Context,
    Kind,
    Method,
    Server,
    Start,
    Trainable,
    Trained,
    absorb,
    each_layer,
    mean,
    stacked_layers,
    unstacked_layers,
)
from fedlora_jax.names import lookup

StartKind = Literal["paper", "exact"]
GradientKind = Literal["sketch", "dense"]

# Columns of the sketch, in ranks, and gradients taken: so many columns that few gradients do.
# Where they are as many as a kernel has, two gradients give all of it.
_COLUMNS = 8
_TURNS = 6
_EXACT_TURNS = 2


class ClientState(NamedTuple):
    """What a client keeps: its last upload, rank r, and the round it was sent in (-1: never)."""

    upload: Adapters
    round: jax.Array


def fedsmooth_lora(
    *,
    zeta: float = 1.0,
    zeta_min: float = 1.0,
    rounds: int | None = None,
    gamma: float = 256.0,
    calibration_batches: int = 8,
    split: Split = "balanced",
    start: StartKind = "paper",
    gradient: GradientKind = "sketch",
) -> Method:
    r"""Clients start between their own last state and the gradient of their own data.

    In round t, with G the last aggregate and :math:`L_c` the client's own last upload (both zero
    at first, and their difference zero for a client that sat out the last round),

    * round-matching matrix :math:`R = L_c - G`, times :math:`\zeta_t`;
    * g, the gradient of the loss for a whole kernel at :math:`W + s \zeta_t R`, has singular
      vectors U, V; gradient-aligned matrix :math:`A = a_g b_g` with
      :math:`a_g = d_{out}^{1/4} \gamma^{-1/2} U_{1..r}` and
      :math:`b_g = d_{out}^{1/4} \gamma^{-1/2} V_{r+1..2r}^T`;
    * the frozen weight is :math:`W - s A`; the trained adapter starts at :math:`(a_g, b_g)` in the
      first round, and then at :math:`SVD_r(A + \zeta_t R)`;
    * upload :math:`L_c = SVD_r(a b - A)`; the server takes :math:`G = SVD_r(\sum_c p_c L_c)` and
      merges it, :math:`W \leftarrow W + s G`.

    The sign of a singular vector is the one that makes the sum of the cubes of its entries
    positive: the SVD leaves it open, but training depends on it.

    The frozen :math:`- s A` is a second, untrained adapter, not a backbone a client. The singular
    vectors come from LoRA-sized gradients: that of `b` at :math:`a = \Omega, b = 0` is
    :math:`s \Omega^T g`, that of `a` at :math:`a = 0, b = Q^T` is :math:`s g Q`. Six of them, of
    8 r columns, are a subspace iteration that is as exact as one of 4 r columns and ten: error of A
    5e-4 for singular values 1 / i, at r = 4 to 32. It costs six forward and backward passes over
    the calibration batches and nothing of the size of a kernel; two passes where 8 r reaches the
    smaller side of every kernel, and the result is exact.

    Up and down a kernel: :math:`r (d_{in} + d_{out})`.

    Args:
      zeta: :math:`\zeta_0`, the weight of the round-matching matrix. With 1, and but for the
        truncations, a client restarts exactly where it ended.
      zeta_min: If it is less than zeta, zeta falls to it along half a cosine over `rounds`. The
        authors' language code keeps 1, their image code goes from 1 to 0.
      rounds: T of that cosine.
      gamma: Damps the gradient-aligned matrix; the paper has 256 for images, 64 for language.
      calibration_batches: Batches of the client's own data in the gradient estimate, at most one
        pass over them.
      split: Where `SVD_r` puts the singular values: `'balanced'` (the authors' image code), or
        `'right'`, on our `b` (their language code).
      start: `'paper'`, or `'exact'`: nothing is truncated, the offset is
        :math:`s (\zeta_t R - A)` and the trained adapter starts at :math:`(a_g, b_g)` always.
      gradient: `'sketch'`, or `'dense'`: the whole g, to check the sketch with.

    Raises:
      ValueError: On an unknown option, a zeta that falls without rounds, or, when the federation is
        made, a layer with :math:`2 r > \min(d_{in}, d_{out})`.

    References:
      *FedSmoothLoRA*, arXiv:2605.29460. The sketch and `start='exact'` are ours.
    """
    for name, value, kind in (
        ("start", start, StartKind),
        ("gradient", gradient, GradientKind),
        ("split", split, Split),
    ):
        lookup(dict.fromkeys(get_args(kind)), value, name)
    falls = zeta_min < zeta
    if falls and rounds is None:
        raise ValueError("fedsmooth_lora: zeta_min needs rounds, over which zeta falls to it")

    def zeta_of(round_index: jax.Array) -> jax.Array:
        if not falls:
            return jnp.float32(zeta)
        assert rounds is not None
        return zeta_min + (zeta - zeta_min) * (1 + jnp.cos(jnp.pi * round_index / rounds)) / 2

    def init(key: jax.Array, server: Server) -> tuple[Server, ClientState]:
        for path, factors in server.trainable.adapters.items():
            smallest = min(factors.a.shape[0], factors.b.shape[1])
            if 2 * factors.rank > smallest:
                raise ValueError(
                    f"fedsmooth_lora needs 2 r <= min(d_in, d_out) in every layer: rank "
                    f"{factors.rank} is too large for {path!r}, whose smaller side is {smallest}"
                )
        zero = jax.tree.map(jnp.zeros_like, server.trainable.adapters)
        server = server._replace(trainable=server.trainable._replace(adapters=zero), memory=zero)
        return server, ClientState(zero, jnp.int32(-1))

    def begin(server: Server, client: ClientState, context: Context) -> Start:
        took_part = (client.round >= 0) & (client.round == server.round - 1)
        weight = jnp.where(took_part, zeta_of(server.round), 0.0)
        matching = {
            path: lowrank.scaled(lowrank.subtract(upload, server.memory[path]), weight)
            for path, upload in client.upload.items()
        }
        estimate = functools.partial(context.gradient, offset=matching, batches=calibration_batches)
        triplets = {"sketch": _sketched, "dense": _dense}[gradient](
            estimate, client.upload, context.key
        )

        def starts(found: lowrank.SVD, matched: Factors) -> tuple[Factors, Factors]:
            """Where the trained adapter of a layer starts, and its frozen offset."""
            own = _aligned(found, gamma)
            negative = lowrank.scaled(own, -1.0)
            if start == "exact":
                return own, lowrank.concatenate([matched, negative])
            smooth = lowrank.truncated_sum([own, matched], own.rank, split=split)
            return _first(server.round == 0, own, smooth), negative

        pairs = each_layer(starts, triplets, matching)
        adapters = {path: pair[0] for path, pair in pairs.items()}
        offset = {path: pair[1] for path, pair in pairs.items()}
        return Start(server.trainable._replace(adapters=adapters), offset=offset)

    def finish(
        server: Server, client: ClientState, start: Start, trained: Trained
    ) -> tuple[Trainable, ClientState]:
        assert start.offset is not None
        arrived = trained.trainable

        def sent(own: Factors, frozen: Factors) -> Factors:
            return lowrank.truncated_sum([own, frozen], own.rank, split=split)

        upload = each_layer(sent, arrived.adapters, start.offset)
        return Trainable(upload, arrived.head), ClientState(upload, server.round)

    def aggregate(
        server: Server, uploads: Trainable, weights: jax.Array
    ) -> tuple[Server, Aggregated]:
        shares = aggregation.shares(weights)

        def together(stacked: Factors) -> Factors:
            present = shares[:, None, None] > 0
            clean = Factors(*(jnp.where(present, x, 0) for x in stacked))
            return lowrank.truncate(lowrank.weighted_sum(clean, shares), stacked.rank, split=split)

        merged = each_layer(together, uploads.adapters)
        aggregated = Aggregated(adapters=None, residual=merged)
        server = absorb(server, aggregated, mean(uploads.head, weights))
        return server._replace(memory=merged), aggregated

    def own(server: Server, client: ClientState) -> Trainable:
        """Where the client ended: the backbone has become W + s G, so s (L_c - G) more."""
        here = jnp.where(client.round == server.round - 1, 1.0, 0.0)
        adapters = {
            path: lowrank.scaled(lowrank.subtract(upload, server.memory[path]), here)
            for path, upload in client.upload.items()
        }
        return server.trainable._replace(adapters=adapters)

    return Method(
        init,
        begin,
        finish,
        aggregate,
        sent=lambda upload, round_index: upload,
        received=lambda server, aggregated, round_index: (server.memory, server.trainable.head),
        missed=lambda server, aggregated, round_index, absent: [server.memory] * absent,
        personal=own,
        refuses={
            "unequal_ranks": "its gradient-aligned matrix and its truncations have one rank r",
            "fedprox": "a client starts from its own matrices, not from a server's factors",
            "scaffold": "its adapters are reset in every round, to factors of another basis",
            "server_optimizer": "its server merges the aggregate and returns no average",
            "privacy": "its server reads the sum of the clients' products, not a mean of factors",
        },
    )


def _aligned(triplets: lowrank.SVD, gamma: float) -> Factors:
    """Input-side singular vectors 1..r with output-side ones r+1..2r, at one length."""
    rank, d_out = triplets.s.shape[0] // 2, triplets.v.shape[1]
    length = d_out**0.25 / math.sqrt(gamma)
    a, b = _signed(triplets.u[:, :rank]), _signed(triplets.v[rank:].T).T
    return Factors(length * a, length * b)


def _signed(columns: jax.Array) -> jax.Array:
    """Each column with the sign that makes the sum of the cubes of its entries positive."""
    return jnp.where(jnp.sum(columns**3, axis=0) < 0, -columns, columns)


def _first(condition: jax.Array, x: Factors, y: Factors) -> Factors:
    return jax.tree.map(lambda one, other: jnp.where(condition, one, other), x, y)


def _sketched(
    estimate: Callable[[Adapters], Adapters], like: Adapters, key: jax.Array
) -> dict[str, lowrank.SVD]:
    """The leading 2 r singular triplets of every layer's gradient, from adapter gradients alone.

    Subspace iteration on all layers at once. A turn takes the gradient at a product of which one
    side is an orthonormal basis and the other is zero: that of the zero side is the image of the
    basis under g or its transpose, that of the basis itself is zero.
    """
    kinds = {kind: factors for kind, (factors,) in stacked_layers(like).items()}
    longest = max(f.a.shape[1] for f in kinds.values())
    widest = _COLUMNS * max(f.rank for f in kinds.values())
    noise = jax.random.normal(key, (longest, widest))
    first, exact = {}, True
    for kind, factors in kinds.items():
        (count, d_in, _), d_out = factors.a.shape, factors.b.shape[2]
        columns = min(_COLUMNS * factors.rank, d_in, d_out)
        exact = exact and columns == min(d_in, d_out)
        bases = jnp.broadcast_to(noise[:d_in, :columns], (count, d_in, columns))
        first[kind] = Factors(bases, jnp.zeros((count, columns, d_out)))

    def left(factors: Factors) -> Factors:
        return Factors(jax.lax.map(lowrank.orthonormal, factors.a), jnp.zeros_like(factors.b))

    def right(factors: Factors) -> Factors:
        return lowrank.transpose(left(lowrank.transpose(factors)))

    def turn(index: jax.Array, images: dict[Kind, Factors]) -> dict[Kind, Factors]:
        even = index % 2 == 0
        probes = {kind: jax.lax.cond(even, left, right, f) for kind, f in images.items()}
        slopes = stacked_layers(estimate(unstacked_layers(probes)))
        return {
            kind: jax.tree.map(jnp.add, probes[kind], slope) for kind, (slope,) in slopes.items()
        }

    last = jax.lax.fori_loop(0, _EXACT_TURNS if exact else _TURNS, turn, first)
    return each_layer(
        lambda image, own: lowrank.svd(image, 2 * own.rank), unstacked_layers(last), like
    )


def _dense(
    estimate: Callable[[Adapters], Adapters], like: Adapters, key: jax.Array
) -> dict[str, lowrank.SVD]:
    """The same from whole gradients: the gradient of `b` at `a = I` is `s g`."""
    probes = {
        path: Factors(jnp.eye(f.a.shape[0]), jnp.zeros((f.a.shape[0], f.b.shape[1])))
        for path, f in like.items()
    }

    def triplets(probed: Factors, own: Factors) -> lowrank.SVD:
        u, s, v = _linalg.svd(probed.b)
        return lowrank.SVD(u[:, : 2 * own.rank], s[: 2 * own.rank], v[: 2 * own.rank])

    return each_layer(triplets, estimate(probes), like)
