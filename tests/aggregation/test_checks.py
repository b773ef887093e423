"""What is refused, and in which words."""

import ast
import inspect
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from jax.typing import ArrayLike

from fedlora_jax import Factors, aggregation, lowrank, methods
from tests.aggregation import cases

every = pytest.mark.parametrize("name", sorted(aggregation.REGISTRY))


def call(name, stacked, weights):
    return cases.bound((name, 0))(stacked, weights)


@every
@pytest.mark.parametrize("weights", [[1, -1, 1], [0, 0, 0], [1, np.nan, 1], [1, np.inf, 1]])
def test_unusable_weights(name, weights):
    with pytest.raises(ValueError, match="non-negative and not all zero"):
        call(name, cases.clients(), np.array(weights, np.float32))


@every
@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_sick_upload_is_named(name, side, bad):
    stacked = cases.clients()
    getattr(stacked["block/value"], side)[2, 1, 1] = bad
    with pytest.raises(ValueError, match=f"client 2 .*{side}.*block/value") as info:
        call(name, stacked, cases.WEIGHTS)
    assert "weight 0" in str(info.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_sick_upload_of_many_numbers_is_seen(bad, everywhere):
    """A maximum over thousands of numbers passes NaN over on a CPU."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=x).astype(np.float32) for x in ((3, 512, 16), (3, 16, 512)))
    weights = np.array([1, 2, 3], np.float32)
    expected = aggregation.fedit({"dense": Factors(a, b)}, weights * [1, 0, 1])
    for x in (a, b):
        x[1, slice(None) if everywhere else 200 % x.shape[1]] = bad
        stacked = {"dense": Factors(a, b)}
        with pytest.raises(ValueError, match="client 1"):
            aggregation.fedit(stacked, weights)
        found = jax.jit(aggregation.fedit)(stacked, weights)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected
        )


def test_several_sick_uploads_are_counted():
    stacked = cases.clients()
    stacked["block/up"].a[1:] = np.nan
    with pytest.raises(ValueError, match="client 1 .and of 1 more"):
        aggregation.fedit(stacked, cases.WEIGHTS)


@every
def test_a_large_but_finite_upload_is_not_sick(name):
    stacked = cases.clients()
    stacked["block/up"].a[0] = 3e30
    stacked["block/up"].b[:] = 0
    call(name, stacked, cases.WEIGHTS)


@every
def test_wrong_shapes(name):
    stacked = cases.clients()
    with pytest.raises(ValueError, match="one axis"):
        call(name, stacked, np.ones((3, 1), np.float32))
    with pytest.raises(ValueError, match="K=2.*for 2 weights"):
        call(name, stacked, np.ones(2, np.float32))
    crooked = stacked | {"block/up": Factors(stacked["block/up"].a, stacked["block/up"].b[:, :1])}
    with pytest.raises(ValueError, match="block/up.*expected a"):
        call(name, crooked, cases.WEIGHTS)
    with pytest.raises(ValueError, match="Factors"):
        call(name, {"dense": np.ones((3, 2, 2), np.float32)}, cases.WEIGHTS)
    with pytest.raises(ValueError, match="nothing"):
        call(name, {}, cases.WEIGHTS)


@every
@pytest.mark.parametrize("sizes", [(3, 4, 0, 5), (3, 0, 2, 5), (3, 4, 2, 0)])
def test_a_kernel_of_nothing_is_refused(name, sizes):
    clients, rows, rank, columns = sizes
    stacked = cases.clients()
    stacked["block/up"] = Factors(np.ones((clients, rows, rank)), np.ones((clients, rank, columns)))
    with pytest.raises(ValueError, match="adapter 'block/up': .*at least 1.*got a .*and b "):
        call(name, stacked, cases.WEIGHTS)


def test_what_is_no_sequence_of_trees_is_not_stacked():
    clients = {f"client_{seed}": cases.extra(seed) for seed in range(3)}
    with pytest.raises(ValueError, match="a sequence of adapter trees, got dict"):
        aggregation.stack(clients)
    with pytest.raises(ValueError, match="client 1 sent a FrozenDict, client 0 a dict"):
        aggregation.stack([cases.extra(0), FrozenDict(cases.extra(1))])


def test_adapters_alone_are_no_aggregate():
    stacked, weights = cases.clients(), cases.WEIGHTS
    adapters = aggregation.fedit(stacked, weights).adapters
    with pytest.raises(ValueError, match=r"aggregated must be Aggregated\(adapters, residual\)"):
        aggregation.error(stacked, weights, adapters)


def test_what_is_no_tree_of_factors_is_not_cut():
    with pytest.raises(ValueError, match=r"Factors\(a, b\) as its leaves.*found ndarray"):
        aggregation.cut({"dense": np.ones((3, 2))}, [1, 2])


@pytest.mark.parametrize(
    ("a", "b"), [((13, 2), (2, 10)), ((12, 2), (2, 11)), ((13, 2), (3, 11)), ((13,), (2, 11))]
)
def test_a_client_of_wrong_shapes_is_named(a, b):
    clients = [cases.extra(seed) for seed in range(3)]
    clients[2]["block/query"] = Factors(np.ones(a, np.float32), np.ones(b, np.float32))
    with pytest.raises(ValueError, match=r"client 2, adapter 'block/query': expected a \[13, r\]"):
        aggregation.stack(clients)
    del clients[2]["block/query"]
    with pytest.raises(
        ValueError, match="client 2 sent kernels .*block/up.*client 0 .*block/query"
    ):
        aggregation.stack(clients)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'lora_fair'.*fedit, fedrot_lora"):
        aggregation.get("lora_fiar")
    stacked, weights = cases.clients(), cases.WEIGHTS
    for name, options in {
        "lora_fair": {"similarity": "cosin"},
        "flora_na": {"solver": "adam"},
        "flexlora": {"split": "both"},
        "hetlora": {"per": "layer"},
        "rolora": {"trained": "c"},
        "spectral": {"selection": "energi"},
        "fedrot_lora": {"aligned": "c", "reference": cases.extra()},
    }.items():
        with pytest.raises(ValueError, match="unknown .* Valid names"):
            aggregation.get(name)(stacked, weights, **options)


def test_options_that_contradict():
    with pytest.raises(ValueError, match="no closed form"):
        aggregation.lora_fair(cases.clients(), cases.WEIGHTS, solver="closed_form")
    with pytest.raises(ValueError, match="sweeps"):
        aggregation.flora_na(cases.clients(), cases.WEIGHTS, sweeps=-1)
    for name in ("flexlora", "fedex_lora", "spectral"):
        with pytest.raises(ValueError, match="rank must be at least 1"):
            aggregation.get(name)(cases.clients(), cases.WEIGHTS, rank=0)


def test_trees_that_do_not_fit():
    stacked, other = cases.clients(), cases.extra()
    missing = {name: x for name, x in other.items() if name != "block/up"}
    with pytest.raises(ValueError, match="structure"):
        aggregation.frlora(stacked, cases.WEIGHTS, initial=missing)
    wrong = other | {"block/up": other["block/query"]}
    with pytest.raises(ValueError, match=r"block/up.*\[17, 29\]"):
        aggregation.fedrot_lora(stacked, cases.WEIGHTS, reference=wrong)
    with pytest.raises(ValueError, match="rank 3 to the smaller rank 2"):
        aggregation.fedrot_lora(stacked, cases.WEIGHTS, reference=cases.extra(rank=3))


def test_stack_pads_unequal_ranks_and_keeps_products():
    small = cases.extra(1, rank=1)
    large = cases.extra(2, rank=3)
    stacked = aggregation.stack([small, large])
    assert stacked["block/up"].a.shape == (2, 17, 3)
    for index, client in enumerate((small, large)):
        for name, x in client.items():
            np.testing.assert_allclose(
                stacked[name].a[index] @ stacked[name].b[index], x.a @ x.b, atol=1e-5
            )
    with pytest.raises(ValueError, match="no clients"):
        aggregation.stack([])
    with pytest.raises(ValueError, match="smaller rank"):
        aggregation.stack([small, large], rank=2)


def test_any_pytree_of_factors_will_do():
    node = cases.clients()["block/up"]
    tree = [node, {"deep": (Factors(jnp.asarray(node.a), jnp.asarray(node.b)),)}]
    mean = aggregation.fedit(tree, cases.WEIGHTS).adapters
    assert isinstance(mean, list) and mean[1]["deep"][0].a.shape == (17, 2)
    names = aggregation.error(
        tree, cases.WEIGHTS, aggregation.fedit(tree, cases.WEIGHTS), per_kernel=True
    )
    assert list(names) == ["0", "1/deep/0"]


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        ("ffa_lora", {}, "a"),
        ("fedsvd", {}, "a"),
        ("rolora", {"trained": "b"}, "a"),
        ("rolora", {"trained": "a"}, "b"),
    ],
)
def test_clients_that_differ_in_a_common_factor_are_warned_of(name, options, side, recwarn):
    stacked, weights = cases.clients(), np.array([0.0, 1.0, 2.0], np.float32)
    function = aggregation.get(name)
    with pytest.warns(aggregation.UnequalFactors, match=f"{name} takes one '{side}'.*client 2"):
        function(stacked, weights, **options)
    recwarn.clear()
    for node in stacked.values():
        getattr(node, side)[1:] = getattr(node, side)[1]
    function(stacked, weights, **options)
    # Of a smaller rank: what meets zeros does not count.
    for node in stacked.values():
        node.a[2, :, 1:], node.b[2, 1:] = 0, 0
    function(stacked, weights, **options)
    jax.jit(lambda x: function(x, weights, **options))(cases.clients())
    assert not recwarn.list


PAIRS = [(name, index) for name, variants in cases.CASES.items() for index in range(len(variants))]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_project_may_forbid_itself_promotion(pair):
    """Common settings of users' projects, which hold for all that they call."""
    stacked = jax.tree.map(
        jnp.asarray, cases.prepared(cases.CASES[pair[0]][pair[1]], cases.clients())
    )
    function = cases.bound(pair)

    def size(stacked, weights):
        leaves = jax.tree.leaves(function(stacked, weights))
        return sum(jnp.sum(jnp.sin(x)) for x in leaves)

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        gradients = jax.grad(size, argnums=(0, 1))
        found = jax.eval_shape(gradients, stacked, jnp.asarray(cases.WEIGHTS))
        # What is not traced, once for each function.
        if pair[1] == 0:
            function(stacked, cases.WEIGHTS)
    assert jax.tree.map(_outline, found) == jax.tree.map(
        _outline, (stacked, jnp.asarray(cases.WEIGHTS))
    )


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_project_may_aggregate_within_shard_map(pair):
    """Of which each device has a federation of its own, with the same weights."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], "federations")
    stacked = cases.prepared(cases.CASES[pair[0]][pair[1]], cases.clients())
    arguments = jax.tree.map(jnp.asarray, (stacked, cases.WEIGHTS))
    own, same = jax.P("federations"), jax.P()
    function = jax.shard_map(cases.bound(pair), mesh=mesh, in_specs=(own, same), out_specs=own)
    alone, found = (jax.eval_shape(each, *arguments) for each in (cases.bound(pair), function))
    assert jax.tree.map(_outline, found) == jax.tree.map(_outline, alone)


def _outline(x):
    return x.shape, x.dtype


def test_a_sketch_may_be_made_within_shard_map():
    """Of stacks that are wider than what is decomposed exactly."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], "kernels")
    wide = Factors(jnp.ones((2000, 1200)), jnp.ones((1200, 1500)))
    for function in (lowrank.singular_values, lambda x: lowrank.truncate(x, 2)):
        found = jax.shard_map(
            function, mesh=mesh, in_specs=jax.P("kernels"), out_specs=jax.P("kernels")
        )
        alone, here = jax.eval_shape(function, wide), jax.eval_shape(found, wide)
        assert jax.tree.map(_outline, here) == jax.tree.map(_outline, alone)


def test_a_project_may_forbid_itself_promotion_beside_the_functions():
    def all_of_them(stacked, one, weights):
        mean = aggregation.fedit(stacked, weights)
        gram = aggregation.gram(stacked, weights, reference=one)
        return (
            aggregation.error(stacked, weights, mean),
            aggregation.diagnostics(stacked, weights, mean),
            aggregation.krum_weights(gram, weights, byzantine=0.2),
            aggregation.geometric_median_weights(gram, weights),
            aggregation.clip_scales(gram, weights),
            aggregation.coordinate_median(stacked, weights),
            aggregation.coordinate_trimmed_mean(stacked, weights, byzantine=0.2),
            aggregation.cut(aggregation.ordered(one), [1, 2]),
            jax.grad(aggregation.tail_penalty)(one, 2),
        )

    stacked = jax.tree.map(jnp.asarray, cases.clients(count=5))
    one, weights = jax.tree.map(lambda x: x[0], stacked), jnp.arange(1.0, 6.0)
    usual = jax.eval_shape(all_of_them, stacked, one, weights)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(all_of_them, stacked, one, weights) == usual


@pytest.mark.parametrize("module", [aggregation, methods])
def test_a_type_checker_sees_what_is_exported(module):
    """It knows no names that are put together when a module is imported."""
    [names] = [
        ast.literal_eval(node.value)
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "__all__"
    ]
    assert {*module.REGISTRY} <= {*names}


def test_hints_allow_the_weights_that_functions_take():
    functions = [getattr(aggregation, name) for name in aggregation.__all__]
    hints = [typing.get_type_hints(f) for f in functions if inspect.isfunction(f)]
    weights = [hint["weights"] for hint in hints if "weights" in hint]
    assert len(weights) > len(aggregation.REGISTRY)
    assert {*weights} == {ArrayLike | Sequence[ArrayLike]}


@pytest.mark.parametrize(
    ("name", "options"),
    [("flexlora", "rank"), ("fedex_lora", "rank"), ("flora_na", "sweeps"), ("lora_fair", "steps")],
)
def test_a_number_that_shapes_a_program_must_be_known(name, options):
    def traced(value):
        return aggregation.get(name)(cases.clients(), cases.WEIGHTS, **{options: value})

    with pytest.raises(ValueError, match=f"{name}: {options} must be a Python number.*static"):
        jax.jit(traced)(2)
    with pytest.raises(ValueError, match=f"{name}: {options} must be a Python number.*static"):
        traced(jnp.asarray(2))


def test_layers_that_are_stacked_are_mapped_over():
    """As the docstring of `aggregation` says."""
    clients = [
        jax.tree.map(lambda *x: jnp.stack(x), *(cases.extra(seed, rank) for seed in layers))
        for layers, rank in (((1, 2), 2), ((3, 4), 1))
    ]
    with pytest.raises(ValueError, match="jax.vmap"):
        aggregation.stack(clients)
    stacked = jax.vmap(lambda *trees: aggregation.stack(trees))(*clients)
    found = jax.vmap(aggregation.flexlora, in_axes=(0, None))(stacked, jnp.ones(2))
    for layer in (0, 1):
        alone = aggregation.stack([jax.tree.map(lambda x, i=layer: x[i], tree) for tree in clients])
        expected = cases.product(aggregation.flexlora(alone, np.ones(2)), np.ones(2))
        mine = cases.product(jax.tree.map(lambda x, i=layer: x[i], found), np.ones(2))
        for x, y in zip(mine, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
