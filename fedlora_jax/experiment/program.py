"""The compiled functions of one method, by configuration, with all that it is combined with."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections
import optax
from jax.sharding import Mesh

from fedlora_jax import aggregation, bounds, lora, methods, transforms
from fedlora_jax.data import partition
from fedlora_jax.experiment import chunking
from fedlora_jax.experiment.setting import Setting, dtype_of
from fedlora_jax.federated import faults, placement, ranks
from fedlora_jax.federated.evaluation import Evaluate, make_evaluate
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.metrics import Metric
from fedlora_jax.federated.round import CohortRound, Recipe, make_cohort_round
from fedlora_jax.federated.task import metrics_of
from fedlora_jax.methods import Method
from fedlora_jax.names import lookup

_EQUAL_WEIGHTS = {"examples": False, "equal": True}


class Program(NamedTuple):
    """The compiled functions of one method.

    Attributes:
      recipe: What a round does, by the method with all that it is combined with; how many clients
        train at once is left open.
      make_round: The round on the states of a cohort that trains so many clients at once on each
        device; the same function for the same number. None stands for the whole cohort.
      evaluate: Judges the models on held-out examples.
      metrics: By which they are judged.
      mesh: The devices that a cohort is spread over; None for one.
    """

    recipe: Recipe
    make_round: Callable[[int | None], CohortRound]
    evaluate: Evaluate
    metrics: tuple[Metric, ...]
    mesh: Mesh | None

    @property
    def method(self) -> Method:
        """How clients and server work together."""
        return self.recipe.method


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError on what can be known to be wrong before any work is done."""
    bounds.check_config(config.to_dict())
    if not max(config.local.steps, config.local.epochs):
        raise ValueError("config.local.steps or config.local.epochs must be at least 1")
    lora.compile_patterns(config.lora.targets)
    for pattern in (config.lora.head, config.get("pretrained", {}).get("new")):
        lora.compile_patterns(pattern or ".")
    chunking.parse(config.clients_per_chunk)
    mesh_of(config)
    metrics_of(config.task, config.metrics)
    make_method(config)
    ranks.check(config.lora.ranks)
    epsilon(config, num_clients=config.clients_per_round, rounds=1)
    lookup(_EQUAL_WEIGHTS, config.weights, "weighting of clients")
    partition.check_options(config.data.partition, config.data.partition_options)
    for name in (config.precision.compute, config.precision.storage):
        dtype_of(name)
    if "dtype" in config.model.options:
        raise ValueError("config.model.options.dtype is config.precision.compute")
    optimizer(config.local)
    schedule(config)
    faults_of(config)


def compile_program(config: ml_collections.ConfigDict, setting: Setting) -> Program:
    """Builds the functions of `config.method`; they compile when first called.

    They serve all seeds and learning rates.
    """
    method = make_method(config)
    # A pooled method sees as many examples a step as the cohort of any other.
    batch_size = config.local.batch_size * (config.clients_per_round if method.pooled else 1)
    local = config.local
    training = LocalTraining(
        optimizer(local), batch_size, local.steps, local.epochs, faults_of(config)
    )
    equal = lookup(_EQUAL_WEIGHTS, config.weights, "weighting of clients")
    recipe, mesh = Recipe(setting.task, method, training, equal), mesh_of(config)

    @functools.cache
    def round_of(clients_per_chunk: int | None) -> CohortRound:
        return make_cohort_round(recipe._replace(clients_per_chunk=clients_per_chunk), mesh=mesh)

    chunk = chunking.parse(config.clients_per_chunk)
    return Program(
        recipe,
        round_of,
        make_evaluate(
            recipe.task,
            method,
            len(setting.domains),
            batch_size=config.evaluation_batch_size,
            clients_at_once=chunk if isinstance(chunk, int) else 8,
            mesh=mesh,
        ),
        recipe.task.metrics,
        mesh,
    )


def with_step(program: Program, config: ml_collections.ConfigDict) -> Program:
    """The program for a configuration with another `server.step`, and else the same.

    What is compiled stays: a step size is in the server's state. It does not do for one that
    `steps` where the other does not.
    """
    return program._replace(recipe=program.recipe._replace(method=make_method(config)))


def mesh_of(config: ml_collections.ConfigDict) -> Mesh | None:
    """The devices of `config.mesh`; None for one alone.

    Raises:
      ValueError: If there are not as many.
    """
    wanted = config.get("mesh", {})
    clients, model = wanted.get("clients", 1), wanted.get("model", 1)
    if clients == model == 1 and jax.process_count() == 1:
        return None
    return placement.make_mesh(clients, model)


def make_method(config: ml_collections.ConfigDict) -> Method:
    """The method of the configuration, with all that it is combined with.

    Raises:
      ValueError: On unknown names and impossible values, or a combination that makes no sense.
    """
    try:
        return _combined(config)
    except ValueError as error:
        raise ValueError(f"{config.method}: {error}") from None


def _combined(config: ml_collections.ConfigDict) -> Method:
    method = methods.get(config.method)(**config.options[config.method])
    if (chosen := config.get("robust")) is not None and chosen.rule != "none":
        method = transforms.robust(
            method, rule=chosen.rule, norm=chosen.norm or None, byzantine=chosen.byzantine
        )
        if transforms.ROBUST_RULES[chosen.rule] == "robust_selection":
            aggregation.check_krum(config.clients_per_round, chosen.byzantine)
    if config.lora.ranks != ranks.EQUAL:
        methods.check_combination(method, "unequal_ranks", "unequal ranks")
    if config.privacy.clip:
        method = transforms.private(
            method,
            clip=config.privacy.clip,
            noise_multiplier=config.privacy.noise_multiplier,
            cohort_size=config.clients_per_round,
        )
    server = config.server
    if server.optimizer != "none":
        maker = lookup(
            {"none": None, **transforms.SERVER_OPTIMIZERS}, server.optimizer, "server optimiser"
        )
        assert maker is not None
        optimizer = maker(
            server.learning_rate, server.momentum, server.second_moment, server.adaptivity
        )
        method = transforms.server_optimizer(method, optimizer)
    if steps(config):
        method = transforms.server_step(
            method,
            rate=server.step,
            momentum=server.step_momentum,
            rank=server.step_rank or config.lora.rank,
        )
    if config.local.proximal:
        method = transforms.fedprox(method, mu=config.local.proximal)
    if config.local.scaffold:
        method = transforms.scaffold(method)
    if config.lora.ranks != ranks.EQUAL:
        method = transforms.ordered(method)
    return method._replace(diagnosed=config.get("diagnostics", False))


def faults_of(config: ml_collections.ConfigDict) -> faults.Faults | None:
    """What a share of the clients does instead of training as it should; None for nothing."""
    chosen = config.get("faults")
    return None if chosen is None else faults.make(**chosen)


def steps(config: ml_collections.ConfigDict) -> bool:
    """Whether the server takes a step of its own in the space of products."""
    server = config.server
    # A run of earlier times has none.
    return server.get("step", 1.0) != 1 or server.get("step_momentum", 0.0) != 0


def optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """The clients' optimiser from `config.local`, of learning rate 1.

    Gradients are clipped to a norm of `clip_norm`, unless that is 0.
    """
    decay = config.weight_decay
    makers = {
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay), optax.sgd(1.0, momentum=config.momentum or None)
        ),
        "adamw": lambda: optax.adamw(1.0, weight_decay=decay),
    }
    chosen = lookup(makers, config.optimizer, "optimizer")()
    if not config.clip_norm:
        return chosen
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), chosen)


def schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """The learning rate as a function of the round."""
    rate = config.local.learning_rate
    makers = {
        "constant": lambda: optax.constant_schedule(rate),
        "cosine": lambda: optax.cosine_decay_schedule(rate, config.rounds),
    }
    return lookup(makers, config.local.schedule, "schedule")()


def epsilon(config: ml_collections.ConfigDict, num_clients: int, rounds: int) -> float | None:
    """Epsilon after so many rounds; None if there is none, for lack of clipping or of noise."""
    if not config.privacy.clip or not config.privacy.noise_multiplier:
        return None
    return transforms.epsilon(
        noise_multiplier=config.privacy.noise_multiplier,
        num_clients=num_clients,
        cohort_size=config.clients_per_round,
        rounds=rounds,
        delta=config.privacy.delta,
    )
