"""A batch over many small things whose results are taken apart again."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Devices(NamedTuple):
    """An axis of a mesh along which rows are dealt out."""

    mesh: Mesh
    axis: str


class Dealer:
    """Deals rows out to devices, arrays that it has dealt before only once."""

    def __init__(self, devices: Devices):
        self.devices = devices
        self._dealt: dict[tuple[int, ...], tuple[Sequence[jax.Array], jax.Array]] = {}

    def deal(self, rows: Sequence[Any]) -> Any:
        """The rows `[n, ...]`, each on one device; n is filled up to a multiple of the devices."""
        return jax.tree.map(lambda *arrays: self._once(arrays), *rows)

    def collect(self, dealt: Any, count: int) -> list[Any]:
        """So many rows of what devices found for theirs, on every device.

        Dealt out again they are where they were.
        """
        everywhere = NamedSharding(self.devices.mesh, PartitionSpec())
        whole = jax.lax.with_sharding_constraint(dealt, everywhere)
        rows = [jax.tree.map(lambda x, i=i: x[i], whole) for i in range(count)]

        def keep(stacked: jax.Array, *arrays: jax.Array) -> None:
            self._dealt[tuple(map(id, arrays))] = arrays, stacked

        jax.tree.map(keep, dealt, *rows)
        return rows

    def _once(self, arrays: Sequence[jax.Array]) -> jax.Array:
        key = tuple(map(id, arrays))
        if key not in self._dealt:
            mesh, axis = self.devices
            count = -(-len(arrays) // mesh.shape[axis]) * mesh.shape[axis]
            stacked = jnp.stack([arrays[i % len(arrays)] for i in range(count)])
            rows = NamedSharding(mesh, PartitionSpec(axis))
            # With the arrays themselves, so that no other ones get their identity.
            self._dealt[key] = arrays, jax.lax.with_sharding_constraint(stacked, rows)
        return self._dealt[key][1]


_DEALER: ContextVar[Dealer | None] = ContextVar("dealer", default=None)


@contextlib.contextmanager
def dealt_to(mesh: Mesh | None, axis: str) -> Iterator[None]:
    """Within it, while a program is traced, kernels are dealt out to devices along an axis.

    A device gets all clients' factors of its share of the kernels, and works on them alone: nothing
    is exchanged in whatever loops a core has. Aggregation functions need not know.
    """
    token = _DEALER.set(None if mesh is None else Dealer(Devices(mesh, axis)))
    try:
        yield
    finally:
        _DEALER.reset(token)


def dealer() -> Dealer | None:
    """Who deals rows out, if anybody does."""
    return _DEALER.get()


def over_rows(function: Callable[..., Any], common: Any, rows: Sequence[Any]) -> list[Any]:
    """`[function(common, *row) for row in rows]` for rows of equal structure and shapes.

    As two batches, one after the other in a loop: what comes out of a loop is an array. Of one
    batch the compiler puts the end of the function into whatever reads a row, once a row, and the
    program grows with the square of their number.
    """
    if len(rows) == 1:
        return [function(common, *rows[0])]
    half = -(-len(rows) // 2)
    filled = [*rows, *rows[: 2 * half - len(rows)]]
    batch = jax.tree.map(lambda *x: jnp.stack(x).reshape(2, half, *jnp.shape(x[0])), *filled)
    results = jax.lax.map(lambda row: _batched(function)(common, row), batch)
    return [jax.tree.map(lambda x, i=i: x[i // half, i % half], results) for i in range(len(rows))]


def over_dealt(function: Callable[..., Any], common: Any, rows: Any, devices: Devices) -> Any:
    """`function(common, *row)` of each row, from `Dealer.deal`; the results for `collect`."""
    mesh, axis = devices
    return jax.shard_map(
        _batched(function),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axis)),
        out_specs=PartitionSpec(axis),
        axis_names={axis},
        check_vma=False,
    )(common, rows)


def over_batch(function: Callable[..., Any], common: Any, rows: Sequence[Any]) -> list[Any]:
    """`over_rows` without a loop, for the compiler to place; what is put in has one axis more."""
    results = _batched(function)(common, jax.tree.map(lambda *x: jnp.stack(x), *rows))
    return [jax.tree.map(lambda x, i=i: x[i], results) for i in range(len(rows))]


def _batched(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda common, rows: jax.vmap(lambda row: function(common, *row))(rows)


def varying_as(first: jax.Array, *others: jax.Array) -> jax.Array:
    """The array, of a type that says that it differs between devices wherever others do.

    Within `jax.shard_map` a value's type says along which axes of a mesh it differs. A constant
    does along none; a loop does not change what it begins with, nor a derivative of one's own the
    type of what it is for.
    """
    for x in others:
        if not _axes(x) <= _axes(first):
            first = first + jnp.zeros_like(x, first.dtype, shape=())
    return first


def _axes(x: jax.Array) -> frozenset[str]:
    """The axes of a mesh along which an array may differ."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)
