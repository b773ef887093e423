"""Ways to say where a round is computed: what each makes four devices send; nothing is run.

The compiler alone (`jit` of inputs that are spread over devices), collectives written out under
`shard_map`, DrJAX, and the library's own: `shard_map` for clients, kernels dealt out to devices for
the server's step.
"""

import functools
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from tabulate import tabulate

from experiments.benchmarks import hlo
from experiments.benchmarks.mesh import DEVICES
from experiments.shared.compiling import least_effort
from fedlora_jax import Factors, _batching, aggregation, lowrank
from fedlora_jax.federated import placement

Tree: TypeAlias = dict[str, Any]
Way: TypeAlias = Callable[..., Any] | None

LAYERS, RANK, COHORT, TURNS = 8, 4, 16, 6
SHAPES = {"query": (64, 64), "up": (64, 128), "down": (128, 64)}
ROWS, ALL = PartitionSpec(placement.CLIENTS), PartitionSpec()
TITLES = {
    "clients": f"each client: a basis of each factor, {TURNS} turns of QR",
    "fedit": "`fedit`: means of factors",
    "fedex_lora": "`fedex_lora`: mean of products, into the backbone",
    "flora_na": "`flora_na`: Gram blocks of all pairs, 10 sweeps",
    "error": "the metric `aggregation_error` of `fedit`",
}


def names() -> list[str]:
    """What is compiled in each way."""
    return list(TITLES)


def measure(name: str) -> dict[str, Any]:
    """By way: FLOPs of a device, collectives by kind, and how many of them are in loops.

    A way that has no words for it is None.

    Raises:
      RuntimeError: If there are not four devices.
    """
    if jax.device_count() < DEVICES:
        raise RuntimeError(f"{DEVICES} devices are needed, there are {jax.device_count()}")
    mesh = placement.make_mesh(DEVICES)
    arguments = _inputs(mesh)
    return {
        way: None if function is None else _count(function, arguments, mesh)
        for way, function in _ways(name, mesh).items()
    }


def version() -> str | None:
    """Of DrJAX, if it is there: `pip install drjax`."""
    return metadata.version("drjax") if find_spec("drjax") else None


def _inputs(mesh: Mesh) -> tuple[Tree, jax.Array, Tree]:
    """Shapes of the clients' factors, their weights and the backbone's kernels, on the mesh."""

    def shape(where: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=where)

    rows, everywhere = placement.rows(mesh), placement.everywhere(mesh)
    paths = {f"{name}_{i}": sizes for i in range(LAYERS) for name, sizes in SHAPES.items()}
    stacked = {
        path: Factors(shape(rows, COHORT, d_in, RANK), shape(rows, COHORT, RANK, d_out))
        for path, (d_in, d_out) in paths.items()
    }
    kernels = {path: shape(everywhere, *sizes) for path, sizes in paths.items()}
    return stacked, shape(rows, COHORT), kernels


def _count(function: Callable[..., Any], arguments: Any, mesh: Mesh) -> dict[str, Any]:
    result = jax.eval_shape(function, *arguments)
    clients = jax.tree.map(lambda x: x.ndim > 2, result)
    where = jax.tree.map(
        lambda each: placement.rows(mesh) if each else placement.everywhere(mesh), clients
    )
    compiled = jax.jit(function, out_shardings=where).lower(*arguments).compile(least_effort())
    text, cost = compiled.as_text(), compiled.cost_analysis()
    assert text is not None and cost is not None
    sent, waits = hlo.collectives(text), hlo.collectives(text, only_in_loops=True)
    return {
        "flops": cost["flops"],
        "collectives": {kind: list(each) for kind, each in sorted(sent.items())},
        "in_loops": sum(each.times for each in waits.values()),
    }


def _ways(name: str, mesh: Mesh) -> dict[str, Way]:
    plain = _PLAIN[name]
    ways: dict[str, Way] = {"compiler": plain, "shard_map": _shard_map(_EXPLICIT[name], mesh)}
    ways["drjax"] = _drjax(name, mesh) if version() else None
    ways["ours"] = (
        ways["shard_map"] if name == "clients" else functools.partial(_dealt, plain, mesh)
    )
    return ways


def _dealt(function: Callable[..., Any], mesh: Mesh, *arguments: Any) -> Any:
    with _batching.dealt_to(mesh, placement.CLIENTS):
        return function(*arguments)


def _shard_map(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    def run(stacked: Tree, weights: jax.Array, kernels: Tree) -> Any:
        result = jax.eval_shape(_PLAIN_OF[function], stacked, weights, kernels)
        specs = jax.tree.map(lambda x: ROWS if x.ndim > 2 else ALL, result)
        return jax.shard_map(
            function, mesh=mesh, in_specs=(ROWS, ROWS, ALL), out_specs=specs, check_vma=False
        )(stacked, weights, kernels)

    return run


def _basis(x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, TURNS, lambda _, y: lowrank.orthonormal(x * y), jnp.ones_like(x))


def _of_client(factors: Tree) -> Tree:
    return {path: lowrank.scaled(f, 1.0)._replace(a=_basis(f.a)) for path, f in factors.items()}


def _clients(stacked: Tree, weights: jax.Array, kernels: Tree) -> Any:
    return jax.vmap(_of_client)(stacked)


def _fedit(stacked: Tree, weights: jax.Array, kernels: Tree) -> Any:
    return aggregation.fedit(stacked, weights).adapters


def _fedit_psum(stacked: Tree, weights: jax.Array, kernels: Tree) -> Any:
    total = jax.lax.psum(jnp.sum(weights), placement.CLIENTS)
    sums = jax.tree.map(lambda x: jnp.tensordot(weights / total, x, 1), stacked)
    return jax.lax.psum(sums, placement.CLIENTS)


def _fedex_lora(stacked: Tree, weights: jax.Array, kernels: Tree) -> Any:
    adapters, residual = aggregation.fedex_lora(stacked, weights)
    assert adapters is not None and residual is not None
    merged = {path: x + residual[path].a @ residual[path].b for path, x in kernels.items()}
    return adapters, merged


def _fedex_lora_psum(stacked: Tree, weights: jax.Array, kernels: Tree) -> Any:
    means = _fedit_psum(stacked, weights, kernels)
    shares = weights / jax.lax.psum(jnp.sum(weights), placement.CLIENTS)
    sums = {path: jnp.einsum("k,kir,kro->io", shares, *f) for path, f in stacked.items()}
    sums = jax.lax.psum(sums, placement.CLIENTS)
    return means, {
        path: x + sums[path] - means[path].a @ means[path].b for path, x in kernels.items()
    }


def _flora_na(stacked: Tree, weights: jax.Array, kernels: Tree) -> Any:
    return aggregation.flora_na(stacked, weights).adapters


def _gathered(
    function: Callable[..., Any], stacked: Tree, weights: jax.Array, kernels: Tree
) -> Any:
    """Of pairs of clients no partial sum is to be had: all get the factors of all."""
    gather = functools.partial(jax.lax.all_gather, axis_name=placement.CLIENTS, tiled=True)
    return function(*jax.tree.map(gather, (stacked, weights)), kernels)


def _error(stacked: Tree, weights: jax.Array, kernels: Tree) -> Any:
    return aggregation.error(stacked, weights, aggregation.fedit(stacked, weights))


def _error_psum(stacked: Tree, weights: jax.Array, kernels: Tree) -> Any:
    """From the mean products as matrices, a part of each on a device: two sums of squares."""
    means = _fedit_psum(stacked, weights, kernels)
    shares = weights / jax.lax.psum(jnp.sum(weights), placement.CLIENTS)
    index, squares = jax.lax.axis_index(placement.CLIENTS), jnp.zeros(2)
    for path, f in stacked.items():
        product = jnp.einsum("k,kir,kro->io", shares, *f)
        part = jax.lax.psum_scatter(product, placement.CLIENTS, tiled=True)
        mine = jax.lax.dynamic_slice_in_dim(means[path].a, index * len(part), len(part))
        missed = part - mine @ means[path].b
        squares += jnp.stack([jnp.sum(missed**2), jnp.sum(part**2)])
    distance, size = jnp.sqrt(jax.lax.psum(squares, placement.CLIENTS))
    return distance / size


_PLAIN: dict[str, Callable[..., Any]] = {
    "clients": _clients,
    "fedit": _fedit,
    "fedex_lora": _fedex_lora,
    "flora_na": _flora_na,
    "error": _error,
}
_EXPLICIT: dict[str, Callable[..., Any]] = {
    "clients": _clients,
    "fedit": _fedit_psum,
    "fedex_lora": _fedex_lora_psum,
    "flora_na": functools.partial(_gathered, _flora_na),
    "error": _error_psum,
}
_PLAIN_OF = {function: _PLAIN[name] for name, function in _EXPLICIT.items()}


def _drjax(name: str, mesh: Mesh) -> Way:
    """The same in DrJAX's words, a map over clients and sums; None where they do not suffice."""
    import drjax

    def mean(values: Tree, weights: jax.Array) -> Tree:
        shares = weights / jnp.sum(weights)
        weighted = drjax.map_fn(
            lambda tree, share: jax.tree.map(lambda x: share * x, tree), (values, shares), mesh=mesh
        )
        return drjax.reduce_sum(weighted)

    def clients(stacked: Tree, weights: jax.Array, kernels: Tree) -> Any:
        return drjax.map_fn(_of_client, stacked, mesh=mesh)

    def fedit(stacked: Tree, weights: jax.Array, kernels: Tree) -> Any:
        return mean(stacked, weights)

    def fedex_lora(stacked: Tree, weights: jax.Array, kernels: Tree) -> Any:
        means = mean(stacked, weights)
        products = drjax.map_fn(
            lambda each: {path: f.a @ f.b for path, f in each.items()}, stacked, mesh=mesh
        )
        sums = mean(products, weights)
        merged = {
            path: x + sums[path] - means[path].a @ means[path].b for path, x in kernels.items()
        }
        return means, merged

    def error(stacked: Tree, weights: jax.Array, kernels: Tree) -> Any:
        zero = jax.tree.map(jnp.zeros_like, kernels)
        means, missed = fedex_lora(stacked, weights, zero)
        products = {path: missed[path] + f.a @ f.b for path, f in means.items()}
        distance, size = (
            jnp.sqrt(sum(jnp.sum(x**2) for x in each.values())) for each in (missed, products)
        )
        return distance / size

    known = {"clients": clients, "fedit": fedit, "fedex_lora": fedex_lora, "error": error}
    if name not in known:
        return None
    return drjax.program(placements={placement.CLIENTS: COHORT})(known[name])


def page(results: dict[str, Any]) -> str:
    """The table, as Markdown."""
    facts, rows = results["environment"], []
    titles = {
        "compiler": "compiler",
        "shard_map": "`shard_map`, collectives written out",
        "drjax": f"DrJAX {results['drjax'] or ''}".rstrip(),
        "ours": "this library",
    }
    for name, ways in results["rows"].items():
        for way, found in ways.items():
            if found is None:
                why = "no words for it" if results["drjax"] else "not installed"
                rows.append([TITLES[name], titles[way], "", why, "", ""])
                continue
            each = found["collectives"].items()
            kinds = ", ".join(f"{count} {kind}" for kind, (count, _) in each) or "none"
            size = sum(size for _, (_, size) in each) / 1e3
            mflop = f"{found['flops'] / 1e6:.2f}"
            rows.append(
                [TITLES[name], titles[way], mflop, kinds, found["in_loops"], f"{size:,.0f}"]
            )
    headers = ["what", "way", "MFLOP a device", "collectives", "in loops", "kB"]
    numbers = np.prod([len(SHAPES), LAYERS])
    lines = [
        "# Ways to spread a round over devices",
        "",
        f"{numbers} kernels ({', '.join(f'{a} x {b}' for a, b in SHAPES.values())}) at r = {RANK}, "
        f"{COHORT} clients on {DEVICES} devices. {facts['date']}, {facts['device']}, jax "
        f"{facts['versions']['jax']}. Compiled, not run.",
        "",
        tabulate(rows, headers, tablefmt="github", disable_numparse=True),
        "",
        "Collectives are those that a device takes part in, in loops as often as the loop turns "
        "where the compiler knows that; kB are of their results on a device. MFLOP are the "
        "compiler's count, which takes the body of a loop once. DrJAX has a map over clients and "
        "sums over them; `flora_na` needs pairs.",
    ]
    return "\n".join(lines)
