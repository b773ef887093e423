"""One round of a federation as one jitted program.

With a model and data of your own, without the experiments:

    backbone, head = lora.split_head(params, "^head$")
    adapters = lora.init(key, params, targets="hidden", rank=8)
    server = Server(backbone, Trainable(adapters, head), jnp.float32(2.0), (), jnp.int32(0))
    method, training = methods.fedit(), LocalTraining(optax.sgd(1.0), batch_size=8, steps=5)
    learned = task.regression(model, lambda batch: (batch["x"],))
    one_round = make_round(Recipe(learned, method, training))
    federation = create(key, method, server, num_clients=len(parts))
    data = client_data({"x": x, "label": y}, parts)
    federation, metrics = one_round(federation, data, jnp.arange(len(parts)), seed, learning_rate)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from fedlora_jax import _batching, _linalg, aggregation, bounds, lora, lowrank
from fedlora_jax.data.clients import ClientData, CohortExamples, local_batch
from fedlora_jax.federated import faults, local, placement, precision, randomness, visits
from fedlora_jax.federated.local import BatchOf, LocalTraining
from fedlora_jax.federated.task import Task
from fedlora_jax.lora import Adapters, Params
from fedlora_jax.methods import (
    Context,
    Method,
    Server,
    Start,
    Trainable,
    change,
    check_combination,
    mean,
)

PyTree: TypeAlias = Any


class Federation(NamedTuple):
    """The state of an experiment between rounds.

    Attributes:
      server: The server's state.
      clients: The clients' states, stacked along `[N]`; `()` for a method whose clients keep none.
      ranks: The rank that each client can afford, int32 `[N]`.
    """

    server: Server
    clients: PyTree
    ranks: jax.Array


class RoundMetrics(NamedTuple):
    """What a round measures, all on the device.

    Attributes:
      loss: Mean training loss of the cohort's clients that count, each by its weight, `[]`; NaN if
        nobody counts, as is all that describes the updates.
      client_loss: Mean training loss of each client of the cohort over its steps, `[K]`.
      aggregation_error: Relative distance of the server's update from the mean of the clients'
        updates (`aggregation.error`), `[]`; NaN if the method does not aggregate.
      ranks: The rank that each client of the cohort trained, int32 `[K]`.
      excluded: Clients left out because something they sent was not finite, int32 `[]`.
      diagnostics: Of the same updates over all kernels, r being the rank of the server's adapters;
        None unless the method is to be diagnosed.
      silent: Which clients did not answer, bool `[K]`; None unless there are faults.
    """

    loss: jax.Array
    client_loss: jax.Array
    aggregation_error: jax.Array
    ranks: jax.Array
    excluded: jax.Array
    diagnostics: aggregation.Diagnostics | None = None
    silent: jax.Array | None = None

    @property
    def absent(self) -> jax.Array | None:
        """Clients that did not answer, `[]`; None unless there are faults."""
        return None if self.silent is None else self.silent.sum()


class Recipe(NamedTuple):
    """What a round does, whoever takes part in it: all that is fixed when it is compiled.

    Attributes:
      task: What is learned.
      method: How clients and server work together.
      training: How clients train, and fail.
      equal_weights: Weigh clients equally instead of by their number of examples. So it is done
        anyhow for a method that says so of itself.
      clients_per_chunk: Clients trained at once (on each device, if there are several), one chunk
        after the other, so that memory is that of a chunk and not of a cohort; None for all at
        once.
    """

    task: Task
    method: Method
    training: LocalTraining
    equal_weights: bool = False
    clients_per_chunk: int | None = None


class RoundFunction(Protocol):
    """A jitted round, from `make_round`."""

    def __call__(
        self,
        federation: Federation,
        data: ClientData,
        cohort: jax.Array,
        seed: jax.Array,
        learning_rate: ArrayLike,
    ) -> tuple[Federation, RoundMetrics]:
        """See `run_round`."""

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """The program for arguments of these shapes, not yet compiled."""


def create(
    key: jax.Array,
    method: Method,
    server: Server,
    num_clients: int,
    ranks: Sequence[int] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Federation:
    """The state before the first round, with the same initial state for each client.

    What learns is float32 in it, whatever it is stored in: adapters, head, and the adapted kernels
    if the method merges into them. With a backbone in bfloat16 that is 4 bytes an entry
    instead of 2, of adapted kernels and of merging methods alone; all else stays as it is. With
    arithmetic in bfloat16, adapted kernels in float32 are also moved off its grid, so that what is
    merged is seen, see `precision.off_the_grid`.

    Args:
      key: Random key of the method's own choices.
      method: How clients and server work together.
      server: Backbone, first adapters, head and scale.
      num_clients: N.
      ranks: The rank of each client; by default that of the server's adapters. A method for unequal
        ones is best wrapped by `transforms.ordered`.
      dtype: Type of the model's arithmetic.

    Raises:
      ValueError: If the ranks are not N whole numbers from 1 to the rank of the server's adapters,
        or differ for a method that cannot have that; or if there are adapters on layers that the
        backbone does not have, such as those of the head.
    """
    affordable = check_ranks(method, server, num_clients, ranks)
    server, client = first_states(key, method, server, dtype)
    clients = jax.tree.map(lambda x: jnp.repeat(x[None], num_clients, axis=0), client)
    return Federation(server, clients, affordable)


def check_ranks(
    method: Method, server: Server, num_clients: int, ranks: Sequence[int] | None
) -> jax.Array:
    """The rank of each client, int32 `[N]`; raises ValueError as `create` does."""
    full = max(factors.rank for factors in server.trainable.adapters.values())
    chosen = np.full(num_clients, full) if ranks is None else np.asarray(ranks)
    whole = np.all(chosen == np.floor(chosen))
    if chosen.shape != (num_clients,) or not whole or chosen.min() < 1 or chosen.max() > full:
        found = f"from {chosen.min()} to {chosen.max()}" if chosen.size else "none"
        raise ValueError(
            f"expected the ranks of {num_clients} clients, each from 1 to {full} (the rank of the "
            f"server's adapters) and whole, got {chosen.size} of them, {found}"
        )
    if chosen.min() < full:
        check_combination(method, "unequal_ranks", "unequal ranks")
    return jnp.asarray(chosen, jnp.int32)


def first_states(
    key: jax.Array, method: Method, server: Server, dtype: DTypeLike = jnp.float32
) -> tuple[Server, PyTree]:
    """The server's state before the first round and that of any client, as `create` has them."""
    shapes = lora.kernel_shapes(server.backbone)
    if missing := server.trainable.adapters.keys() - shapes.keys():
        raise ValueError(
            f"the server has adapters on {sorted(missing)}, which are not in its backbone: a layer "
            f"is adapted, or trained whole in the head, not both. Layers: {', '.join(shapes)}"
        )
    full = max(factors.rank for factors in server.trainable.adapters.values())
    server, client = method.init(key, precision.with_wide_trainable(server))
    server = precision.with_wide_kernels(method, server, client, jnp.int32(full))
    return precision.off_the_grid(key, server, dtype), client


class CohortResult(NamedTuple):
    """What the clients of a cohort did in a round; everything stacked along `[K]`.

    Attributes:
      start: Where they started from.
      trained: Where they arrived, or claim to have if they are faulty.
      uploads: What they send.
      clients: Their states after the round.
      loss: Mean training loss over the steps, `[K]`.
      rank: The ranks that they trained, int32 `[K]`.
    """

    start: Start
    trained: Trainable
    uploads: PyTree
    clients: PyTree
    loss: jax.Array
    rank: jax.Array


def train_cohort(
    recipe: Recipe,
    federation: Federation,
    data: ClientData,
    cohort: jax.Array,
    seed: jax.Array,
    learning_rate: ArrayLike,
) -> CohortResult:
    """The first half of `run_round`: trains the clients of a cohort over one backbone."""
    cohort = _who_is_there(cohort, data)
    shared = _shared(recipe.task, federation.server, data, seed, learning_rate)
    states = _rows(federation.clients, cohort)
    faulty = _faulty(recipe.training, shared, cohort)
    members = _members(states, federation.ranks, data, cohort, faulty)
    return _train(recipe, shared, members)


def _who_is_there(cohort: jax.Array, data: ClientData) -> jax.Array:
    """The cohort with -1 for whoever has no data; an index past an array's end is its last one."""
    return jnp.where(cohort < len(data.counts), cohort, -1)


class _Members(NamedTuple):
    """What is each client's own, stacked along `[K]`: of its examples how many, and where.

    `own` are the examples themselves, or None if they are among those that all share. `faulty` is
    None if there are no faults.
    """

    state: PyTree
    identity: jax.Array
    rank: jax.Array
    num_examples: jax.Array
    offset: jax.Array
    own: CohortExamples | None
    faulty: jax.Array | None


class _Shared(NamedTuple):
    """What the clients of a cohort have in common."""

    server: Server
    frozen: Params
    examples: dict[str, jax.Array]
    positions: jax.Array
    seed: jax.Array
    learning_rate: ArrayLike


def _members(
    states: PyTree,
    ranks: jax.Array,
    data: ClientData,
    cohort: jax.Array,
    faulty: jax.Array | None,
) -> _Members:
    """The clients of a cohort; in the place of nobody there is the first, with one example.

    Raises:
      ValueError: If there are data of more clients than there are.
    """
    if len(data.counts) > len(ranks):
        raise ValueError(
            f"the data are of {len(data.counts)} clients, the federation has {len(ranks)}"
        )
    who = jnp.maximum(cohort, 0)
    counts = jnp.where(cohort < 0, 1, data.counts[who])
    own = data.examples if isinstance(data.examples, CohortExamples) else None
    return _Members(states, cohort, ranks[who], counts, data.offsets[who], own, faulty)


def _shared(
    task: Task, server: Server, data: ClientData, seed: jax.Array, learning_rate: ArrayLike
) -> _Shared:
    examples = {} if isinstance(data.examples, CohortExamples) else data.examples
    frozen = task.frozen(server.backbone)
    return _Shared(server, frozen, examples, data.positions, seed, learning_rate)


def _faulty(training: LocalTraining, shared: _Shared, cohort: jax.Array) -> jax.Array | None:
    if training.faults is None:
        return None
    return faults.drawn(training.faults, shared.seed, shared.server.round, cohort)


def _train(
    recipe: Recipe, shared: _Shared, members: _Members, mesh: Mesh | None = None
) -> CohortResult:
    training = recipe.training
    layout: list[tuple[Any, list[int]]] = []

    def each(shared: _Shared, members: _Members) -> list[jax.Array]:
        def at_once(members: _Members) -> list[jax.Array]:
            # No client waits for one of another chunk that has more to train on.
            longest: jax.Array | int = training.steps
            if training.epochs:
                longest = jnp.max(training.steps_of(members.num_examples))

            def one(member: _Members) -> list[jax.Array]:
                arrays, where = _distinct(_of_client(recipe, shared, longest, member))
                layout.append(where)
                return arrays

            return jax.vmap(one)(members)

        return _in_chunks(at_once, members, recipe.clients_per_chunk)

    if mesh is None:
        return _together(each(shared, members), layout[0])
    # Clients have nothing to say to each other while they train. Said so, no device waits for
    # another; left to find out, the compiler gathers what decompositions and loops work on.
    rows = PartitionSpec(placement.CLIENTS)
    found = jax.shard_map(
        each,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows),
        out_specs=rows,
        axis_names={placement.CLIENTS},
        check_vma=False,
    )(shared, members)
    return _together(found, layout[0])


def _in_chunks(
    function: Callable[[_Members], list[jax.Array]], members: _Members, size: int | None
) -> list[jax.Array]:
    """The function on so many members at once, one chunk after the other; the last has the rest."""
    count = len(members.identity)
    if size is None or size >= count:
        return function(members)
    whole = count // size * size
    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), members)
    found = [x.reshape(-1, *x.shape[2:]) for x in jax.lax.map(function, chunks)]
    if whole == count:
        return found
    rest = function(jax.tree.map(lambda x: x[whole:], members))
    return [jnp.concatenate(pair) for pair in zip(found, rest, strict=True)]


def _distinct(tree: PyTree) -> tuple[list[jax.Array], tuple[Any, list[int]]]:
    """The arrays of a tree, each once: most of what a client sends is what it has trained."""
    leaves, structure = jax.tree.flatten(tree)
    first = {id(x): x for x in leaves}
    places = {key: index for index, key in enumerate(first)}
    return list(first.values()), (structure, [places[id(x)] for x in leaves])


def _together(arrays: list[jax.Array], where: tuple[Any, list[int]]) -> Any:
    structure, places = where
    return jax.tree.unflatten(structure, [arrays[i] for i in places])


def _of_client(
    recipe: Recipe, shared: _Shared, longest: jax.Array | int, member: _Members
) -> CohortResult:
    """What one client does in a round."""
    task, method, training = recipe.task, recipe.method, recipe.training
    server = shared.server

    def key(name: str) -> jax.Array:
        return randomness.of_client(shared.seed, name, server.round, member.identity)

    def batches_of(stream: str) -> BatchOf:
        order = key(stream)

        def batch_of(step: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
            places, mask = local_batch(member.num_examples, order, step, training.batch_size)
            if member.own is None:
                examples, chosen = shared.examples, shared.positions[member.offset + places]
            else:
                examples, chosen = member.own.examples, jnp.searchsorted(member.own.places, places)
            return {name: values[chosen] for name, values in examples.items()}, mask

        return batch_of

    def gradient(adapters: Adapters, *, offset: Adapters | None, batches: int) -> Adapters:
        at = server.trainable._replace(adapters=adapters)
        own = batches_of(visits.CALIBRATION)
        available = training.steps_of_epoch(member.num_examples)
        frozen = (task, shared.frozen, server.scale)
        return local.gradient(*frozen, at, offset, own, jnp.minimum(batches, available))

    start = method.start(server, member.state, Context(key("start"), gradient, member.rank))
    rank = member.rank if start.rank is None else start.rank
    start = _within(start, rank)
    trained, loss = local.train(
        task,
        training,
        shared.frozen,
        server.scale,
        start,
        batches_of(visits.BATCHES),
        learning_rate=jnp.asarray(shared.learning_rate, jnp.float32),
        steps=training.steps_of(member.num_examples),
        longest=longest,
        penalty=_penalty(method, server, member.state, start),
    )
    upload, state = method.finish(server, member.state, start, trained)
    if training.faults is not None:
        # It keeps what it has trained, and sends something else.
        assert member.faulty is not None
        trained = faults.sent(training.faults, member.faulty, start, trained)
        upload, _ = method.finish(server, member.state, start, trained)
    return CohortResult(start, trained.trainable, upload, state, loss, rank)


def _within(start: Start, rank: jax.Array) -> Start:
    adapters = {path: lowrank.cut(f, rank) for path, f in start.trainable.adapters.items()}
    return start._replace(trainable=start.trainable._replace(adapters=adapters), rank=rank)


def _penalty(
    method: Method, server: Server, client: PyTree, start: Start
) -> Callable[[Trainable], jax.Array] | None:
    return (
        None if method.penalty is None else functools.partial(method.penalty, server, client, start)
    )


def run_round(
    recipe: Recipe,
    federation: Federation,
    data: ClientData,
    cohort: jax.Array,
    seed: jax.Array,
    learning_rate: ArrayLike,
) -> tuple[Federation, RoundMetrics, CohortResult]:
    """One round: train a cohort, aggregate, and go on.

    A client whose results are not all finite is left out: it has weight zero, and its state stays
    as it was. So it is with one that does not answer (`faults`). If none is left, the server's
    state stays too.

    Args:
      recipe: What is learned, and how.
      federation: The state before the round.
      data: The data of all clients.
      cohort: Identities, int32 `[K]`, without repetition but of -1, see `run_cohort`.
      seed: The seed's key.
      learning_rate: Of this round.

    Returns:
      The state after the round, its metrics, and what the clients did.

    Raises:
      ValueError: If a number is given in the place of the key, data of more clients than the
        federation has, or a task whose loss is not by example.
    """
    server, clients, ranks = federation
    states = _rows(clients, cohort)
    server, states, metrics, result = run_cohort(
        recipe, server, states, ranks, data, cohort, seed, learning_rate
    )
    return Federation(server, _put(clients, cohort, states), ranks), metrics, result


def run_cohort(
    recipe: Recipe,
    server: Server,
    states: PyTree,
    ranks: jax.Array,
    data: ClientData,
    cohort: jax.Array,
    seed: jax.Array,
    learning_rate: ArrayLike,
    *,
    mesh: Mesh | None = None,
) -> tuple[Server, PyTree, RoundMetrics, CohortResult]:
    """`run_round` on the states of the cohort's clients alone; time and memory know no N.

    Args:
      recipe: What is learned, and how.
      server: The server's state.
      states: The states of the cohort's clients, stacked along `[K]`.
      ranks: The rank that each client can afford, int32 `[N]`.
      data: The data of all clients.
      cohort: Identities, int32 `[K]`, without repetition but of -1: nobody, a place that is filled
        so that there are as many as devices need, and changes nothing. An identity without data
        counts as nobody, since jit cannot refuse it.
      seed: The seed's key.
      learning_rate: Of this round.
      mesh: Devices that the cohort is spread over, along `placement.CLIENTS`; K is a multiple of
        their number. None for one.

    Returns:
      The server's state after the round, those of the clients `[K]`, the metrics, and what the
      clients did.

    Raises:
      ValueError: As `run_round` does.
    """
    method, training = recipe.method, recipe.training
    cohort = _who_is_there(cohort, data)
    shared = _shared(recipe.task, server, data, seed, learning_rate)
    faulty = _faulty(training, shared, cohort)
    members = _members(states, ranks, data, cohort, faulty)
    result = _train(recipe, shared, members, mesh)
    present, silent = cohort >= 0, None
    if training.faults is not None and faulty is not None:
        silent = faulty & ~jnp.asarray(training.faults.answers)
        present = present & ~silent
    finite = _all_finite((result.trained, result.uploads, result.clients)) & present
    equal = recipe.equal_weights or method.equal_weights
    counts = members.num_examples.astype(jnp.float32)
    shares = 1 / len(data.counts) if equal else counts / data.total
    weights = jnp.where(finite, shares, 0)
    with _batching.dealt_to(mesh, placement.CLIENTS):
        changed, aggregated = method.aggregate(server, result.uploads, weights)
        error = _error(result, weights, aggregated)
        described = _diagnostics(server, result, weights, aggregated) if method.diagnosed else None
    anybody = jnp.any(finite)
    server = _select(anybody, changed, server)._replace(round=server.round + 1)
    # Of nobody means are zero, and nothing is known.
    loss, error, described = jax.tree.map(
        lambda x: jnp.where(anybody, x, jnp.nan), (mean(result.loss, weights), error, described)
    )
    metrics = RoundMetrics(
        loss=loss,
        client_loss=result.loss,
        aggregation_error=error,
        ranks=result.rank,
        excluded=jnp.sum(~finite & present, dtype=jnp.int32),
        diagnostics=described,
        silent=silent,
    )
    return server, _kept(states, result.clients, finite), metrics, result


def make_round(recipe: Recipe) -> RoundFunction:
    """Builds the jitted round, `run_round` without its last result.

    It compiles once for all rounds, seeds and learning rates, for the backend that is the default
    now. It may be a part of other programs: of `jax.lax.scan` over rounds, of another `jax.jit`.

    Raises:
      ValueError: If a number in the recipe's `training` is out of its bounds, or there are neither
        steps nor epochs.
    """
    _check(recipe.training)

    def round_function(
        federation: Federation,
        data: ClientData,
        cohort: jax.Array,
        seed: jax.Array,
        learning_rate: ArrayLike,
    ) -> tuple[Federation, RoundMetrics]:
        return run_round(recipe, federation, data, cohort, seed, learning_rate)[:2]

    return _Jitted(round_function)


class _Jitted:
    """`jax.jit` with the options of a round, which JAX takes for a whole program alone.

    Where the round is a part of another program, that one's are in force.
    """

    def __init__(self, function: Callable[..., Any]):
        self._whole: Any = jax.jit(function, compiler_options=_compiler_options())
        self._part = jax.jit(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What is made within a trace is of it, whether it is of the arguments or not.
        leaves = jax.tree.leaves((args, kwargs, jnp.zeros(())))
        part = any(isinstance(x, jax.core.Tracer) for x in leaves)
        return (self._part if part else self._whole)(*args, **kwargs)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        return self._whole.lower(*args)

    def num_programs(self) -> int:
        return self._whole._cache_size()


class CohortRound:
    """A jitted round on the states of a cohort, from `make_cohort_round`.

    The program returns None for arrays that no round changes, such as a frozen kernel: a result is
    a new array, and most of a backbone would be copied in every round.
    """

    def __init__(self, changes: _Jitted):
        self._changes = changes

    def __call__(
        self,
        server: Server,
        states: PyTree,
        ranks: jax.Array,
        data: ClientData,
        cohort: jax.Array,
        seed: jax.Array,
        learning_rate: ArrayLike,
    ) -> tuple[Server, PyTree, RoundMetrics]:
        """See `run_cohort`."""
        inputs = (states, ranks, data, cohort, seed, learning_rate)
        changed, states, metrics = self._changes(server, *inputs)
        after = jax.tree.map(
            lambda new, old: old if new is None else new, changed, server, is_leaf=_is_none
        )
        return after, states, metrics

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """The program for arguments of these shapes, not yet compiled."""
        return self._changes.lower(*args)

    def num_programs(self) -> int:
        """How many programs have been compiled."""
        return self._changes.num_programs()


def make_cohort_round(recipe: Recipe, *, mesh: Mesh | None = None) -> CohortRound:
    """Builds the jitted `run_cohort`, without its last result, on one device or on a mesh of them.

    The server's state and the metrics come back as `placement.server` puts them, the clients'
    states as `placement.rows`, so that one round is compiled for all.

    Raises:
      ValueError: If a number in the recipe's `training` is out of its bounds, or there are neither
        steps nor epochs.
    """
    _check(recipe.training)

    def round_function(
        server: Server,
        states: PyTree,
        ranks: jax.Array,
        data: ClientData,
        cohort: jax.Array,
        seed: jax.Array,
        learning_rate: ArrayLike,
    ) -> tuple[Server, PyTree, RoundMetrics]:
        after, states, metrics, _ = run_cohort(
            recipe, server, states, ranks, data, cohort, seed, learning_rate, mesh=mesh
        )
        changed = jax.tree.map(lambda new, old: None if new is old else new, after, server)
        if mesh is None:
            return changed, states, metrics
        held = jax.lax.with_sharding_constraint
        shardings = placement.server(mesh, server)
        return (
            jax.tree.map(
                lambda x, where: None if x is None else held(x, where),
                changed,
                shardings,
                is_leaf=_is_none,
            ),
            held(states, placement.rows(mesh)),
            held(metrics, placement.everywhere(mesh)),
        )

    return CohortRound(_Jitted(round_function))


def _check(training: LocalTraining) -> None:
    bounds.check(
        "training",
        batch_size=training.batch_size,
        steps=training.steps,
        epochs=training.epochs,
    )
    if not max(training.steps, training.epochs):
        raise ValueError("training: steps or epochs must be at least 1, or nothing is learned")


def _is_none(x: Any) -> bool:
    return x is None


def _compiler_options() -> dict[str, str] | None:
    """On CPU, operations in an order that needs little memory.

    The compiler's own order starts whatever can run. With it `remat` saves nothing, because what a
    block computes again is computed long before it is needed.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def _error(
    result: CohortResult, weights: jax.Array, aggregated: aggregation.Aggregated | None
) -> jax.Array:
    if aggregated is None:
        return jnp.asarray(jnp.nan)
    changes = jax.vmap(change)(result.start, result.trained)
    return aggregation.error(changes, weights, aggregated)


def _diagnostics(
    server: Server,
    result: CohortResult,
    weights: jax.Array,
    aggregated: aggregation.Aggregated | None,
) -> aggregation.Diagnostics:
    changes = jax.vmap(change)(result.start, result.trained)
    rank = max(factors.rank for factors in server.trainable.adapters.values())
    return aggregation.diagnostics(changes, weights, aggregated, rank=rank)[0]


def _rows(clients: PyTree, cohort: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: x[cohort], clients)


def _put(clients: PyTree, cohort: jax.Array, states: PyTree) -> PyTree:
    """The states of all clients, with those of a cohort replaced."""
    absent = len(cohort)
    num_clients = len(jax.tree.leaves(clients)[0]) if jax.tree.leaves(clients) else 0
    # Gathered by each client's place in the cohort: a scatter is a loop of its own for each array.
    who = jnp.where(cohort < 0, num_clients, cohort)
    place = jnp.full(num_clients, absent).at[who].set(jnp.arange(absent), mode="drop")

    def put(stacked: jax.Array, values: jax.Array) -> jax.Array:
        renewed = (place < absent).reshape(-1, *[1] * (values.ndim - 1))
        return jnp.where(renewed, values.at[place].get(mode="clip"), stacked)

    return jax.tree.map(put, clients, states)


def _kept(states: PyTree, new: PyTree, finite: jax.Array) -> PyTree:
    """The clients' new states where they are finite, else the old ones."""

    def kept(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(finite.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(kept, states, new)


def _all_finite(tree: PyTree) -> jax.Array:
    """Whether all arrays are finite, for each entry of their common leading axis."""
    arrays, _ = _distinct(tree)
    return _linalg.finite_rows(x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact))


def _select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the condition holds; arrays that did not change are passed on untouched."""
    return jax.tree.map(lambda x, y: x if x is y else jnp.where(condition, x, y), new, old)
