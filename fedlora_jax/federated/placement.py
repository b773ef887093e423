"""Where arrays are on a mesh of devices: clients along one axis, wide backbones along another.

The compiler does the rest: a round is the same program, and what it moves between devices follows
from where its arrays are.
"""

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedlora_jax.methods import Server

PyTree: TypeAlias = Any

# The axes of a mesh.
CLIENTS, MODEL = "clients", "model"

# How kernels of blocks are split over `MODEL`, as in Megatron-LM (Shoeybi et al., 2019, section 3):
# what widens along its outputs, what follows it along its inputs, so that a block adds up over the
# devices once after its attention and once after its MLP. The first pattern that matches counts;
# what none matches every device has whole.
SPLITS: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(query|key|value|gate|up|fc1)/kernel$", PartitionSpec(None, MODEL)),
    (r"(query|key|value|gate|up|fc1)/bias$", PartitionSpec(MODEL)),
    (r"(out|down|fc2)/kernel$", PartitionSpec(MODEL, None)),
    (r"(^|/)embedding/embedding$", PartitionSpec(MODEL, None)),
)


def make_mesh(clients: int, model: int = 1) -> Mesh:
    """A mesh of `clients` x `model` devices, the first ones; on several hosts, all.

    Args:
      clients: Devices that a cohort is spread over.
      model: Devices that one backbone is spread over; 1 if it fits one.

    Raises:
      ValueError: If there are not as many, or, on several hosts, more.
    """
    there, wanted = jax.devices(), clients * model
    enough = wanted <= len(there) if jax.process_count() == 1 else wanted == len(there)
    if clients < 1 or model < 1 or not enough:
        raise ValueError(
            f"a mesh of {clients} x {model} devices (clients x model) needs {wanted}, there are "
            f"{len(there)} ({there[0].device_kind}) on {jax.process_count()} host(s)"
        )
    types = (AxisType.Auto,) * 2
    return Mesh(_arranged(clients, model, there[:wanted]), (CLIENTS, MODEL), axis_types=types)


def _arranged(clients: int, model: int, there: Sequence[jax.Device]) -> np.ndarray:
    """Devices `[clients, model]`, near on the network what exchanges most, where JAX knows how.

    Of several slices of TPUs each has a part of the cohort: what a backbone exchanges stays in one.
    """
    slices = len({getattr(device, "slice_index", 0) for device in there})
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(
                (clients, model), there, allow_split_physical_axes=True
            )
        part = (clients // slices, model)
        return mesh_utils.create_hybrid_device_mesh(
            part, (slices, 1), there, allow_split_physical_axes=True
        )
    except (AssertionError, NotImplementedError, TypeError, ValueError):
        # Some chips of a torus, slices that do not divide the clients, sides that jax 0.10 cannot
        # factor: any order is right, if slower.
        return np.asarray(there).reshape(clients, model)


def devices(mesh: Mesh | None) -> int:
    """How many devices a cohort is spread over."""
    return 1 if mesh is None else mesh.shape[CLIENTS]


def everywhere(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """The leading axis, of clients, spread over `CLIENTS`."""
    return NamedSharding(mesh, PartitionSpec(CLIENTS))


def server(mesh: Mesh, state: Server) -> Server:
    """The sharding of each array of a server's state: the backbone's by `SPLITS`, else whole."""
    width = mesh.shape[MODEL]

    def split(path: tuple[Any, ...], x: jax.Array) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in SPLITS:
            if re.search(pattern, name) and _divides(width, x.shape, spec):
                return NamedSharding(mesh, spec)
        return everywhere(mesh)

    whole = jax.tree.map(lambda _: everywhere(mesh), state)
    return whole._replace(backbone=jax.tree_util.tree_map_with_path(split, state.backbone))


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """Arrays that every host has, where the shardings say; one sharding serves a whole tree."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_put, tree, shardings)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if not isinstance(x, np.ndarray) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _put(np.asarray(jax.random.key_data(x)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    # Each host gives its devices what is theirs; device_put would compare all of it between hosts.
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def own_rows(mesh: Mesh | None, count: int) -> np.ndarray:
    """Which of so many rows are on devices of this process, bool `[count]`."""
    own = np.zeros(count, bool)
    if mesh is None:
        return ~own
    for found in rows(mesh).addressable_devices_indices_map((count,)).values():
        own[found] = True
    return own


def put_own_rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """Arrays of which every process has its own rows, where `rows` says."""
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, rows(mesh), lambda index: x[index]), tree
    )


def writers(mesh: Mesh | None, count: int) -> np.ndarray:
    """Of so many rows, as `rows` spreads them, the first process that has each, int `[count]`."""
    if mesh is None:
        return np.zeros(count, int)
    first, places = np.full(count, jax.process_count()), rows(mesh).devices_indices_map((count,))
    for device in mesh.devices.flat:
        (found,) = places[device]
        first[found] = np.minimum(first[found], device.process_index)
    return first


def fetch_own_rows(tree: PyTree) -> PyTree:
    """Arrays in this process's memory, of which it fills the rows that are on its own devices."""

    def fetch(x: jax.Array) -> np.ndarray:
        host = np.empty(x.shape, x.dtype)
        for shard in x.addressable_shards:
            host[shard.index] = shard.data
        return host

    return jax.device_get(tree) if jax.process_count() == 1 else jax.tree.map(fetch, tree)


def padded(cohort: np.ndarray, mesh: Mesh | None) -> np.ndarray:
    """A cohort with -1, nobody, added until every device along `CLIENTS` has as many."""
    return np.pad(cohort, (0, -len(cohort) % devices(mesh)), constant_values=-1)


def _divides(width: int, shape: tuple[int, ...], spec: PartitionSpec) -> bool:
    return all(axis is None or size % width == 0 for size, axis in zip(shape, spec, strict=True))
