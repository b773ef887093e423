"""A table of what the clients of a partition have."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedlora_jax.data import partition
from fedlora_jax.experiment import records
from fedlora_jax.experiment.partitions import Overview

# With more clients than this, the table says what lies between the smallest and the largest.
_MANY = 100

_LEGEND = (
    "{Kind} entropy: of the client's examples, in nats; {whole:.3f} of all data. Distance to all: "
    "total variation between the distribution of the client's {kind}s and that of all data, from "
    "0, the same, to 1, nothing in common."
)


def table(clients: Overview) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table, as `legend` explains them: a client, then all of them.

    Columns in which clients cannot differ are left out.
    """
    columns, digits = _columns(clients), {"examples": 0}
    head = ["client", *columns]
    numbers = {name: values for name, values in columns.items() if name != "domain"}

    def row(first: str, domain: str, values: Sequence[float]) -> list[str]:
        shown = [f"{x:.{digits.get(name, 3)}f}" for name, x in zip(numbers, values, strict=True)]
        return [first, *([domain] if "domain" in columns else []), *shown]

    rows = []
    if len(clients.counts) <= _MANY:
        domains = columns.get("domain", [""] * len(clients.counts))
        for client, (domain, *values) in enumerate(zip(domains, *numbers.values(), strict=True)):
            rows.append(row(str(client), domain, values))
    for name, quantile in {"smallest": 0.0, "median": 0.5, "largest": 1.0}.items():
        rows.append(row(name, "", [np.quantile(x, quantile) for x in numbers.values()]))
    return head, rows


def legend(clients: Overview) -> str:
    """What the columns of `table` mean, and how many examples no client has."""
    given, total = int(clients.counts.sum()), int(clients.whole.sum())
    count = len(clients.counts)
    text = f"{count} client{'s' * (count > 1)} with {given:,} of {total:,} training examples."
    whole = clients.whole_by_kind
    if len(whole) == 1:
        return text
    kind, entropy = clients.kind, partition.entropy(whole)
    return f"{text} {_LEGEND.format(kind=kind, Kind=kind.capitalize(), whole=entropy)}"


def write_csv(path: Path, clients: Overview) -> None:
    """Writes the numbers of each client, a row a client, in full precision."""
    columns = _columns(clients)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["client", *(name.replace(" ", "_") for name in columns)])
    writer.writerows(
        [client, *row] for client, row in enumerate(zip(*columns.values(), strict=True))
    )
    records.write_atomically(path, text.getvalue())


def _columns(clients: Overview) -> dict[str, list]:
    """The values of each client by the name of the column."""
    columns: dict[str, list] = {}
    if len(clients.domains) > 1:
        columns["domain"] = [_domain(clients, counts) for counts in clients.counts.sum(2)]
    columns["examples"] = clients.counts.sum((1, 2)).tolist()
    by_kind, whole = clients.by_kind, clients.whole_by_kind
    if len(whole) > 1:
        columns[f"{clients.kind} entropy nats"] = partition.entropy(by_kind).tolist()
        columns["distance to all"] = partition.distance(by_kind, whole).tolist()
    return columns


def _domain(clients: Overview, counts: np.ndarray) -> str:
    present = np.flatnonzero(counts)
    return clients.domains[present[0]] if len(present) == 1 else f"{len(present)} domains"
