"""The metrics of a run, round by round; `docs/outputs.md` explains them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import ml_collections
import numpy as np

from fedlora_jax.experiment.program import Program, epsilon
from fedlora_jax.federated import communication
from fedlora_jax.federated.communication import MessageBytes
from fedlora_jax.federated.evaluation import HeldOut
from fedlora_jax.federated.round import Federation, RoundMetrics

Measure: TypeAlias = Callable[[int, Federation, RoundMetrics], dict[str, Any]]


def make_measure(
    config: ml_collections.ConfigDict,
    program: Program,
    domains: Sequence[str],
    federation: Federation,
    test: HeldOut,
    cohorts: np.ndarray,
) -> Measure:
    """Builds `(round, federation after it, what it measured) -> metrics`, all plain numbers.

    Args:
      config: As in `configs/`.
      program: Of the method of the configuration.
      domains: Their names.
      federation: Before the first round.
      test: Held-out examples.
      cohorts: Of all rounds, `[rounds, K]`.
    """
    made = communication.messages(program.method, federation, cohorts.shape[1])
    num_clients = len(federation.ranks)

    def megabytes(index: int, federation: Federation, ranks: list[int]) -> dict[str, float]:
        absent = communication.absences(cohorts[: index + 1].tolist())
        count = functools.cache(
            lambda rank, away: communication.count(
                program.method, federation, made, index, rank=rank, absent=away
            )
        )
        each = [count(rank, away) for rank, away in zip(ranks, absent, strict=True)]
        total = MessageBytes(*(sum(x) / 1e6 for x in zip(*each, strict=True)))
        return {f"megabytes_{name}": value for name, value in total._asdict().items()}

    def measure(index: int, federation: Federation, measured: RoundMetrics) -> dict[str, Any]:
        accuracy = program.evaluate(federation, test)
        by_domain = np.asarray(accuracy.domains, np.float64)
        by_client = np.asarray(accuracy.clients, np.float64)
        ranks = np.asarray(measured.ranks).tolist()
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
            **megabytes(index, federation, ranks),
            "epsilon": epsilon(config, num_clients, index + 1),
            "cohort": cohorts[index].tolist(),
            "rank": ranks,
            "client_loss": np.asarray(measured.client_loss).tolist(),
            "client_accuracy": by_client.tolist(),
        }

    return measure


def _number(x: jax.Array) -> float | None:
    """A float, or None for NaN, which JSON does not have."""
    value = float(x)
    return None if np.isnan(value) else value
