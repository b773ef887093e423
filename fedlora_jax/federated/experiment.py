"""From a configuration to a finished run.

`prepare` reads data and backbone, once for all runs; `compile_program` builds the jitted functions
of one method, once for all seeds; `run` trains one method under one seed, or goes on with it.
"""

import functools
import hashlib
import inspect
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from fedlora_jax import lora, methods, models, transforms
from fedlora_jax.data import images, partition, python_docs, sources
from fedlora_jax.data.clients import ClientData, client_data
from fedlora_jax.federated import cohort, communication, memory, randomness, ranks, records
from fedlora_jax.federated.evaluation import Accuracy, HeldOut, held_out, make_evaluate
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.round import (
    Federation,
    RoundFunction,
    RoundMetrics,
    create,
    make_round,
)
from fedlora_jax.federated.task import Batch, Task, classification
from fedlora_jax.lora import Params
from fedlora_jax.methods import Method, Server, Trainable
from fedlora_jax.models import pretrain, pretrained
from fedlora_jax.names import lookup

Progress = Callable[[], Any]


_EQUAL_WEIGHTS = {"examples": False, "equal": True}


class Setting(NamedTuple):
    """What all runs of a comparison share.

    Attributes:
      task: The model, what it reads, and the loss.
      params: Pretrained parameters.
      train: Training examples of all clients, dict of arrays `[M, ...]`.
      test: Held-out examples.
      domains: The names of the domains; one called `all` for a data set without domains.
    """

    task: Task
    params: Params
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    domains: tuple[str, ...]


class Program(NamedTuple):
    """The compiled functions of one method."""

    method: Method
    training: LocalTraining
    round: RoundFunction
    evaluate: Callable[[Federation, HeldOut], Accuracy]


def prepare(config: ml_collections.ConfigDict) -> Setting:
    """Reads the data and the pretrained backbone, which is made and kept on first use."""
    train, test = (_load(config, config.data.splits[part]) for part in ("train", "test"))
    has_domains = "domain" in train
    domains = tuple(sources.class_names(config.data.name, "domain")) if has_domains else ("all",)
    model = models.get(config.model.name, **config.model.options)
    inputs = _tokens if "tokens" in train else _images
    params = _backbone(config, model, inputs({key: jnp.asarray(x[:1]) for key, x in train.items()}))
    return Setting(
        classification(model, inputs), params, _examples(train), _examples(test), domains
    )


def _load(config: ml_collections.ConfigDict, split: str) -> dict[str, np.ndarray]:
    if config.data.name == "python_docs":
        return python_docs.load(split, pretrained.locate(config.data.tokenizer), config.data.length)
    return sources.load(config.data.name, split)


def _backbone(
    config: ml_collections.ConfigDict, model: nn.Module, inputs: tuple[jax.Array, ...]
) -> Params:
    """Parameters read from `config.pretrained`, or made as `config.pretraining` says."""
    if "pretrained" in config:
        wanted = config.pretrained
        return pretrained.load(model, wanted.source, *inputs, new=wanted.new, key=jax.random.key(0))
    return pretrain.cached(
        _backbone_path(config),
        model,
        sources.load(config.data.name, config.pretraining.split),
        **config.pretraining.options,
    )


def _backbone_path(config: ml_collections.ConfigDict) -> Path:
    """A directory whose name changes with all that the backbone is made from."""
    recipe = [config.data.name, config.model.to_dict(), config.pretraining.to_dict()]
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=list).encode())
    return Path(config.backbone_dir) / f"{config.model.name}-{digest.hexdigest()[:12]}"


def _examples(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What training needs of a split; a data set without domains has one."""
    one_domain = np.zeros(len(arrays["label"]), np.int32)
    kind = "tokens" if "tokens" in arrays else "image"
    return {name: arrays.get(name, one_domain) for name in (kind, "label", "domain")}


def _tokens(batch: Batch) -> tuple[jax.Array]:
    return (batch["tokens"],)


def _images(batch: Batch) -> tuple[jax.Array]:
    return (images.normalize(batch["image"]),)


def compile_program(config: ml_collections.ConfigDict, setting: Setting) -> Program:
    """Builds the functions of `config.method`; they compile when first called.

    They serve all seeds and learning rates.
    """
    method = make_method(config, len(partitioned(config, setting, config.seed)))
    # A pooled method sees as many examples a step as the cohort of any other.
    batch_size = config.local.batch_size * (config.clients_per_round if method.pooled else 1)
    training = LocalTraining(
        optimizer(config.local), batch_size, config.local.steps, config.local.epochs
    )
    equal = lookup(_EQUAL_WEIGHTS, config.weights, "weighting of clients")
    return Program(
        method,
        training,
        make_round(
            setting.task,
            method,
            training,
            equal_weights=equal,
            clients_per_chunk=config.clients_per_chunk or None,
        ),
        make_evaluate(setting.task, method, len(setting.domains)),
    )


def make_method(config: ml_collections.ConfigDict, num_clients: int) -> Method:
    """The method of the configuration, with all that it is combined with.

    Raises:
      ValueError: On unknown names and impossible values, or a combination that makes no sense.
    """
    try:
        return _combined(config, num_clients)
    except ValueError as error:
        raise ValueError(f"{config.method}: {error}") from None


def _combined(config: ml_collections.ConfigDict, num_clients: int) -> Method:
    method = methods.get(config.method)(**config.options[config.method])
    reason = method.refuses.get("unequal_ranks")
    if reason and config.lora.ranks != ranks.EQUAL:
        raise ValueError(f"the method cannot have clients of unequal ranks: {reason}")
    if config.privacy.clip:
        method = transforms.private(
            method, clip=config.privacy.clip, noise_multiplier=config.privacy.noise_multiplier
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
    if config.local.proximal:
        method = transforms.fedprox(method, mu=config.local.proximal)
    if config.local.scaffold:
        method = transforms.scaffold(method, num_clients=num_clients)
    return method


def optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """The clients' optimiser from `config.local`, of learning rate 1, gradients clipped."""
    decay = config.weight_decay
    makers = {
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay), optax.sgd(1.0, momentum=config.momentum or None)
        ),
        "adamw": lambda: optax.adamw(1.0, weight_decay=decay),
    }
    chosen = lookup(makers, config.optimizer, "optimizer")()
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), chosen)


def schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """The learning rate as a function of the round."""
    rate = config.local.learning_rate
    makers = {
        "constant": lambda: optax.constant_schedule(rate),
        "cosine": lambda: optax.cosine_decay_schedule(rate, config.rounds),
    }
    return lookup(makers, config.local.schedule, "schedule")()


def partitioned(config: ml_collections.ConfigDict, setting: Setting, seed: int) -> list[np.ndarray]:
    """The positions of each client's training examples, as `config.data` says."""
    split = partition.get(config.data.partition)
    known = {
        "labels": setting.train["label"],
        "domains": setting.train["domain"],
        "num_examples": len(setting.train["label"]),
    }
    wanted = {name: known[name] for name in inspect.signature(split).parameters if name in known}
    return split(**wanted, seed=seed, **config.data.partition_options)


def partition_counts(config: ml_collections.ConfigDict, setting: Setting) -> np.ndarray:
    """How many examples each client has of each domain and label, `[N, D, L]`."""
    parts = partitioned(config, setting, config.seed)
    labels, domains = setting.train["label"], setting.train["domain"]
    counts = np.zeros((len(parts), len(setting.domains), int(labels.max()) + 1), int)
    for client, part in enumerate(parts):
        np.add.at(counts[client], (domains[part], labels[part]), 1)
    return counts


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError on what can be known to be wrong before any work is done."""
    for name, value in {
        "rounds": config.rounds,
        "clients_per_round": config.clients_per_round,
        "lora.rank": config.lora.rank,
        "local.steps or config.local.epochs": max(config.local.steps, config.local.epochs),
        "local.batch_size": config.local.batch_size,
    }.items():
        if value < 1:
            raise ValueError(f"config.{name} must be at least 1, got {value}")
    for name, value in {
        "clients_per_chunk": config.clients_per_chunk,
        "local.epochs": config.local.epochs,
        "privacy.clip": config.privacy.clip,
    }.items():
        if value < 0:
            raise ValueError(f"config.{name} must not be negative, got {value}")
    make_method(config, num_clients=1)
    ranks.check(config.lora.ranks)
    _epsilon(config, num_clients=config.clients_per_round, rounds=1)
    lookup(_EQUAL_WEIGHTS, config.weights, "weighting of clients")
    partition.get(config.data.partition)
    optimizer(config.local)
    schedule(config)


class State(NamedTuple):
    """A federation before its first round, with its data on the device."""

    federation: Federation
    data: ClientData
    test: HeldOut
    cohort_size: int


def first_state(config: ml_collections.ConfigDict, setting: Setting, method: Method) -> State:
    """Splits the data over clients and makes the first adapters, both from `config.seed`.

    Raises:
      ValueError: If a round wants more clients than there are, there are not as many ranks as
        clients, or as `lora.init`.
    """
    seed = jax.random.key(config.seed)
    parts = partitioned(config, setting, config.seed)
    if not method.pooled and config.clients_per_round > len(parts):
        raise ValueError(
            f"config.clients_per_round is {config.clients_per_round}, but the partition "
            f"{config.data.partition!r} makes only {len(parts)} clients"
        )
    if method.pooled:
        parts = [np.concatenate(parts)]
    domains = setting.train["domain"]
    backbone, head = lora.split_head(setting.params, config.lora.head)
    adapters = lora.init(
        randomness.stream(seed, "adapters"),
        backbone,
        targets=config.lora.targets,
        rank=config.lora.rank,
    )
    server = Server(
        backbone,
        Trainable(adapters, head),
        scale=jnp.float32(config.lora.scale),
        memory=(),
        round=jnp.int32(0),
    )
    affordable = None
    if not method.pooled:
        affordable = ranks.assign(config.lora.ranks, config.lora.rank, len(parts), config.seed)
    federation = create(randomness.stream(seed, "method"), method, server, len(parts), affordable)
    # Arrays read from a file are tied to a device, new ones are not, and a round's results are if
    # any input was: all tied from the start, a round compiles once, also after a restart.
    federation = jax.tree.map(lambda x: jax.device_put(x, x.sharding), federation)
    return State(
        federation,
        client_data(setting.train, parts),
        held_out(
            setting.test,
            setting.test["domain"],
            setting.test["label"],
            [(domains[part], setting.train["label"][part]) for part in parts],
        ),
        1 if method.pooled else config.clients_per_round,
    )


def estimate_memory(
    config: ml_collections.ConfigDict, setting: Setting, program: Program
) -> memory.Memory | None:
    """What a round of `run` will need; it compiles the round."""
    start = first_state(config, setting, program.method)
    members = np.zeros(start.cohort_size, np.int32)
    return memory.estimate(
        program.round,
        start.federation,
        start.data,
        members,
        jax.random.key(config.seed),
        jnp.float32(0),
    )


def run(
    config: ml_collections.ConfigDict,
    setting: Setting,
    program: Program,
    workdir: Path,
    advance: Progress = lambda: None,
) -> list[dict[str, Any]]:
    """Trains one method under one seed, from the last finished round found in `workdir`.

    Writes into `workdir`:

    * `config.json`: the configuration, with the options of this method alone.
    * `metrics.jsonl`: one line a round, see `docs/outputs.md`, and the same as TensorBoard events.
    * `checkpoints/`: the last two states, by Orbax.
    * `adapters.npz`: the final adapters.

    Args:
      config: As in `configs/`.
      setting: From `prepare`.
      program: From `compile_program`, for the method of the configuration.
      workdir: A directory of this run's own.
      advance: Called after each finished round, and once for each round found finished.

    Returns:
      The metrics of all rounds.

    Raises:
      ValueError: If `workdir` holds a run of another configuration.
      FloatingPointError: If no client of a round sent finite values; the last good state is kept.
    """
    check(config)
    start = first_state(config, setting, program.method)
    workdir.mkdir(parents=True, exist_ok=True)
    _claim(config, workdir)
    checkpoints = records.Checkpoints(workdir)
    federation, first = checkpoints.restore(start.federation)
    for _ in range(first):
        advance()
    seed = jax.random.key(config.seed)
    measure = _Measure(config, setting, program, start)
    rate_of = schedule(config)
    writer = records.MetricsWriter(workdir, first)
    try:
        for index in range(first, config.rounds):
            began = time.perf_counter()
            members = measure.cohorts[index]
            federation, measured = program.round(
                federation, start.data, members, seed, jnp.float32(rate_of(index))
            )
            jax.block_until_ready(federation)
            seconds = time.perf_counter() - began
            _stop_or_warn(int(measured.excluded), start.cohort_size, index, workdir)
            writer.write({**measure(index, federation, measured), "seconds": seconds})
            checkpoints.save(index + 1, federation)
            advance()
    finally:
        writer.close()
        checkpoints.close()
    records.save_adapters(workdir / "adapters.npz", federation.server.trainable.adapters)
    return records.read_metrics(workdir)


class _Measure:
    """The metrics of a run's rounds, see `docs/outputs.md`."""

    def __init__(
        self, config: ml_collections.ConfigDict, setting: Setting, program: Program, start: State
    ):
        self._config, self._setting, self._program, self._start = config, setting, program, start
        self._messages = communication.messages(program.method, start.federation, start.cohort_size)
        self._clients = len(start.data.counts)
        self.cohorts = cohort.all_rounds(
            jax.random.key(config.seed),
            config.rounds,
            num_clients=self._clients,
            cohort_size=start.cohort_size,
        )

    def __call__(
        self, index: int, federation: Federation, measured: RoundMetrics
    ) -> dict[str, Any]:
        """All that is known after round `index`."""
        config, domains = self._config, self._setting.domains
        accuracy = self._program.evaluate(federation, self._start.test)
        by_domain = np.asarray(accuracy.domains, np.float64)
        by_client = np.asarray(accuracy.clients, np.float64)
        return {
            "round": index,
            "method": config.method,
            "seed": config.seed,
            "accuracy": float(np.mean(by_domain)),
            "domain_accuracy": dict(zip(domains, by_domain.tolist(), strict=True)),
            "personal_accuracy": float(np.mean(by_client)),
            "loss": float(measured.loss),
            "aggregation_error": _number(measured.aggregation_error),
            "excluded_clients": int(measured.excluded),
            **self._megabytes(index, federation, np.asarray(measured.ranks).tolist()),
            "epsilon": _epsilon(config, self._clients, index + 1),
            "cohort": self.cohorts[index].tolist(),
            "rank": np.asarray(measured.ranks).tolist(),
            "client_loss": np.asarray(measured.client_loss).tolist(),
            "client_accuracy": by_client.tolist(),
        }

    def _megabytes(self, index: int, federation: Federation, ranks: list[int]) -> dict[str, float]:
        absent = communication.absences(self.cohorts[: index + 1].tolist())
        count = functools.cache(
            lambda rank, absent: communication.count(
                self._program.method, federation, self._messages, index, rank=rank, absent=absent
            )
        )
        each = [count(rank, away) for rank, away in zip(ranks, absent, strict=True)]
        return {
            f"megabytes_{name}": sum(getattr(x, name) for x in each) / 1e6
            for name in communication.MessageBytes._fields
        }


def _epsilon(config: ml_collections.ConfigDict, num_clients: int, rounds: int) -> float | None:
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


def _number(x: jax.Array) -> float | None:
    """A float, or None for NaN, which JSON does not have."""
    value = float(x)
    return None if np.isnan(value) else value


def _stop_or_warn(excluded: int, cohort_size: int, index: int, workdir: Path) -> None:
    if excluded == cohort_size:
        raise FloatingPointError(
            f"round {index}: every client of the cohort diverged (its values are not finite). The "
            f"state after round {index - 1} is kept in {workdir}; try a smaller "
            "config.local.learning_rate or config.local.clip_norm"
        )
    if excluded:
        warnings.warn(
            f"round {index}: {excluded} of {cohort_size} clients left out, their values are not "
            "finite",
            stacklevel=3,
        )


def _claim(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes the configuration, or finds that the directory's run is the same one."""
    mine = {**config.to_dict(), "options": config.options[config.method].to_dict()}
    text = json.dumps(mine, indent=2, sort_keys=True, default=list) + "\n"
    path = workdir / records.CONFIG
    if not path.exists():
        records.write_atomically(path, text)
        return
    theirs = json.loads(path.read_text())
    changed = _differences(json.loads(text), theirs)
    if changed:
        raise ValueError(
            f"{workdir} holds a run of another configuration ({'; '.join(changed)}). Choose "
            "another work directory, or remove this one"
        )


def _differences(mine: Any, theirs: Any, path: str = "config") -> list[str]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = sorted(mine.keys() | theirs.keys())
        return [
            line
            for key in keys
            for line in _differences(mine.get(key), theirs.get(key), f"{path}.{key}")
        ]
    return [] if mine == theirs else [f"{path} is {theirs} there, {mine} here"]
