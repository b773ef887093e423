"""The metrics of a run, round by round; `docs/outputs.md` explains them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import ml_collections
import numpy as np

from fedlora_jax.experiment.program import Program, epsilon
from fedlora_jax.experiment.state import State
from fedlora_jax.federated import communication
from fedlora_jax.federated.communication import MessageBytes
from fedlora_jax.federated.evaluation import Evaluation, mean_of_known
from fedlora_jax.federated.metrics import Metric
from fedlora_jax.federated.round import Federation, RoundMetrics
from fedlora_jax.methods import Server

Measure: TypeAlias = Callable[[int, Federation, RoundMetrics], dict[str, Any]]


def make_measure(
    config: ml_collections.ConfigDict,
    program: Program,
    domains: Sequence[str],
    start: State,
    cohorts: np.ndarray,
) -> Measure:
    """Builds `(round, federation after it, what it measured) -> metrics`, all plain numbers.

    Args:
      config: As in `configs/`.
      program: Of the method of the configuration.
      domains: Their names.
      start: Before the first round.
      cohorts: Of all rounds, `[rounds, K]`.
    """
    made = communication.messages(program.method, start.server, start.client, cohorts.shape[1])
    num_clients = len(start.ranks)

    def megabytes(index: int, server: Server, ranks: list[int]) -> dict[str, float]:
        absent = communication.absences(cohorts[: index + 1].tolist())
        count = functools.cache(
            lambda rank, away: communication.count(
                program.method, server, made, index, rank=rank, absent=away
            )
        )
        each = [count(rank, away) for rank, away in zip(ranks, absent, strict=True)]
        total = MessageBytes(*(sum(x) / 1e6 for x in zip(*each, strict=True)))
        return {f"megabytes_{name}": value for name, value in total._asdict().items()}

    def measure(index: int, federation: Federation, measured: RoundMetrics) -> dict[str, Any]:
        ranks = np.asarray(measured.ranks)[: start.cohort_size].tolist()
        return {
            "round": index,
            "method": config.method,
            "seed": config.seed,
            **in_words(program.metrics, program.evaluate(federation, start.test), domains),
            "loss": float(measured.loss),
            "aggregation_error": _number(measured.aggregation_error),
            "excluded_clients": int(measured.excluded),
            **megabytes(index, federation.server, ranks),
            "epsilon": epsilon(config, num_clients, index + 1),
            "cohort": cohorts[index].tolist(),
            "rank": ranks,
            "client_loss": np.asarray(measured.client_loss)[: start.cohort_size].tolist(),
        }

    return measure


def in_words(
    metrics: Sequence[Metric], found: Evaluation, domains: Sequence[str]
) -> dict[str, Any]:
    """An evaluation as plain numbers, each metric under four names.

    For a metric `m`: `m`, the plain mean over domains; `domain_m`, by domain; `personal_m`, the
    mean over clients; `client_m`, of each of them. Where nothing is held out there is None.
    """
    numbers: dict[str, Any] = {}
    for metric in metrics:
        by_domain = np.asarray(found.domains[metric.name], np.float64)
        by_client = np.asarray(found.clients[metric.name], np.float64)

        def finished(values: Any, metric: Metric = metric) -> Any:
            return _jsonable(metric.finish(np.asarray(values)))

        numbers |= {
            metric.name: finished(mean_of_known(by_domain)),
            f"domain_{metric.name}": dict(zip(domains, finished(by_domain), strict=True)),
            f"personal_{metric.name}": finished(mean_of_known(by_client)),
            f"client_{metric.name}": finished(by_client),
        }
    return numbers


def _jsonable(values: np.ndarray) -> Any:
    """Floats in lists, None for what is not finite, which JSON does not have."""
    known = np.array(values, object)
    known[~np.isfinite(values)] = None
    return known.tolist()


def _number(x: jax.Array) -> float | None:
    return _jsonable(np.asarray(x, np.float64))
