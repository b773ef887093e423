"""Splitting one data set over clients.

A partitioner is a pure function of labels or domains, a seed and options. It returns a list with
one int32 array of example positions per client; none is empty, and no example is there twice.
Together they hold every example, but for `label_proportions`, `natural` with a smallest size, and
`file`, which may leave some out. `docs/partitions.md` lists them.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fedlora_jax.data.partition._common import Parts
from fedlora_jax.data.partition._domains import by_domain, domain_dirichlet
from fedlora_jax.data.partition._file import (
    FORMAT,
    digest,
    digest_of_parts,
    file,
    load,
    parts_of,
)
from fedlora_jax.data.partition._labels import dirichlet, label_proportions, shards
from fedlora_jax.data.partition._sizes import iid, natural, power_law, quantity_skew
from fedlora_jax.data.partition._statistics import distance, entropy
from fedlora_jax.names import lookup

__all__ = [
    "FORMAT",
    "Parts",
    "by_domain",
    "check_options",
    "digest",
    "digest_of_parts",
    "dirichlet",
    "distance",
    "domain_dirichlet",
    "entropy",
    "file",
    "get",
    "iid",
    "label_proportions",
    "load",
    "names",
    "natural",
    "options",
    "parts_of",
    "power_law",
    "quantity_skew",
    "shards",
]

_PARTITIONERS: dict[str, Callable[..., Parts]] = {
    "iid": iid,
    "quantity_skew": quantity_skew,
    "power_law": power_law,
    "dirichlet": dirichlet,
    "shards": shards,
    "label_proportions": label_proportions,
    "by_domain": by_domain,
    "domain_dirichlet": domain_dirichlet,
    "natural": natural,
    "file": file,
}

# What is not an option: it comes with the data and the run.
_GIVEN = ("num_examples", "labels", "domains", "clients", "tokens", "seed")


def names() -> list[str]:
    """Names that `get` knows, sorted."""
    return sorted(_PARTITIONERS)


def get(name: str) -> Callable[..., Parts]:
    """The partitioner of that name.

    Raises:
      ValueError: If there is none; the message lists those there are.
    """
    return lookup(_PARTITIONERS, name, "partitioner")


def options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a partitioner: its parameters but data and seed.

    Raises:
      ValueError: As `get`.
    """
    parameters = inspect.signature(get(name)).parameters
    return {key: value for key, value in parameters.items() if key not in _GIVEN}


def check_options(name: str, given: Mapping[str, Any]) -> None:
    """Checks that a partitioner has the options given, and all it needs.

    Raises:
      ValueError: If not; it names the nearest valid option.
    """
    known = options(name)
    for option in given:
        lookup(known, option, f"option of the partition {name!r}:")
    needed = [key for key, value in known.items() if value.default is inspect.Parameter.empty]
    missing = [key for key in needed if key not in given]
    if missing:
        raise ValueError(f"the partition {name!r} needs the option {', '.join(missing)}")
