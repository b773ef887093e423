"""A federation small enough to be checked by hand: seven unequal clients, an MLP, three classes."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from fedlora_jax import lora, methods
from fedlora_jax.data.clients import ClientData, client_data, local_batch
from fedlora_jax.federated import randomness
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.round import Federation, Recipe, create, run_round
from fedlora_jax.federated.task import Task, classification
from fedlora_jax.methods import Server, Trainable

COHORT = jnp.array([0, 2, 3, 6])
NOBODY = -1
COUNTS = (3, 9, 4, 17, 8, 5, 12)
SCALE = 1.5


class Net(nn.Module):
    """Two layers and a head."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(10, dtype=self.dtype, name="first")(x))
        x = nn.tanh(nn.Dense(7, dtype=self.dtype, name="second")(x))
        return nn.Dense(3, name="head")(x.astype(jnp.float32))


class World(NamedTuple):
    """All that a test of the round needs."""

    task: Task
    data: ClientData
    server: Server
    training: LocalTraining
    seed: jax.Array

    def run(self, name: str, cohorts, ranks=None, **options):
        """A round for each cohort; the state before the last one, after it, and what came of it.

        That is of NumPy, which is sliced and added without a program for each shape.
        """
        method = method_of(name)
        federation = before = self.federation(method, ranks)
        metrics = result = None
        for cohort in cohorts:
            before = federation
            federation, metrics, result = _compiled(name, self.task, self.training, *options)(
                federation, self.data, cohort, self.seed, learning_rate(federation)
            )
        return before, federation, *jax.device_get((metrics, result))

    def go_on(self, name: str, federation: Federation) -> Federation:
        """The state after one more round."""
        return self.step(name, federation, learning_rate(federation))[0]

    def step(self, name: str, federation: Federation, rate) -> tuple[Federation, jax.Array]:
        """The state after a round with this learning rate, and its loss."""
        function = _compiled(name, self.task, self.training)
        federation, metrics, _ = function(federation, self.data, COHORT, self.seed, rate)
        return federation, metrics.loss

    def federation(self, method: methods.Method, ranks=None) -> Federation:
        """The state before the first round, made once for a method."""
        dtype = self.task.model.dtype
        parts = [method, *jax.tree.leaves(self.server)]
        key = (*map(id, parts), ranks and tuple(ranks), dtype)
        if key not in _FIRST:
            made = create(jax.random.key(5), method, self.server, len(COUNTS), ranks, dtype)
            _FIRST[key] = made, parts
        return _FIRST[key][0]


def make_world() -> World:
    generator = np.random.default_rng(0)
    total = sum(COUNTS)
    examples = {
        "x": generator.normal(size=(total, 6)).astype(np.float32),
        "label": generator.integers(0, 3, total).astype(np.int32),
    }
    parts = np.split(generator.permutation(total), np.cumsum(COUNTS)[:-1])
    params = Net().init(jax.random.key(0), examples["x"])["params"]
    backbone, head = lora.split_head(params, "head")
    adapters = lora.init(jax.random.key(1), backbone, targets=["first", "second"], rank=2)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.add_decayed_weights(1e-3), optax.sgd(1.0, 0.9)
    )
    return World(
        classification(Net(), lambda batch: (batch["x"],)),
        client_data(examples, parts),
        Server(backbone, Trainable(adapters, head), jnp.float32(SCALE), (), jnp.int32(0)),
        LocalTraining(optimizer, batch_size=6, steps=3),
        jax.random.key(3),
    )


def train_by_hand(
    world: World,
    client: int,
    trainable: Trainable,
    round_index: int = 0,
    *,
    trains: Trainable | None = None,
    backbone=None,
    training: LocalTraining | None = None,
    correct=lambda gradient, trainable: gradient,
) -> Trainable:
    """One client's round as a Python loop over merged kernels.

    `trains` are booleans, True where training moves; `correct` changes a gradient before the
    optimiser sees it.
    """
    server, training = world.server, training or world.training
    trainable = jax.device_get(trainable)
    backbone = server.backbone if backbone is None else backbone
    key = randomness.of_client(world.seed, "batches", round_index, client)

    def masked(tree):
        if trains is None:
            return tree
        return jax.tree.map(lambda x, keep: np.where(keep, x, 0), tree, trains)

    # Compiled once for all clients, whose last batches differ in size.
    gradients = functools.partial(_gradients, world.task.model, backbone, server.scale)
    state = jax.jit(training.optimizer.init)(trainable)
    count, own = world.data.counts[client], positions(world.data, client)
    for step in range(int(training.steps_of(count))):
        places, mask = map(np.asarray, _local_batch(count, key, step, training.batch_size))
        batch = {name: np.asarray(x)[own[places]] for name, x in world.data.examples.items()}
        every = gradients(trainable, batch)
        slope = jax.tree.map(lambda g, mask=mask: np.asarray(g)[mask].mean(0), every)
        slope = masked(correct(slope, trainable))
        updates, state = _update(training.optimizer.update, slope, state, trainable)
        rate = np.float32(0.2 / (1 + round_index))
        updates = masked(jax.device_get(updates))
        trainable = jax.tree.map(lambda x, u, rate=rate: x + rate * u, trainable, updates)
    return trainable


_local_batch = jax.jit(local_batch, static_argnums=3)


@functools.partial(jax.jit, static_argnums=0)
def _update(update, *arguments):
    """An optimiser's, one program for all that train by hand."""
    return update(*arguments)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(model, backbone, scale, trainable, batch):
    """The gradient of each example of a batch."""

    def loss(trainable, example):
        merged = lora.merge(backbone, trainable.adapters, scale=scale)
        variables = {"params": lora.join_head(merged, trainable.head)}
        logits = model.apply(variables, example["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])

    return jax.vmap(jax.grad(loss), in_axes=(None, 0))(trainable, batch)


def alone(*clients: int) -> jax.Array:
    """A cohort of some clients with places for four, so that one program serves all."""
    return jnp.array([*clients, *[NOBODY] * (len(COHORT) - len(clients))])


def any_client(federation: Federation):
    """The state of a client."""
    return jax.tree.map(lambda x: x[0], jax.device_get(federation.clients))


def positions(data: ClientData, client: int) -> np.ndarray:
    """Where in the examples a client's are."""
    return np.asarray(data.positions)[int(data.offsets[client]) :][: int(data.counts[client])]


def learning_rate(federation: Federation) -> jax.Array:
    """Of the round that comes."""
    return jnp.float32(0.2) / (1 + federation.server.round)


# With what it was made of, whose place in memory nothing else then takes.
_FIRST: dict[tuple, tuple[Federation, list]] = {}


# One object a method and one program a method, for all tests of a process.
@functools.cache
def method_of(name: str) -> methods.Method:
    """The method with its default hyperparameters."""
    return methods.get(name)()


@functools.cache
def _compiled(name, task, training, *options):
    recipe = Recipe(task, method_of(name), training, **dict.fromkeys(options, True))
    return jax.jit(functools.partial(run_round, recipe))
