"""Splitting one data set over clients.

A partitioner is a pure function of labels or domains and a seed. It returns a list with one int32
array of example positions per client; together they hold every example exactly once and none is
empty.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fedlora_jax.names import lookup

Parts = list[np.ndarray]

_ATTEMPTS = 1000


def iid(num_examples: int, num_clients: int, seed: int) -> Parts:
    """Splits at random into parts whose sizes differ by at most one.

    Args:
      num_examples: M.
      num_clients: N.
      seed: The same seed gives the same parts.

    Returns:
      N int32 arrays of positions in `0 .. M - 1`.

    Raises:
      ValueError: If there are more clients than examples, or no client.
    """
    _check_sizes(num_examples, num_clients, 1)
    shuffled = np.random.default_rng(seed).permutation(num_examples)
    return [part.astype(np.int32) for part in np.array_split(shuffled, num_clients)]


def dirichlet(
    labels: np.ndarray, num_clients: int, alpha: float, seed: int, min_examples: int = 1
) -> Parts:
    """Splits every label over the clients in proportions drawn from a symmetric Dirichlet.

    The split of Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks"
    (ICML 2019, arXiv:1905.12022).

    Args:
      labels: Integers `[M]`.
      num_clients: N.
      alpha: Concentration: towards 0 each label goes to one client, towards infinity the parts
        become alike.
      seed: The same seed gives the same parts.
      min_examples: Smallest part allowed; proportions are drawn anew until all are this large.

    Returns:
      N int32 arrays of positions in `0 .. M - 1`.

    Raises:
      ValueError: If alpha is not positive, or no draw gives every client that many examples.
    """
    labels = np.asarray(labels)
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, not {alpha}")
    _check_sizes(len(labels), num_clients, min_examples)
    generator = np.random.default_rng(seed)
    for _ in range(_ATTEMPTS):
        parts = _draw_dirichlet(labels, num_clients, alpha, generator)
        if min(map(len, parts)) >= min_examples:
            return parts
    raise ValueError(
        f"in {_ATTEMPTS} draws with alpha={alpha}, no split of {len(labels)} examples gave each of "
        f"{num_clients} clients at least {min_examples}: use a larger alpha, fewer clients or a "
        "smaller min_examples"
    )


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

    Returns:
      int32 arrays of positions in `0 .. M - 1`, `clients_per_domain` for each domain.

    Raises:
      ValueError: If labels and domains differ in length, or as `dirichlet`.
    """
    labels, domains = np.asarray(labels), np.asarray(domains)
    if labels.shape != domains.shape:
        raise ValueError(f"{labels.shape} labels but {domains.shape} domains")
    return _within_domains(
        domains,
        seed,
        lambda members, seed: dirichlet(
            labels[members], clients_per_domain, alpha, seed, min_examples
        ),
    )


def natural(clients: np.ndarray) -> Parts:
    """Gives every client the examples that are its own in the data set.

    Args:
      clients: Integers `[M]`, whose each example is.

    Returns:
      int32 arrays of positions in `0 .. M - 1`, one for each client that occurs, the lowest first.
    """
    clients = np.asarray(clients)
    return [np.flatnonzero(clients == client).astype(np.int32) for client in np.unique(clients)]


_PARTITIONERS: dict[str, Callable[..., Parts]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "by_domain": by_domain,
    "domain_dirichlet": domain_dirichlet,
    "natural": natural,
}


def names() -> list[str]:
    """Names that `get` knows, sorted."""
    return sorted(_PARTITIONERS)


def get(name: str) -> Callable[..., Parts]:
    """The partitioner of that name.

    Raises:
      ValueError: If there is none; the message lists those there are.
    """
    return lookup(_PARTITIONERS, name, "partitioner")


def _check_sizes(num_examples: int, num_clients: int, min_examples: int) -> None:
    if num_clients < 1:
        raise ValueError(f"there must be at least one client, not {num_clients}")
    if min_examples < 1:
        raise ValueError(f"min_examples must be at least 1, not {min_examples}")
    if num_examples < num_clients * min_examples:
        raise ValueError(
            f"{num_examples} examples cannot give each of {num_clients} clients {min_examples}"
        )


def _draw_dirichlet(
    labels: np.ndarray, num_clients: int, alpha: float, generator: np.random.Generator
) -> Parts:
    pieces: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        shares = np.cumsum(generator.dirichlet(np.full(num_clients, alpha)))[:-1]
        cuts = np.rint(shares * len(members)).astype(int)
        for client, piece in enumerate(np.split(members, cuts)):
            pieces[client].append(piece)
    return [generator.permutation(np.concatenate(piece)).astype(np.int32) for piece in pieces]


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
