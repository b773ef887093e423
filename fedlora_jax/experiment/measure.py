"""The metrics of a run, round by round; `docs/outputs.md` explains them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import ml_collections
import numpy as np
from jax.typing import ArrayLike

from fedlora_jax.aggregation import Diagnostics
from fedlora_jax.experiment.program import Program, epsilon
from fedlora_jax.experiment.state import State
from fedlora_jax.federated import communication
from fedlora_jax.federated.communication import MessageBytes
from fedlora_jax.federated.evaluation import Evaluation, mean_of_known
from fedlora_jax.federated.metrics import Metric
from fedlora_jax.federated.round import RoundMetrics
from fedlora_jax.methods import Server


class Participation(NamedTuple):
    """Who takes part in a round.

    Attributes:
      cohort: The clients, `[K]`.
      absent: For each of them, the rounds since it took part before, `[K]`.
    """

    cohort: np.ndarray
    absent: np.ndarray


Measure: TypeAlias = Callable[
    [int, Participation, Server, Evaluation | None, RoundMetrics], dict[str, Any]
]

_QUANTILES = {"10%": 0.1, "50%": 0.5, "90%": 0.9}


def make_measure(
    config: ml_collections.ConfigDict,
    program: Program,
    domains: Sequence[str],
    start: State,
) -> Measure:
    """Builds `(round, who took part, server after it, evaluation, measured) -> metrics`.

    They are all plain numbers, with None for what is not finite, which JSON does not have. Without
    an evaluation those of held-out examples are left out.

    Args:
      config: As in `configs/`.
      program: Of the method of the configuration.
      domains: Their names.
      start: Before the first round.
    """
    made = communication.messages(program.method, start.server, start.client, start.cohort_size)
    num_clients = len(start.ranks)

    def megabytes(
        index: int, server: Server, ranks: list[int], who: Participation, measured: RoundMetrics
    ) -> dict[str, float]:
        count = functools.cache(
            lambda rank, away: communication.count(
                program.method, server, made, index, rank=rank, absent=away
            )
        )
        each = [count(rank, away) for rank, away in zip(ranks, who.absent.tolist(), strict=True)]
        if measured.silent is not None:
            # On a mesh places of nobody follow the clients.
            each = [x._replace(up=0) if s else x for x, s in zip(each, measured.silent)]
        total = MessageBytes(*(sum(x) / 1e6 for x in zip(*each, strict=True)))
        return {f"megabytes_{name}": value for name, value in total._asdict().items()}

    def measure(
        index: int,
        who: Participation,
        server: Server,
        found: Evaluation | None,
        measured: RoundMetrics,
    ) -> dict[str, Any]:
        here = slice(len(who.cohort))
        ranks = np.asarray(measured.ranks)[here].tolist()
        spent = epsilon(config, num_clients, index + 1)
        return {
            "round": index,
            "method": config.method,
            "seed": config.seed,
            **({} if found is None else in_words(program.metrics, found, domains)),
            "loss": _number(measured.loss),
            "aggregation_error": _number(measured.aggregation_error),
            **_described(measured.diagnostics),
            "excluded_clients": int(measured.excluded),
            **({} if measured.absent is None else {"absent_clients": int(measured.absent)}),
            **megabytes(index, server, ranks, who, measured),
            "epsilon": None if spent is None else _number(spent),
            "cohort": who.cohort.tolist(),
            "rank": ranks,
            "client_loss": _jsonable(np.asarray(measured.client_loss, np.float64)[here]),
        }

    return measure


def _described(found: Diagnostics | None) -> dict[str, float | None]:
    """What the clients' updates look like, as far as it is known."""
    if found is None:
        return {}
    # The error is there anyhow.
    known = found._replace(spectrum=None, error=None)._asdict()
    renamed = {"norm": "update_norm", "dropped": "dropped_share"}
    return {renamed.get(k, k): _number(x) for k, x in known.items() if x is not None}


def in_words(
    metrics: Sequence[Metric], found: Evaluation, domains: Sequence[str]
) -> dict[str, Any]:
    """An evaluation as plain numbers, each metric under five names.

    For a metric `m`: `m`, the plain mean over domains; `domain_m`, by domain; `personal_m`, the
    mean over clients; `quantiles_m`, three quantiles of clients; `client_m`, of each client of the
    panel. `panel` says who that is if it is not everybody. Where nothing is held out there is None.
    """
    numbers: dict[str, Any] = {} if found.panel is None else {"panel": found.panel.tolist()}
    for metric in metrics:
        by_domain, clients, everyone = (
            np.asarray(values[metric.name], np.float64)
            for values in (found.domains, found.clients, found.everyone)
        )

        def finished(values: Any, metric: Metric = metric) -> Any:
            return _jsonable(metric.finish(np.asarray(values)))

        numbers |= {
            metric.name: finished(mean_of_known(by_domain)),
            f"domain_{metric.name}": dict(zip(domains, finished(by_domain), strict=True)),
            f"personal_{metric.name}": finished(mean_of_known(everyone)),
            f"quantiles_{metric.name}": dict(
                zip(_QUANTILES, finished(_quantiles_of_known(everyone)), strict=True)
            ),
            f"client_{metric.name}": finished(clients),
        }
    return numbers


def _quantiles_of_known(values: np.ndarray) -> np.ndarray:
    known = values[~np.isnan(values)]
    wanted = list(_QUANTILES.values())
    with np.errstate(invalid="ignore"):  # Between two infinite ones.
        return np.quantile(known, wanted) if len(known) else np.full(len(wanted), np.nan)


def _jsonable(values: np.ndarray) -> Any:
    """Floats in lists, None for what is not finite."""
    known = np.array(values, object)
    known[~np.isfinite(values)] = None
    return known.tolist()


def _number(x: ArrayLike) -> float | None:
    return _jsonable(np.asarray(x, np.float64))
