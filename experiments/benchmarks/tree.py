"""What it costs to aggregate in a tree when a method needs products: simulated on real adapters.

Clients of the digits demo train. The mean of their products is then found along a tree of nodes,
each of which adds up what its children send and passes on no more than a rank of q r; or from
random sketches, which are sums and so know nothing of a tree. All in float64, beside the mean of
the products formed and decomposed as a matrix. For `flora_na` each node fits its children, by
their Gram blocks, and passes on one pair of factors.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from configs import digits
from fedlora_jax import Factors, aggregation, experiment
from fedlora_jax.federated import cohort
from fedlora_jax.federated.round import run_round
from fedlora_jax.lowrank import is_factors

METHODS = ("flexlora",)
BACKBONES = Path("runs/backbones")
CLIENTS_PER_DOMAIN, COHORT, CHUNK = 16, 64, 16
# Uploads of the first and of a later round are aggregated.
ROUNDS = (0, 4)
FAN_OUTS = (2, 4, 8)
WIDTHS = (1, 2, 4, 8)

Kernels: TypeAlias = list[tuple[np.ndarray, np.ndarray]]


class Truth(NamedTuple):
    """Of each kernel the mean product, and the best of the adapters' rank."""

    ideal: list[np.ndarray]
    best: list[np.ndarray]


def task_of(text: str) -> tuple[str, int]:
    """Method and seed of `flexlora,0`."""
    method, seed = text.split(",")
    return method, int(seed)


def uploads(
    method: str, seed: int, directory: Path = BACKBONES, rounds: tuple[int, ...] = ROUNDS
) -> dict[int, tuple[Kernels, np.ndarray]]:
    """What the clients of some rounds send, and their weights.

    Args:
      method: One that aggregates products.
      seed: Of partition, adapters, cohorts and batches.
      directory: Where pretrained backbones are kept.
      rounds: Which, ascending; all up to the last are run.

    Returns:
      By round: for each kernel `a [K, d_in, r]` and `b [K, r, d_out]`, and `[K]`, of sum one.
    """
    config = digits.get_config(f"method={method}")
    config.seed, config.clients_per_round = seed, COHORT
    config.data.partition_options.clients_per_domain = CLIENTS_PER_DOMAIN
    config.backbone_dir = str(directory)
    setting = experiment.prepare(config)
    program = experiment.compile_program(config, setting)
    state = experiment.first_state(config, setting, program.method)
    recipe = program.recipe._replace(clients_per_chunk=CHUNK)
    step = jax.jit(functools.partial(run_round, recipe))
    key, federation, found = jax.random.key(seed), state.federation, {}
    rate = jnp.float32(config.local.learning_rate)
    for index in range(max(rounds) + 1):
        chosen = cohort.sample(key, index, num_clients=len(state.ranks), cohort_size=COHORT)
        federation, _, result = step(federation, state.data, chosen, key, rate)
        if index in rounds:
            counts = np.asarray(state.data.counts)[np.asarray(chosen)].astype(np.float64)
            found[index] = _kernels(result.uploads), counts / counts.sum()
    return found


def _kernels(sent: Any) -> Kernels:
    """The factors in an upload, of layers that are stacked one by one."""
    found = []
    for node in jax.tree.leaves(sent, is_leaf=is_factors):
        if is_factors(node):
            a, b = (np.asarray(x, np.float64) for x in node)
            a, b = (x.reshape(len(x), -1, *x.shape[-2:]) for x in (a, b))
            found += [(a[:, i], b[:, i]) for i in range(a.shape[1])]
    return found


def truth(kernels: Kernels, weights: np.ndarray) -> Truth:
    """The means of the products and their best approximations, by matrices."""
    ideal = [np.einsum("k,kir,kro->io", weights, a, b) for a, b in kernels]
    pairs = zip(ideal, kernels, strict=True)
    return Truth(ideal, [multiply(truncated(x, a.shape[2])) for x, (a, _) in pairs])


def truncated(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best approximation at a rank, as factors."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank, None] * v[:rank]


def multiply(factors: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The product."""
    return factors[0] @ factors[1]


def by_tree(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray, fan_out: int, width: int
) -> np.ndarray:
    """The mean product as the root of a tree finds it.

    Args:
      a: `[K, d_in, r]`.
      b: `[K, r, d_out]`.
      weights: `[K]`, of sum one.
      fan_out: Children of a node.
      width: q: a node passes on a rank of q r, the root too.
    """
    level = [(w * x) @ y for w, x, y in zip(weights, a, b, strict=True)]
    while len(level) > 1:
        groups = [level[i : i + fan_out] for i in range(0, len(level), fan_out)]
        level = [multiply(truncated(sum(group), width * a.shape[2])) for group in groups]
    return level[0]


def by_sketches(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray, width: int, generator: np.random.Generator
) -> np.ndarray:
    """The mean product M from M x noise and noise x M, sums over clients, of as many numbers.

    Tropp, Yurtsever, Udell, Cevher, *Practical sketching algorithms for low-rank matrix
    approximation*, SIAM J. Matrix Anal. Appl. 2017, algorithm 4; the second sketch is about twice
    the first.
    """
    (_, d_in, rank), d_out = a.shape, b.shape[2]
    right = max(1, width * rank * (d_in + d_out) // (d_in + 2 * d_out))
    left = min(d_in, (width * rank * (d_in + d_out) - right * d_in) // d_out)
    omega, psi = generator.normal(size=(d_out, right)), generator.normal(size=(left, d_in))
    image = np.einsum("k,kir,krs->is", weights, a, b @ omega)
    rows = np.einsum("k,klr,kro->lo", weights, psi @ a, b)
    basis, _ = np.linalg.qr(image)
    return basis @ np.linalg.lstsq(psi @ basis, rows, rcond=None)[0]


def in_two_passes(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray, width: int, generator: np.random.Generator
) -> np.ndarray:
    """M from a basis of M x noise, and, when that is known everywhere, basis^T x M: both sums.

    Halko, Martinsson, Tropp, *Finding structure with randomness*, SIAM Review 2011.
    """
    omega = generator.normal(size=(b.shape[2], min(width * a.shape[2], a.shape[1], b.shape[2])))
    basis, _ = np.linalg.qr(np.einsum("k,kir,krs->is", weights, a, b @ omega))
    return basis @ np.einsum("k,ksr,kro->so", weights, basis.T @ a, b)


@jax.jit
@jax.vmap
def _fits(clients: Factors, weights: jax.Array) -> tuple[Factors, jax.Array]:
    fitted = aggregation.flora_na({"": clients}, weights).adapters
    assert fitted is not None
    return fitted[""], jnp.sum(weights)


def by_fits(a: np.ndarray, b: np.ndarray, weights: np.ndarray, fan_out: int) -> np.ndarray:
    """The product of what `flora_na` fits in a tree: to what its children send, at each node.

    Float32, as the library computes it. Arguments as those of `by_tree`; the number of clients is
    a power of `fan_out`.
    """
    a_, b_, heavy = (jnp.asarray(x, jnp.float32) for x in (a, b, weights))
    level = Factors(a_, b_)
    while len(heavy) > 1:
        level, heavy = jax.tree.map(lambda x: x.reshape(-1, fan_out, *x.shape[1:]), (level, heavy))
        level, heavy = _fits(level, heavy)
    return multiply((np.asarray(level.a[0], np.float64), np.asarray(level.b[0], np.float64)))


def by_sums(x: np.ndarray, weights: np.ndarray, fan_out: int) -> np.ndarray:
    """The mean of factors `[K, ...]` along a tree of sums."""
    level = list(np.tensordot(np.diag(weights), x, 1))
    while len(level) > 1:
        level = [sum(level[i : i + fan_out]) for i in range(0, len(level), fan_out)]
    return level[0]


def distance(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Relative Frobenius distance over all kernels."""
    pairs = zip(found, wanted, strict=True)
    missed = sum(float(np.sum((x - y) ** 2)) for x, y in pairs)
    return float(np.sqrt(missed / sum(float(np.sum(y**2)) for y in wanted)))


def errors(kernels: Kernels, weights: np.ndarray, seed: int) -> dict[str, Any]:
    """How far each way is from the mean product, and its best from that of the mean product.

    `sum` is the distance of what the root has from the mean product; `best` of what it sends from
    the best of the adapters' rank; `excess`, by how much that is farther from the mean product.
    """
    known = truth(kernels, weights)
    flat = distance(known.best, known.ideal)
    ways: dict[str, Callable[..., np.ndarray]] = {
        f"tree of {fan_out}": functools.partial(by_tree, fan_out=fan_out) for fan_out in FAN_OUTS
    }
    for name, way in {"sketch": by_sketches, "two passes": in_two_passes}.items():
        ways[name] = functools.partial(way, generator=np.random.default_rng(seed))
    found: dict[str, Any] = {}
    for name, way in ways.items():
        for width in WIDTHS:
            roots = [way(a, b, weights, width=width) for a, b in kernels]
            pairs = zip(roots, kernels, strict=True)
            sent = [multiply(truncated(x, a.shape[2])) for x, (a, _) in pairs]
            found.setdefault(name, {})[width] = {
                "sum": distance(roots, known.ideal),
                "best": distance(sent, known.best),
                "excess": distance(sent, known.ideal) / flat - 1,
            }
    means = [np.einsum("k,k...->...", weights, a) for a, _ in kernels]
    others = [np.einsum("k,k...->...", weights, b) for _, b in kernels]
    fan_outs = [n for n in FAN_OUTS if _is_power(len(weights), n)]
    fitted = {
        n: distance([by_fits(a, b, weights, n) for a, b in kernels], known.ideal)
        for n in (*fan_outs, len(weights))
    }
    sums = [by_sums(a, weights, 2) for a, _ in kernels]
    stacked = {str(i): Factors(*map(jnp.asarray, pair)) for i, pair in enumerate(kernels)}
    ours = aggregation.flexlora(stacked, jnp.asarray(weights)).adapters
    assert ours is not None
    library = [np.asarray(ours[x].a, np.float64) @ np.asarray(ours[x].b) for x in stacked]
    return {
        "ways": found,
        "flat": flat,
        "fedit": distance([x @ y for x, y in zip(means, others, strict=True)], known.ideal),
        "library": distance(library, known.best),
        "flora_na": fitted,
        "means": distance(sums, means),
    }


def _is_power(number: int, base: int) -> bool:
    return number == 1 or (number % base == 0 and _is_power(number // base, base))


def measure(method: str, seed: int) -> dict[str, Any]:
    """The errors of a method's uploads, by round."""
    sent = uploads(method, seed)
    return {str(index): errors(*each, seed) for index, each in sent.items()}


def page(results: dict[str, Any]) -> str:
    """The tables, as Markdown: a row a way and q, means over seeds and their range."""
    facts = results["environment"]
    lines = [
        "# Aggregation in a tree",
        "",
        f"The mean of the products of {COHORT} clients of the digits demo ({CLIENTS_PER_DOMAIN} "
        "clients a domain, alpha 0.5, r = 4; kernels 64 x 64, 64 x 256 and 256 x 64), found along "
        "a tree of which each node passes on a rank of q r, and from sketches of as many numbers. "
        f"{facts['date']}, NumPy {facts['versions']['numpy']}, float64.",
    ]
    for method, seeds in results["methods"].items():
        for index in next(iter(seeds.values())):
            found = [each[index] for each in seeds.values()]
            lines += ["", f"## {method}, round {int(index) + 1}, {len(found)} seeds", ""]
            lines += [_table(found), "", _flat(found)]
    lines += [
        "",
        "`sum`: relative distance of what the root has, of rank q r, from the mean product. "
        "`sent`: distance of its best of rank r from that of the mean product. `farther`: by how "
        "much it is farther from the mean product than that. Means over seeds, and the range of "
        "`sent`. `flexlora` and `fedsmooth_lora` continue from what is sent; of the whole mean "
        "product, which `fedex_lora` wants, `sum` is missed.",
    ]
    return "\n".join(lines)


def _table(found: list[dict[str, Any]]) -> str:
    rows = []
    for way, widths in found[0]["ways"].items():
        for width in widths:
            each = [one["ways"][way][width] for one in found]
            sums, sent, excess = ([x[k] for x in each] for k in ("sum", "best", "excess"))
            spread = f"{np.mean(sent):.1e} ({min(sent):.1e} to {max(sent):.1e})"
            rows.append([way, width, f"{np.mean(sums):.1e}", spread, f"{np.mean(excess):.1e}"])
    headers = ["way", "q", "sum", "sent", "farther"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _flat(found: list[dict[str, Any]]) -> str:
    flat, fedit, library = (
        np.mean([one[k] for one in found]) for k in ("flat", "fedit", "library")
    )
    fits = {n: float(np.mean([one["flora_na"][n] for one in found])) for n in found[0]["flora_na"]}
    *trees, (_, alone) = fits.items()
    means = max(one["means"] for one in found)
    return (
        f"Without a tree the best of rank r is {flat:.2f} from the mean product, the product of "
        f"the means {fedit:.2f}; `aggregation.flexlora` in float32 is {library:.0e} from the best. "
        f"`flora_na` is {alone:.3f} from the mean product without a tree, and "
        + ", ".join(f"{value:.3f} in a tree of {n}" for n, value in trees)
        + f". Means of factors come out of a tree of 2 but {means:.0e} from themselves."
    )


def draw(results: dict[str, Any]) -> Any:
    """Errors against q, a panel a round, a line a way; each seed a faint point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [
        (f"{method}, round {int(index) + 1}", [each[index] for each in seeds.values()])
        for method, seeds in results["methods"].items()
        for index in next(iter(seeds.values()))
    ]
    figure, panels = plt.subplots(1, len(cases), figsize=(4.5 * len(cases), 4), sharey=True)
    for panel, (title, found) in zip(np.atleast_1d(panels), cases, strict=True):
        for way, widths in found[0]["ways"].items():
            at = [int(width) for width in widths]
            values = np.array([[one["ways"][way][w]["best"] for w in widths] for one in found])
            # What is exact but for rounding has no place on a logarithmic axis.
            each = np.where(values > 1e-12, values, np.nan)
            line = panel.loglog(at, np.exp(np.mean(np.log(each), axis=0)), marker="o", label=way)
            for of_seed in each:
                panel.plot(at, of_seed, ".", color=line[0].get_color(), alpha=0.3)
        panel.set(title=title, xlabel="q (a node passes on rank q r)", xticks=at, xticklabels=at)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    np.atleast_1d(panels)[0].set_ylabel("distance from the best without a tree")
    np.atleast_1d(panels)[-1].legend(loc="lower left")
    figure.tight_layout()
    return figure
