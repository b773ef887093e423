"""One table that drives the property suite: add a row for a new aggregation function.

`CASES[name]` lists variants; all tests run over all of them. Shapes are the same everywhere, so
that a compiled program serves many tests.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax import Factors, aggregation, lowrank
from tests.aggregation import oracles

KERNELS = {"block/query": (13, 11), "block/value": (13, 11), "block/up": (17, 29)}
CLIENTS, RANK = 3, 2
WEIGHTS = np.array([1.0, 3.0, 2.0], np.float32)


class Case(NamedTuple):
    """A variant of a function.

    Attributes:
      options: Hyperparameters that are no trees.
      oracle: `(kernels, p, trees) -> list of dense products`, from lists of `(a, b)`.
      tree: Name of a hyperparameter that is an adapter tree, if there is one.
      exact: Whether the error is that of rounding for any clients.
      reproduces: Whether a single client (or identical ones) keep their product.
      smooth: Whether the product is a differentiable function of the factors.
      tolerance: Relative, of the product against the oracle.
      frozen: The factor that all clients must share for the method to make sense.
      homogeneous: Whether clients' factors times c give the product times c.
      reduces: Whether the error is never above that of FedIT.
    """

    options: dict[str, Any]
    oracle: Callable[..., list[np.ndarray]]
    tree: str | None = None
    exact: bool = False
    reproduces: bool = True
    smooth: bool = True
    tolerance: float = 2e-5
    frozen: str | None = None
    homogeneous: bool = True
    reduces: bool = False


def alone(oracle, **options):
    """An oracle that treats every kernel by itself."""

    def whole(kernels, p, tree=None, name=None):
        rows = zip(kernels, tree) if tree is not None else ((k, None) for k in kernels)
        return [
            oracle(a, b, p, **options, **({} if other is None else {name: other}))
            for (a, b), other in rows
        ]

    return whole


def whole(function):
    return lambda kernels, p, tree=None, name=None: function(kernels, p)


def hetlora_client(kernels, p):
    shares = oracles.hetlora_weights(kernels, p)
    return [oracles.fedit(a, b, shares) for a, b in kernels]


def hetlora_kernel(kernels, p):
    return [oracles.fedit(a, b, oracles.hetlora_weights([(a, b)], p)) for a, b in kernels]


def fair(**options):
    oracle, relative = alone(oracles.lora_fair, **options), options.get("units") != "raw"
    return Case(options, oracle, tolerance=1e-4, homogeneous=relative, reduces=relative)


CASES: dict[str, list[Case]] = {
    "fedit": [Case({}, alone(oracles.fedit))],
    "ffa_lora": [
        Case({}, alone(oracles.ffa_lora), exact=True, frozen="a"),
        Case({}, alone(oracles.ffa_lora), tree="initial", exact=True, frozen="a"),
    ],
    "rolora": [
        Case({"trained": "b"}, alone(oracles.rolora, trained="b"), exact=True, frozen="a"),
        Case({"trained": "a"}, alone(oracles.rolora, trained="a"), exact=True, frozen="b"),
    ],
    "fedsa_lora": [Case({}, alone(oracles.fedit))],
    "flora": [Case({}, alone(oracles.ideal), exact=True, reduces=True)],
    "flexlora": [
        Case({}, alone(oracles.flexlora), reduces=True),
        Case({"rank": 1}, alone(oracles.flexlora, rank=1), reproduces=False),
        Case({"split": "balanced"}, alone(oracles.flexlora), reduces=True),
    ],
    "hetlora": [
        Case({}, whole(hetlora_client)),
        Case({"per": "kernel"}, whole(hetlora_kernel)),
    ],
    "fedex_lora": [
        Case({}, alone(oracles.fedex_lora), exact=True, reduces=True),
        Case({"rank": 1}, alone(oracles.fedex_lora, rank=1), reduces=True),
    ],
    "frlora": [Case({}, alone(oracles.frlora), tree="initial")],
    "lora_fair": [
        fair(steps=60),
        fair(steps=300, learning_rate=0.05, regularization=0.0),
        fair(steps=60, units="raw"),
        fair(steps=40, learning_rate=0.1, regularization=0.0, correct="a"),
        fair(steps=40, similarity="feature_cosine", learning_rate=0.1),
        fair(steps=40, similarity="feature_cosine", learning_rate=0.01, correct="a"),
        fair(steps=60, similarity="frobenius"),
        fair(steps=60, similarity="frobenius", correct="a", regularization=0.1),
        fair(similarity="frobenius", solver="closed_form"),
        fair(similarity="frobenius", solver="closed_form", units="raw"),
        fair(similarity="frobenius", solver="closed_form", correct="a", regularization=0.0),
    ],
    "flora_na": [
        Case(
            {},
            whole(lambda kernels, p: [oracles.flora_na([k], p)[0] for k in kernels]),
            tolerance=5e-4,
            reduces=True,
        ),
        Case({"shared": True}, whole(oracles.flora_na), tolerance=5e-4, reduces=True),
        Case(
            {"solver": "gradient"},
            whole(lambda kernels, p: [oracles.flora_na([k], p, 200)[0] for k in kernels]),
            tolerance=0.1,
            smooth=False,
            reduces=True,
        ),
    ],
    "fedrot_lora": [
        Case({"aligned": "a"}, alone(oracles.fedrot_lora, aligned="a"), tree="reference"),
        Case({"aligned": "b"}, alone(oracles.fedrot_lora, aligned="b"), tree="reference"),
        Case(
            {"aligned": "a", "reflections": True},
            alone(oracles.fedrot_lora, aligned="a", reflections=True),
            tree="reference",
        ),
        Case(
            {"aligned": "a", "strength": 0.4},
            alone(oracles.fedrot_lora, aligned="a", strength=0.4),
            tree="reference",
        ),
    ],
    "fedsvd": [
        Case({}, alone(oracles.ffa_lora), tree="initial", exact=True, frozen="a"),
    ],
    "spectral": [
        Case(
            {"threshold": 0.7},
            alone(oracles.spectral_energy, threshold=0.7),
            reproduces=False,
        ),
        Case(
            {"selection": "noise", "rank": 2},
            alone(oracles.spectral_noise, rank=2),
            reproduces=False,
        ),
    ],
}
ALL = [(name, index) for name in sorted(aggregation.REGISTRY) for index in range(len(CASES[name]))]


def label(pair) -> str:
    name, index = pair
    case = CASES[name][index]
    words = [f"{key}={value}" for key, value in case.options.items()] + [case.tree or ""]
    return "-".join([name, *words]).rstrip("-")


def clients(seed: int = 0, count: int = CLIENTS, rank: int = RANK, kernels=None, dtype=np.float32):
    """Adapters of unequal size that have a start in common, as training leaves them."""
    rng = np.random.default_rng(seed)
    tree = {}
    for name, (d_in, d_out) in sorted((kernels or KERNELS).items()):
        start = rng.standard_normal((d_in, rank))
        a = start + 0.7 * rng.standard_normal((count, d_in, rank))
        b = rng.standard_normal((count, rank, d_out)) + rng.standard_normal((rank, d_out))
        size = 10 ** rng.uniform(-0.5, 0.5, (count, 1, 1))
        tree[name] = Factors((a * d_in**-0.5).astype(dtype), (size * b).astype(dtype))
    return tree


def extra(seed: int = 9, rank: int = RANK, kernels=None):
    """An adapter tree without the client axis: a start, or the last global factors."""
    return jax.tree.map(lambda x: x[0], clients(seed, 1, rank, kernels))


def prepared(case: Case, stacked):
    """The clients, made to share the factor that the method freezes; to the tree's, if given."""
    if case.frozen is None:
        return stacked
    other = extra(rank=jax.tree.leaves(stacked)[0].shape[-1], kernels=shapes(stacked))

    def share(x, start):
        factor = getattr(start, case.frozen) if case.tree else getattr(x, case.frozen)[0]
        count = getattr(x, case.frozen).shape[0]
        return x._replace(**{case.frozen: np.repeat(np.asarray(factor)[None], count, 0)})

    return jax.tree.map(share, stacked, other, is_leaf=lowrank.is_factors)


def shapes(stacked):
    return {name: (x.a.shape[-2], x.b.shape[-1]) for name, x in stacked.items()}


def bound(pair, kernels=None, **changed):
    """`function(stacked, weights)` of a case, hyperparameters bound."""
    name, index = pair
    case = CASES[name][index]
    trees = {case.tree: extra(kernels=kernels)} if case.tree else {}
    options = {**case.options, **changed}
    return functools.partial(aggregation.get(name), **options, **trees)


def product(aggregated, weights):
    """The dense change `residual + adapters` of every kernel, a list in float64."""
    total: list[Any] = []
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    for part in aggregated:
        if part is None:
            continue
        matrices = []
        for node in jax.tree.leaves(part, is_leaf=lowrank.is_factors):
            a, b = (np.asarray(x.astype(jnp.float32), np.float64) for x in node)
            if b.ndim == 3:
                b = np.tensordot(shares, b, 1)
            matrices.append(a @ b)
        total = [x + y for x, y in zip(total, matrices)] if total else matrices
    return total


def expected(pair, stacked, weights):
    name, index = pair
    case = CASES[name][index]
    nodes = jax.tree.leaves(stacked, is_leaf=lowrank.is_factors)
    kernels = [tuple(np.asarray(x, np.float64) for x in node) for node in nodes]
    p = np.asarray(weights, np.float64) / np.sum(weights)
    if not case.tree:
        return case.oracle(kernels, p)
    rank = kernels[0][0].shape[2]
    others = jax.tree.leaves(extra(rank=rank, kernels=shapes(stacked)), is_leaf=lowrank.is_factors)
    dense = [tuple(np.asarray(x, np.float64) for x in node) for node in others]
    return case.oracle(kernels, p, dense, case.tree)


def close(got, want, tolerance) -> bool:
    """Whether two lists of matrices agree, relative to the size of the wanted ones together."""
    distance = np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(got, want)))
    size = np.sqrt(sum(np.sum(y**2) for y in want))
    assert distance <= tolerance * max(size, 1e-30), f"{distance / max(size, 1e-30):.3g}"
    return True
