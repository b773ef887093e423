"""Partitions in which every client is of one domain."""

from collections.abc import Callable, Sequence

import numpy as np

from fedlora_jax import bounds
from fedlora_jax.data.partition._common import Parts
from fedlora_jax.data.partition._labels import dirichlet
from fedlora_jax.data.partition._sizes import iid


def by_domain(domains: np.ndarray, clients_per_domain: int, seed: int) -> Parts:
    """Gives every client examples of one domain, IID within it.

    Args:
      domains: Integers `[M]`.
      clients_per_domain: Clients of each domain that occurs; those of the lowest domain come first.
      seed: The same seed gives the same parts.

    Returns:
      int32 arrays of positions in `0 .. M - 1`, `clients_per_domain` for each domain.

    Raises:
      ValueError: If a domain has fewer examples than clients.
    """
    bounds.check("by_domain", clients_per_domain=clients_per_domain)
    return _within_domains(
        domains, seed, lambda members, seed: iid(len(members), clients_per_domain, seed)
    )


def domain_dirichlet(
    labels: np.ndarray,
    domains: np.ndarray,
    clients_per_domain: int,
    alpha: float,
    seed: int,
    min_examples: int = 1,
    balanced: bool = False,
) -> Parts:
    """Gives every client examples of one domain, with labels split Dirichlet within it.

    Feature and label skew at once, the setting of LoRA-FAIR (Bian et al., ICCV 2025).

    Args:
      labels: Integers `[M]`.
      domains: Integers `[M]`.
      clients_per_domain: Clients of each domain that occurs; those of the lowest domain come first.
      alpha: As in `dirichlet`.
      seed: The same seed gives the same parts.
      min_examples: As in `dirichlet`.
      balanced: As in `dirichlet`; within a domain.

    Returns:
      int32 arrays of positions in `0 .. M - 1`, `clients_per_domain` for each domain.

    Raises:
      ValueError: If labels and domains differ in length, or as `dirichlet`.
    """
    bounds.check(
        "domain_dirichlet",
        clients_per_domain=clients_per_domain,
        alpha=alpha,
        min_examples=min_examples,
    )
    labels, domains = np.asarray(labels), np.asarray(domains)
    if labels.shape != domains.shape:
        raise ValueError(f"{labels.shape} labels but {domains.shape} domains")
    return _within_domains(
        domains,
        seed,
        lambda members, seed: dirichlet(
            labels[members], clients_per_domain, alpha, seed, min_examples, balanced
        ),
    )


def _within_domains(
    domains: np.ndarray, seed: int, split: Callable[[np.ndarray, int], Sequence[np.ndarray]]
) -> Parts:
    """Splits each domain's examples on their own, from a seed of its own."""
    domains = np.asarray(domains)
    present = np.unique(domains)
    if not len(present):
        raise ValueError("there are no examples to split")
    parts = []
    for domain in present.tolist():
        members = np.flatnonzero(domains == domain)
        domain_seed = int(np.random.SeedSequence([seed, domain]).generate_state(1)[0])
        parts += [members[part].astype(np.int32) for part in split(members, domain_seed)]
    return parts
