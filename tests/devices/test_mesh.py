"""A cohort on several devices: what comes out is what one device finds."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from experiments.benchmarks import hlo
from fedlora_jax import (
    Factors,
    _batching,
    aggregation,
    experiment,
    lora,
    methods,
    models,
    transforms,
)
from fedlora_jax.data.clients import NO_PLACE, CohortExamples, client_data
from fedlora_jax.experiment import finished
from fedlora_jax.federated import faults, outline, placement, visits
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.placement import MODEL
from fedlora_jax.federated.round import CohortRound, Recipe, make_cohort_round
from fedlora_jax.federated.task import causal_language_model
from fedlora_jax.lowrank import is_factors
from fedlora_jax.methods import Server, Trainable
from tests.world import COHORT, World, learning_rate, method_of

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")

# Float32, two rounds: rounding alone. A client of three examples has a gradient of rank three: of
# the four singular vectors that fedsmooth_lora takes, rounding draws the last, on one device too.
# An effective rank counts singular values as small as rounding, each by its logarithm.
TOLERANCE, OPEN, DESCRIBED = 2e-6, 5e-2, 1e-3
# How the small world's two layers are split over `MODEL`, as the two of an MLP are.
SPLITS = (
    (r"first/kernel$", PartitionSpec(None, MODEL)),
    (r"first/bias$", PartitionSpec(MODEL)),
    (r"second/kernel$", PartitionSpec(MODEL, None)),
)
# What a collective of a compiled program is there for.
EXCHANGED = re.compile(r" all-(?:gather|reduce|to-all)(?:-start)?\(.*op_name=\"([^\"]*)\"")
# By what it is: a method, what it is combined with, and the ranks of the seven clients.
COMBINED = {
    "scaffold, server optimiser, unequal ranks": (
        "fedit",
        lambda method: transforms.ordered(
            transforms.scaffold(transforms.server_optimizer(method, optax.adam(1e-2)))
        ),
        [1, 2, 2, 1, 2, 2, 2],
    ),
    "privacy, server step, fedprox": (
        "ffa_lora",
        lambda method: transforms.fedprox(
            transforms.server_step(
                transforms.private(method, clip=0.1, noise_multiplier=0.1, cohort_size=4),
                rate=0.8,
                momentum=0.5,
                rank=2,
            ),
            mu=0.1,
        ),
        None,
    ),
}


def placed(mesh, state, members, data):
    """The arguments of a round, on the mesh."""
    server = placement.put(state.server, placement.server(mesh, state.server))
    everywhere = (placement.put(x, placement.everywhere(mesh)) for x in (state.ranks, data))
    chosen = jax.tree.map(lambda x: x[np.maximum(members, 0)], state.clients)
    rows = placement.put(chosen, placement.rows(mesh))
    return server, rows, *everywhere, placement.put(members, placement.rows(mesh))


def products(tree):
    """Factors multiplied out: what they mean."""
    return jax.tree.map(
        lambda x: x.a @ x.b if is_factors(x) else x, jax.device_get(tree), is_leaf=is_factors
    )


def model(server):
    merged = lora.merge(server.backbone, server.trainable.adapters, scale=server.scale)
    return jax.device_get((merged, server.trainable.head))


def close(tolerance):
    return lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def two_rounds(world, method, members, *, ranks=None, mesh=None, **options):
    """The text of the program, the server, the states of who is there, and the last metrics."""
    state, members = world.federation(method, ranks), np.array(members)
    recipe = Recipe(world.task, method, world.training, **options)
    function = make_cohort_round(recipe, mesh=mesh)
    clients = jax.tree.map(lambda x: x[np.maximum(members, 0)], state.clients)
    arguments = (state.server, clients, state.ranks, world.data, members)
    if mesh is not None:
        arguments = placed(mesh, state, members, world.data)
    server, states, *given = (*arguments, world.seed)
    program = function.lower(server, states, *given, jnp.float32(0.2)).compile()
    for index in range(2):
        rate = jnp.float32(0.2) / (1 + index)
        server, states, metrics = CohortRound(program)(server, states, *given, rate)
    states = jax.tree.map(lambda x: x[members >= 0], jax.device_get(states))
    return program.as_text(), server, products(states), metrics


@pytest.mark.parametrize("shape", [(4, 1), (2, 2)])
@pytest.mark.parametrize("name", sorted(methods.REGISTRY))
def test_several_devices_find_what_one_finds(world, name, shape, monkeypatch):
    """Four clients and places of nobody, two rounds of one program; of one who has all, one.

    Neither in a turn of a loop nor for the work of its own clients does a device wait for another
    one, but for the rest of a split layer.
    """
    monkeypatch.setattr(placement, "SPLITS", SPLITS)
    mesh, method, clients = placement.make_mesh(*shape), method_of(name), COHORT
    if method.pooled:
        all_of_them = client_data(world.data.examples, [np.arange(len(world.data.positions))])
        world, clients = world._replace(data=all_of_them), COHORT[:1]
    _, alone, measured, _ = world.run(name, [clients, clients])
    members = [*clients[:3], -1, *clients[3:]]
    members += [-1] * (-len(members) % 8)
    text, server, kept, metrics = two_rounds(world, method, members, mesh=mesh)
    kernel = server.backbone["first"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (6, 10 // shape[1])
    assert hlo.collectives(text)
    if shape[1] == 1:
        assert not hlo.collectives(text, only_in_loops=True)
        sources = EXCHANGED.findall(text)
        assert sources and not [source for source in sources if "shard_map/" in source]
    assert int(metrics.excluded) == 0
    expected = jax.tree.map(lambda x: x[clients], jax.device_get(alone.clients))
    found, wanted = (
        (model(of), states, of_round.loss, of_round.aggregation_error)
        for of, states, of_round in (
            (server, kept, metrics),
            (alone.server, products(expected), measured),
        )
    )
    jax.tree.map(close(OPEN if name == "fedsmooth_lora" else TOLERANCE), found, wanted)


@pytest.mark.parametrize("combined", COMBINED)
def test_combined_methods_find_what_they_find_on_one_device(world, combined, monkeypatch):
    """A split backbone, one client after the other, one of four lying; diagnosed."""
    monkeypatch.setattr(placement, "SPLITS", SPLITS)
    name, combine, ranks = COMBINED[combined]
    method = combine(method_of(name))._replace(diagnosed=True)
    flips = faults.make("sign_flip", share=0.25)
    world = world._replace(training=world.training._replace(faults=flips))
    mesh, found, described = placement.make_mesh(2, 2), [], []
    for members, options in (
        (COHORT, {}),
        ([*COHORT, -1, -1], {"mesh": mesh, "clients_per_chunk": 1}),
    ):
        _, server, states, metrics = two_rounds(world, method, members, ranks=ranks, **options)
        found.append((model(server), states, metrics.loss, metrics.aggregation_error))
        described.append(metrics.diagnostics)
    jax.tree.map(close(TOLERANCE), *found)
    jax.tree.map(close(DESCRIBED), *described)


@pytest.mark.parametrize("rule", [None, *transforms.ROBUST_RULES])
def test_four_devices_bear_what_one_bears(world, rule):
    """One of four clients drops out, or attacks and meets a robust rule."""
    mesh, method, kind = placement.make_mesh(4), method_of("fedit"), "dropout"
    if rule is not None:
        method, kind = transforms.robust(method, rule=rule), "huge"
    training = world.training._replace(faults=faults.make(kind, share=0.25, factor=1e-4))
    state, found = world.federation(method), []
    for devices, members in ((None, np.array(COHORT)), (mesh, np.array([*COHORT, *[-1] * 4]))):
        function = make_cohort_round(Recipe(world.task, method, training), mesh=devices)
        clients = jax.tree.map(lambda x, who=members: x[np.maximum(who, 0)], state.clients)
        arguments = (state.server, clients, state.ranks, world.data, members)
        if devices is not None:
            arguments = placed(mesh, state, members, world.data)
        server, _, metrics = function(*arguments, world.seed, jnp.float32(0.2))
        assert int(metrics.absent) == (rule is None)
        found.append((model(server), metrics.loss))
    # A distance from the median that is nearly zero is known to the root of the rounding.
    close = {"rtol": 0, "atol": 1e-4 if rule == "geometric_median" else 3e-6}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **close), *found)


def test_clients_with_examples_of_their_own_have_them_on_their_device(world):
    """What a round of them finds is, to the bit, what it finds with all examples everywhere."""
    mesh, method = placement.make_mesh(4), method_of("fedit")
    members = np.array([*COHORT[:3], -1, COHORT[3], -1, -1, -1])
    state, data = world.federation(method), world.data
    counts = np.asarray(data.counts)[np.maximum(members, 0)]
    draw = visits.make_visits(world.training, 0, int(data.counts.max()))
    places = np.asarray(draw(world.seed, 0, members, counts))
    offsets = np.asarray(data.offsets)[np.maximum(members, 0)]
    there = places != NO_PLACE
    positions = np.asarray(data.positions)[np.where(there, offsets[:, None] + places, 0)]
    examples = {name: np.asarray(x)[positions] for name, x in data.examples.items()}
    own = placement.put_own_rows(CohortExamples(examples, places), mesh)
    assert len(own.places.addressable_shards[0].data) == 2
    assert placement.own_rows(mesh, len(members)).all()
    function = make_cohort_round(Recipe(world.task, method, world.training), mesh=mesh)
    found = []
    server, states, ranks, shared, cohort = placed(mesh, state, members, data)
    for each in (shared, shared._replace(examples=own)):
        rest = (each, cohort, world.seed, jnp.float32(0.2))
        changed, _, metrics = function(server, states, ranks, *rest)
        found.append((model(changed), metrics.loss))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("name", sorted(methods.REGISTRY))
def test_the_server_waits_in_no_loop_over_layers(name):
    """Of a model whose layers are alike."""
    mesh, method, rank = placement.make_mesh(4), method_of(name), jnp.int32(2)
    kernels = {f"layer_{i}": {"kernel": jnp.ones((8, 8))} for i in range(4)}
    adapters = lora.init(jax.random.key(0), kernels, targets="layer", rank=2)
    start = Server(kernels, Trainable(adapters, {}), jnp.float32(2), (), jnp.int32(0))
    server, client = method.init(jax.random.key(1), start)
    upload = outline.outline(method, server, client, rank, cohort_size=8).upload
    uploads, weights = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((8, *x.shape), x.dtype, sharding=placement.rows(mesh)),
        (upload, jax.ShapeDtypeStruct((), jnp.float32)),
    )

    def step(server, uploads, weights):
        with _batching.dealt_to(mesh, placement.CLIENTS):
            return method.aggregate(server, uploads, weights)[0]

    whole = placement.everywhere(mesh)
    program = jax.jit(step, out_shardings=whole)
    text = program.lower(placement.put(server, whole), uploads, weights).compile().as_text()
    assert bool(hlo.collectives(text)) == (name != "local")
    assert not hlo.collectives(text, only_in_loops=True)


def test_the_mean_of_products_is_added_up_over_devices():
    """Each multiplies what its clients sent: the kernels cross, and not all factors of them."""
    mesh, count, width, rank = placement.make_mesh(4), 16, 32, 4
    of_clients, whole = placement.rows(mesh), placement.everywhere(mesh)
    shapes = (count, width, rank), (count, rank, width), (count,), (width, width)
    places = of_clients, of_clients, of_clients, whole
    a, b, weights, kernel = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for shape, place in zip(shapes, places, strict=True)
    )

    def merged(stacked, weights, kernel):
        with _batching.dealt_to(mesh, placement.CLIENTS):
            means, residual = aggregation.fedex_lora(stacked, weights)
        return means, kernel + residual["one"].a @ residual["one"].b

    program = jax.jit(merged, out_shardings=whole)
    text = program.lower({"one": Factors(a, b)}, weights, kernel).compile().as_text()
    sent = sum(each.num_bytes for each in hlo.collectives(text).values())
    needed = 4 * (width * width + 2 * width * rank)
    assert needed <= sent < 1.5 * needed


def test_a_transformer_split_over_devices_gives_the_same_rounds():
    """Two devices a backbone, two for the cohort; heads of attention are split with its kernels."""
    llama = models.Llama(vocab_size=32, width=16, depth=1, num_heads=4, num_kv_heads=2, mlp_dim=32)
    key = jax.random.key(0)
    tokens = jax.random.randint(key, (24, 9), 0, 32)
    params = jax.jit(llama.init)(key, tokens[:, :-1])["params"]
    adapters = lora.init(key, params, targets=models.lora_targets(llama), rank=2)
    data = client_data({"tokens": tokens, "answer": tokens > 0}, np.split(np.arange(24), 4))
    start = Server(params, Trainable(adapters, {}), jnp.float32(2), (), jnp.int32(0))
    training, found = LocalTraining(optax.adamw(0.1), 3, 2), []
    world = World(causal_language_model(llama), data, start, training, key)
    for mesh in (None, placement.make_mesh(2, 2)):
        _, server, _, metrics = two_rounds(world, method_of("flexlora"), range(4), mesh=mesh)
        found.append((model(server), metrics.loss, metrics.aggregation_error))
    kernel = server.backbone["block_0"]["attention"]["query"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 8)
    jax.tree.map(close(TOLERANCE), *found)


@pytest.mark.parametrize("name", ["fedit", "fedex_lora"])
def test_no_device_holds_the_whole_of_a_split_backbone(digits, tmp_path, name):
    """Neither before a run nor in it; also where kernels are widened to be merged into."""
    config = digits.copy_and_resolve_references()
    config.method, config.mesh.clients, config.mesh.model, config.rounds = name, 2, 2, 2
    config.precision.storage = config.precision.compute = "bfloat16"
    elsewhere = jax.live_arrays()
    setting = experiment.prepare(config)
    program = experiment.compile_program(config, setting)
    before = {id(x) for x in elsewhere}

    def whole():
        """New arrays of the shape of a split kernel that are whole on any device."""
        new = [x for x in jax.live_arrays() if id(x) not in before]
        return [shard.data.shape for x in new for shard in x.global_shards].count((16, 16))

    assert whole() == 0
    state = experiment.first_state(config, setting, program.method, mesh=program.mesh)
    kernel = state.server.backbone["block_0"]["attention"]["query"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 8)
    assert kernel.dtype == (jnp.bfloat16 if name == "fedit" else jnp.float32)
    assert whole() == 0
    found = []
    experiment.run(config, setting, program, tmp_path / "run", lambda: found.append(whole()))
    assert len(found) == config.rounds and not any(found)


def test_the_untouched_model_is_judged_on_the_mesh_too(digits):
    config = digits.copy_and_resolve_references()
    setting = experiment.prepare(config)
    found = []
    for devices in (1, 4):
        config.mesh.clients = devices
        found.append(finished.untrained(config, setting).measure()["cross_entropy"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("name", ["lora_fair", "flora_na", "hetlora"])
def test_nobody_changes_nothing(world, name):
    method = method_of(name)
    function = make_cohort_round(Recipe(world.task, method, world.training))
    state = world.federation(method)
    members = jnp.array([*COHORT, -1, -1])
    states = jax.tree.map(lambda x: x[jnp.maximum(members, 0)], state.clients)
    arguments = (states, state.ranks, world.data, members, world.seed)
    server, _, metrics = function(state.server, *arguments, learning_rate(state))
    _, alone, measured, _ = world.run(name, [COHORT])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        model(server),
        model(alone.server),
    )
    np.testing.assert_allclose(metrics.loss, measured.loss, rtol=1e-6)
    assert int(metrics.excluded) == 0


def test_a_cohort_is_padded_to_a_multiple_of_the_devices():
    mesh = placement.make_mesh(4)
    assert placement.padded(np.arange(5), mesh).tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert placement.padded(np.arange(4), mesh).tolist() == [0, 1, 2, 3]
    assert placement.padded(np.arange(5), None).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(8, 1), (3, 2), (0, 1), (2, -1)])
def test_a_mesh_of_devices_that_are_not_there_is_refused(shape):
    with pytest.raises(ValueError, match="a mesh of .* there are 4"):
        placement.make_mesh(*shape)


@dataclasses.dataclass(frozen=True)
class Tpu:
    """What JAX reads of a device of a slice of TPUs, to find an order for a mesh."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str
    slice_index: int
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


def tpus(kind, *sizes, slices=1):
    """The devices of slices of so many by so many chips."""
    places = [tuple(map(int, place[::-1])) for place in np.ndindex(*sizes[::-1])]
    each = ((where, place) for where in range(slices) for place in places)
    return [Tpu(i, place, kind, where) for i, (where, place) in enumerate(each)]


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v6 lite"])
@pytest.mark.parametrize(
    "sizes, shape",
    [*(((4, 4, 1), (16 // n, n)) for n in (1, 2, 4, 8, 16)), ((1, 1, 28), (14, 2))],
)
def test_a_slice_of_tpus_is_a_mesh_of_any_shape(kind, sizes, shape, monkeypatch):
    """Also of a shape for which an axis of the torus has to be split."""
    there = tpus(kind, *sizes)
    monkeypatch.setattr(jax, "devices", lambda: there)
    found = placement.make_mesh(*shape)
    assert found.axis_names == ("clients", "model")
    assert found.devices.shape == shape and set(found.devices.flat) == set(there)


def test_a_backbone_stays_in_one_slice_of_tpus(monkeypatch):
    there = tpus("TPU v4", 2, 2, 1, slices=4)
    monkeypatch.setattr(jax, "devices", lambda: there)
    found = placement.make_mesh(8, 2).devices
    assert set(found.flat) == set(there)
    assert [{device.slice_index for device in pair} for pair in found] == [
        {where} for where in (0, 0, 1, 1, 2, 2, 3, 3)
    ]


@pytest.mark.parametrize(
    "there, shape",
    [
        # Six chips of eight are no rectangle; two slices divide neither one nor three clients.
        (tpus("TPU v4", 4, 2, 1), (3, 2)),
        (tpus("TPU v4", 2, 2, 1, slices=2), (1, 8)),
        (tpus("TPU v4", 3, 1, 1, slices=2), (3, 2)),
    ],
)
def test_what_jax_has_no_order_for_is_as_it_comes(there, shape, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: there)
    assert [device.id for device in placement.make_mesh(*shape).devices.flat] == [
        device.id for device in there[: shape[0] * shape[1]]
    ]


@pytest.mark.parametrize("shape", [(4, 1), (2, 2), (1, 2)])
def test_cpus_keep_their_order(shape):
    found = placement.make_mesh(*shape).devices
    assert list(found.flat) == jax.devices()[: found.size]
