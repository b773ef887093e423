"""FedSmoothLoRA: starts that continue a client's own state and follow its own gradient."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fedlora_jax import _linalg, aggregation, bounds, lowrank
from fedlora_jax.aggregation import Aggregated
from fedlora_jax.lora import Adapters, Params
from fedlora_jax.lowrank import Factors, Split
from fedlora_jax.methods._base import (
    Context,
    Method,
    Server,
    Start,
    Trainable,
    Trained,
    absorb,
    each_of,
    layer_kinds,
    mean,
    stacked_layers,
    unstacked_layers,
)
from fedlora_jax.names import check_choices

StartKind = Literal["paper", "exact"]
GradientKind = Literal["sketch", "dense"]

# Columns of the sketch, in ranks, and gradients taken: so many columns that few gradients do.
# Where they are as many as a kernel has, two gradients give all of it.
_COLUMNS = 8
_TURNS = 6
_EXACT_TURNS = 2


# Adapters, layers of equal shapes stacked, in the order of `layer_kinds`. State and uploads are so:
# what a round does to every array of them it then does to few.
Stacked: TypeAlias = tuple[Factors, ...]


class ClientState(NamedTuple):
    """What a client keeps: its last upload, rank r, and the round it was sent in (-1: never)."""

    upload: Stacked
    round: jax.Array


class Upload(NamedTuple):
    """What a client sends: the change of the kernels that it wishes for, rank r, and its head."""

    adapters: Stacked
    head: Params


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
      zeta_min: If it is less than zeta, zeta falls to it along half a cosine over `rounds`, and
        stays there. The authors' language code keeps 1, their image code goes from 1 to 0.
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
    check_choices(fedsmooth_lora, start=start, gradient=gradient, split=split)
    bounds.check(
        "fedsmooth_lora",
        zeta=zeta,
        zeta_min=zeta_min,
        rounds=rounds,
        gamma=gamma,
        calibration_batches=calibration_batches,
    )
    falls = zeta_min < zeta
    if falls and rounds is None:
        raise ValueError("fedsmooth_lora: zeta_min needs rounds, over which zeta falls to it")

    def zeta_of(round_index: jax.Array) -> jax.Array:
        if not falls:
            return jnp.float32(zeta)
        assert rounds is not None
        done = jnp.minimum(jnp.float32(round_index) / rounds, 1)
        return zeta_min + (zeta - zeta_min) * (1 + jnp.cos(jnp.pi * done)) / 2

    def init(key: jax.Array, server: Server) -> tuple[Server, ClientState]:
        for path, factors in server.trainable.adapters.items():
            smallest = min(factors.a.shape[0], factors.b.shape[1])
            if 2 * factors.rank > smallest:
                raise ValueError(
                    f"fedsmooth_lora needs 2 r <= min(d_in, d_out) in every layer: rank "
                    f"{factors.rank} is too large for {path!r}, whose smaller side is {smallest}"
                )
        zero = jax.tree.map(jnp.zeros_like, server.trainable.adapters)
        server = server._replace(trainable=server.trainable._replace(adapters=zero))
        memory = _stacked(zero)
        return server._replace(memory=memory), ClientState(memory, jnp.int32(-1))

    def begin(server: Server, client: ClientState, context: Context) -> Start:
        took_part = (client.round >= 0) & (client.round == server.round - 1)
        weight = jnp.where(took_part, zeta_of(server.round), 0.0)
        matching = _difference(client.upload, server.memory, weight)

        def slopes(probes: Stacked) -> Stacked:
            """The gradient for the probes, with the round-matching matrix in the model.

            It is added to them, for one product a layer instead of two, and its own is left.
            """
            at = [lowrank.concatenate(pair) for pair in zip(probes, matching, strict=True)]
            found = context.gradient(_layers(server, at), offset=None, batches=calibration_batches)
            return tuple(
                Factors(slope.a[..., : probe.rank], slope.b[..., : probe.rank, :])
                for slope, probe in zip(_stacked(found), probes, strict=True)
            )

        triplets = {"sketch": _sketched, "dense": _dense}[gradient](
            slopes, client.upload, context.key
        )

        def starts(found: lowrank.SVD, matched: Factors) -> tuple[Factors, Factors]:
            """Where the trained adapter of a layer starts, and its frozen offset."""
            own = _aligned(found, gamma)
            negative = lowrank.scaled(own, -1.0)
            if start == "exact":
                return own, lowrank.concatenate([matched, negative])
            smooth = lowrank.truncated_sum([own, matched], own.rank, split=split)
            return _first(server.round == 0, own, smooth), negative

        pairs = [each_of(starts, *nodes) for nodes in zip(triplets, matching, strict=True)]
        adapters, offset = (_layers(server, sides) for sides in zip(*pairs, strict=True))
        return Start(server.trainable._replace(adapters=adapters), offset=offset)

    def finish(
        server: Server, client: ClientState, start: Start, trained: Trained
    ) -> tuple[Upload, ClientState]:
        assert start.offset is not None
        arrived = trained.trainable

        def sent(own: Factors, frozen: Factors) -> Factors:
            return lowrank.truncated_sum([own, frozen], own.rank, split=split)

        nodes = zip(_stacked(arrived.adapters), _stacked(start.offset), strict=True)
        upload = tuple(each_of(sent, *pair) for pair in nodes)
        return Upload(upload, arrived.head), ClientState(upload, server.round)

    def aggregate(server: Server, uploads: Upload, weights: jax.Array) -> tuple[Server, Aggregated]:
        by_layer = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), uploads.adapters)
        merged = aggregation.flexlora(_layers(server, by_layer), weights, split=split).adapters
        assert merged is not None
        aggregated = Aggregated(adapters=None, residual=merged)
        server = absorb(server, aggregated, mean(uploads.head, weights))
        return server._replace(memory=_stacked(merged)), aggregated

    def own(server: Server, client: ClientState) -> Trainable:
        """Where the client ended: the backbone has become W + s G, so s (L_c - G) more."""
        here = jnp.where(client.round == server.round - 1, 1.0, 0.0)
        adapters = _layers(server, _difference(client.upload, server.memory, here))
        return server.trainable._replace(adapters=adapters)

    return Method(
        init,
        begin,
        finish,
        aggregate,
        sent=lambda upload, round_index: upload,
        received=lambda server, aggregated, round_index: (server.memory, server.trainable.head),
        missed=lambda server, aggregated, round_index, absent: [server.memory] * absent,
        unmoved=lambda server: Upload(
            jax.tree.map(jnp.zeros_like, server.memory), server.trainable.head
        ),
        personal=own,
        refuses={
            "unequal_ranks": "its gradient-aligned matrix and its truncations have one rank r",
            "fedprox": "a client starts from its own matrices, not from a server's factors",
            "scaffold": "its adapters are reset in every round, to factors of another basis",
            "server_optimizer": "its server merges the aggregate and returns no average",
            **dict.fromkeys(
                ("privacy", "robust_entries"),
                "its server reads the sum of the clients' products, not a mean of factors",
            ),
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


def _stacked(adapters: Adapters) -> Stacked:
    return tuple(factors for (factors,) in stacked_layers(adapters).values())


def _layers(server: Server, stacked: Sequence[Factors]) -> Adapters:
    """The adapters by path, in the order of the server's."""
    kinds = layer_kinds(server.trainable.adapters)
    found = unstacked_layers(dict(zip(kinds, stacked, strict=True)))
    return {path: found[path] for path in server.trainable.adapters}


def _difference(x: Stacked, y: Stacked, weight: jax.Array) -> Stacked:
    """`weight * (x - y)`."""
    pairs = zip(x, y, strict=True)
    return tuple(lowrank.scaled(lowrank.subtract(*pair), weight) for pair in pairs)


def _sketched(
    slopes: Callable[[Stacked], Stacked], like: Stacked, key: jax.Array
) -> list[lowrank.SVD]:
    """The leading 2 r singular triplets of every layer's gradient, from adapter gradients alone.

    Subspace iteration on all layers at once. A turn takes the gradient at a product of which one
    side is an orthonormal basis and the other is zero: that of the zero side is the image of the
    basis under g or its transpose, that of the basis itself is zero.
    """
    longest = max(f.a.shape[1] for f in like)
    widest = _COLUMNS * max(f.rank for f in like)
    dtype = jnp.result_type(*jax.tree.leaves(like))
    noise = jax.random.normal(key, (longest, widest), dtype)
    first, exact = [], True
    for factors in like:
        (count, d_in, _), d_out = factors.a.shape, factors.b.shape[2]
        columns = min(_COLUMNS * factors.rank, d_in, d_out)
        exact = exact and columns == min(d_in, d_out)
        bases = jnp.broadcast_to(noise[:d_in, :columns], (count, d_in, columns))
        first.append(Factors(bases, jnp.zeros((count, columns, d_out), dtype)))

    def left(factors: Factors) -> Factors:
        return Factors(jax.lax.map(lowrank.orthonormal, factors.a), jnp.zeros_like(factors.b))

    def right(factors: Factors) -> Factors:
        return lowrank.transpose(left(lowrank.transpose(factors)))

    def turn(index: jax.Array, images: Stacked) -> Stacked:
        even = index % 2 == 0
        probes = tuple(jax.lax.cond(even, left, right, f) for f in images)
        return jax.tree.map(jnp.add, probes, slopes(probes))

    last = jax.lax.fori_loop(0, _EXACT_TURNS if exact else _TURNS, turn, tuple(first))
    return [
        each_of(functools.partial(lowrank.svd, rank=2 * own.rank), image)
        for image, own in zip(last, like, strict=True)
    ]


def _dense(
    slopes: Callable[[Stacked], Stacked], like: Stacked, key: jax.Array
) -> list[lowrank.SVD]:
    """The same from whole gradients: the gradient of `b` at `a = I` is `s g`."""

    def probe(own: Factors) -> Factors:
        (count, d_in, _), d_out = own.a.shape, own.b.shape[2]
        identity = jnp.broadcast_to(jnp.eye(d_in, dtype=own.a.dtype), (count, d_in, d_in))
        return Factors(identity, jnp.zeros((count, d_in, d_out), own.b.dtype))

    def triplets(g: jax.Array, *, count: int) -> lowrank.SVD:
        u, s, v = _linalg.svd(g)
        return lowrank.SVD(u[:, :count], s[:count], v[:count])

    found = slopes(tuple(probe(own) for own in like))
    return [
        each_of(functools.partial(triplets, count=2 * own.rank), probed.b)
        for probed, own in zip(found, like, strict=True)
    ]
