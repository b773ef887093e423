"""A whole run of a method on linear problems as one program, many runs at once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.linear_study import problem
from experiments.shared.compiling import least_effort
from fedlora_jax import lora, methods, transforms
from fedlora_jax.data.clients import ClientData, client_data
from fedlora_jax.experiment import program as configured
from fedlora_jax.federated import communication, randomness
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.metrics import Batch, Weighted, equally
from fedlora_jax.federated.round import Federation, Recipe, create, run_round
from fedlora_jax.federated.task import Task
from fedlora_jax.methods import Method, Server, Trainable

_LAYER = "dense"


class Dials(NamedTuple):
    """A setting.

    Attributes:
      heterogeneity: h of `problem.draw`.
      clients: K, all present in every round.
      rank: r of the adapters.
      local_steps: Steps of each client in a round.
      momentum: Of the server's step in the space of products.
    """

    heterogeneity: float
    clients: int
    rank: int
    local_steps: int
    momentum: float


class Run(NamedTuple):
    """A point of the grid under a seed; the step is None for a method without a server's step."""

    rate: float
    step: float | None
    seed: int


class Outcome(NamedTuple):
    """What a run ends with.

    Attributes:
      error: Relative excess loss after the last round, `(L(W) - L(W*)) / (L(W_0) - L(W*))`; not
        finite if training diverged: all clients of a round sent what is not finite.
      aggregation_error: Mean over rounds of the relative distance of the server's update from the
        mean of the clients'.
    """

    error: float
    aggregation_error: float


class _Drawn(NamedTuple):
    """What differs between the seeds of a setting, as arrays."""

    key: jax.Array
    data: ClientData
    pretrained: jax.Array
    optimum: jax.Array
    curvature: jax.Array


# From a method, a setting and runs to their outcomes.
Runner: TypeAlias = Callable[[str, Dials, Sequence[Run]], list[Outcome]]


class _Model(nn.Module):
    """One linear layer without bias."""

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.outputs, use_bias=False, name=_LAYER)(x)


def make_task(outputs: int) -> Task:
    """Half the squared distance of the outputs from `batch['y']`, for inputs `batch['x']`."""

    def loss(found: jax.Array, batch: Batch) -> Weighted:
        return equally(jnp.sum((found - batch["y"]) ** 2, axis=-1) / 2)

    return Task(_Model(outputs), lambda batch: (batch["x"],), loss)


def make_method(config: ConfigDict, name: str) -> Method:
    """A method by name, or one of `config.variants`, with its options."""
    kind = config.variants[name].method if name in config.variants else name
    options = dict(config.options[kind])
    if name in config.variants:
        options.update(config.variants[name].options)
    return methods.get(kind)(**options)


def has_step(method: Method) -> bool:
    """Whether the server can take a step in the space of products."""
    return "server_step" not in method.refuses


def compiled_for(dials: Dials) -> Dials:
    """The same for all settings that share a program, which takes the rest as arguments."""
    return dials._replace(heterogeneity=0.0, local_steps=0)


def make_runner(config: ConfigDict) -> Runner:
    """What runs methods, `config.runs_at_once` runs at a time.

    One program is compiled for all points of the grid and all seeds, and for all settings that
    are `compiled_for` the same; the last one is kept.
    """
    compiled = functools.lru_cache(1)(functools.partial(_compile, config))
    drawn = functools.lru_cache(64)(functools.partial(_draw, config.problem))

    def run(name: str, dials: Dials, runs: Sequence[Run]) -> list[Outcome]:
        pooled, width = make_method(config, name).pooled, config.runs_at_once
        if len(runs) > width:
            halves = runs[:width], runs[width:]
            return [outcome for half in halves for outcome in run(name, dials, half)]
        program = compiled(name, compiled_for(dials))
        filled = [*runs, *runs[-1:] * (width - len(runs))]
        problems = [drawn(dials.clients, dials.heterogeneity, pooled, each.seed) for each in filled]
        found = program(
            jax.tree.map(lambda *x: jnp.stack(x), *problems),
            jnp.array([each.rate for each in filled], jnp.float32),
            jnp.array([each.step or 1.0 for each in filled], jnp.float32),
            jnp.int32(dials.local_steps),
        )
        found = jax.device_get(found)
        return [Outcome(*(float(x[index]) for x in found)) for index in range(len(runs))]

    return run


def _draw(
    config: ConfigDict, clients: int, heterogeneity: float, pooled: bool, seed: int
) -> _Drawn:
    """The arrays of a problem; pooled, all examples are those of one client."""
    made = problem.draw(seed, clients=clients, heterogeneity=heterogeneity, **config)
    examples = {name: np.concatenate(x) for name, x in (("x", made.x), ("y", made.y))}
    parts = np.split(np.arange(len(examples["x"])), 1 if pooled else clients)
    known = (made.pretrained, made.optimum, made.curvature)
    arrays = (jnp.asarray(x, jnp.float32) for x in known)
    return _Drawn(jax.random.key(seed), client_data(examples, parts), *arrays)


def _compile(
    config: ConfigDict, name: str, dials: Dials
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    base, task = make_method(config, name), make_task(config.problem.outputs)
    present = 1 if base.pooled else dials.clients
    # A pooled method sees as many examples a step as the clients of any other together.
    batch_size = config.local.batch_size * (dials.clients if base.pooled else 1)
    optimizer = configured.optimizer(config.local)
    rates_over_rounds = jax.vmap(configured.schedule(config))(jnp.arange(config.rounds))

    def run(
        drawn: _Drawn, rate: jax.Array, step: jax.Array, local_steps: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        method = _stepped(config, name, dials, step)
        training = LocalTraining(optimizer, batch_size, local_steps)  # type: ignore[arg-type]
        server = first_server(drawn.key, drawn.pretrained, dials.rank, config.lora.scale)

        def one_round(
            federation: Federation, factor: jax.Array
        ) -> tuple[Federation, tuple[jax.Array, jax.Array]]:
            cohort = jnp.arange(present)
            states = (federation, drawn.data, cohort, drawn.key, rate * factor)
            federation, metrics, _ = run_round(Recipe(task, method, training), *states)
            return federation, (metrics.aggregation_error, metrics.excluded == present)

        first = create(randomness.stream(drawn.key, "method"), method, server, present)
        last, (errors, diverged) = jax.lax.scan(one_round, first, rates_over_rounds)
        left = problem.excess(kernel_of(last.server), drawn.optimum, drawn.curvature)
        before = problem.excess(drawn.pretrained, drawn.optimum, drawn.curvature)
        return jnp.where(jnp.any(diverged), jnp.nan, left / before), jnp.mean(errors)

    # Most programs run for less than they would take to be compiled well.
    options = least_effort() if jax.default_backend() == "cpu" else None
    return jax.jit(jax.vmap(run, in_axes=(0, 0, 0, None)), compiler_options=options)


def check(config: ConfigDict, name: str, settings: Sequence[Dials]) -> None:
    """Raises ValueError, before anything is run, if a method cannot run in one of the settings.

    What can be too much is the rank, what can be too few is clients.
    """
    configured.optimizer(config.local)
    configured.schedule(config)
    rank, clients = max(x.rank for x in settings), min(x.clients for x in settings)
    for dials in (settings[0]._replace(clients=clients), settings[0]._replace(rank=rank)):
        jax.eval_shape(functools.partial(_federation, config, name, dials))


def message_bytes(config: ConfigDict, name: str, dials: Dials) -> tuple[float, float]:
    """Bytes that one client sends and receives in a round, mean over an even and an odd one."""
    method, federation = _stepped(config, name, dials), _federation(config, name, dials)
    client = jax.tree.map(lambda x: x[0], federation.clients)
    present = len(federation.ranks)
    made = communication.messages(method, federation.server, client, present)
    counts = [communication.count(method, federation.server, made, index) for index in (0, 1)]
    return sum(x.up for x in counts) / 2, sum(x.down for x in counts) / 2


def _stepped(config: ConfigDict, name: str, dials: Dials, rate: Any = 1.0) -> Method:
    """The method, with the server's step if it has one."""
    base = make_method(config, name)
    if not has_step(base):
        return base
    # V at the rank of the adapters as given, which a method may have made wider: as in a run.
    return transforms.server_step(base, rate=rate, momentum=dials.momentum, rank=dials.rank)


def _federation(config: ConfigDict, name: str, dials: Dials) -> Federation:
    """The state before the first round of any run, but for the numbers in it."""
    drawn = _draw(config.problem, dials.clients, dials.heterogeneity, False, 0)
    server = first_server(drawn.key, drawn.pretrained, dials.rank, config.lora.scale)
    method = _stepped(config, name, dials)
    return create(
        randomness.stream(drawn.key, "method"),
        method,
        server,
        1 if method.pooled else dials.clients,
    )


def first_server(key: jax.Array, pretrained: jax.Array, rank: int, scale: float) -> Server:
    """A frozen kernel and fresh adapters."""
    backbone = {_LAYER: {"kernel": pretrained}}
    key = randomness.stream(key, "adapters")
    adapters = lora.init(key, backbone, targets=_LAYER, rank=rank)
    return Server(backbone, Trainable(adapters, {}), jnp.float32(scale), (), jnp.int32(0))


def kernel_of(server: Server) -> jax.Array:
    """The whole kernel of the server's model."""
    merged = lora.merge(server.backbone, server.trainable.adapters, scale=server.scale)
    return lora.kernels(merged)[_LAYER]
