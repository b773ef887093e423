"""Partitions that skew labels."""

import bisect
from collections.abc import Sequence

import numpy as np

from fedlora_jax import bounds
from fedlora_jax.data.partition._common import Parts, apportion, check_sizes

_ATTEMPTS = 1000
# Added to a client's proportions, so that it has some where all its own labels are used up.
_SMALLEST_SHARE = 1e-12


def dirichlet(
    labels: np.ndarray,
    num_clients: int,
    alpha: float,
    seed: int,
    min_examples: int = 1,
    balanced: bool = False,
) -> Parts:
    """Splits every label over the clients in proportions drawn from a symmetric Dirichlet.

    The split of Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks"
    (ICML 2019, arXiv:1905.12022). Balanced, it is a client that draws its proportions of the
    labels, as in Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for
    Federated Visual Classification" (arXiv:1909.06335): clients take an example in turns, without
    replacement, of a label drawn in their proportions among those that are left. What the last
    turns take is what others left, so that a client's labels are not wholly its own choice.

    Args:
      labels: Integers `[M]`.
      num_clients: N.
      alpha: Concentration: towards 0 each label goes to one client (balanced: each client has one
        label), towards infinity the parts become alike.
      seed: The same seed gives the same parts.
      min_examples: Smallest part allowed; proportions are drawn anew until all are this large.
      balanced: Whether the sizes of parts differ by at most one.

    Returns:
      N int32 arrays of positions in `0 .. M - 1`.

    Raises:
      ValueError: If alpha is not positive, or no draw gives every client that many examples.
    """
    labels = np.asarray(labels)
    bounds.check("dirichlet", num_clients=num_clients, alpha=alpha, min_examples=min_examples)
    check_sizes(len(labels), num_clients, min_examples)
    generator = np.random.default_rng(seed)
    if balanced:
        return _draw_in_turns(labels, num_clients, alpha, generator)
    for _ in range(_ATTEMPTS):
        parts = _draw_dirichlet(labels, num_clients, alpha, generator)
        if min(map(len, parts)) >= min_examples:
            return parts
    raise ValueError(
        f"in {_ATTEMPTS} draws with alpha={alpha}, no split of {len(labels)} examples gave each of "
        f"{num_clients} clients at least {min_examples}: use a larger alpha, fewer clients, a "
        "smaller min_examples or balanced=True"
    )


def shards(labels: np.ndarray, num_clients: int, shards_per_client: int, seed: int) -> Parts:
    """Sorts by label, cuts into shards of equal size, and deals these out.

    The pathological split of McMahan et al., "Communication-Efficient Learning of Deep Networks
    from Decentralized Data" (AISTATS 2017, arXiv:1602.05629), there with two shards a client.

    Args:
      labels: Integers `[M]`.
      num_clients: N.
      shards_per_client: How many each has; most clients have at most so many labels.
      seed: The same seed gives the same parts.

    Returns:
      N int32 arrays of positions in `0 .. M - 1`. Sizes of shards differ by at most one.

    Raises:
      ValueError: If there are more shards than examples.
    """
    labels = np.asarray(labels)
    bounds.check("shards", num_clients=num_clients, shards_per_client=shards_per_client)
    check_sizes(len(labels), num_clients, shards_per_client)
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    cut = np.array_split(by_label, num_clients * shards_per_client)
    dealt = generator.permutation(len(cut)).reshape(num_clients, shards_per_client)
    return [np.concatenate([cut[i] for i in mine]).astype(np.int32) for mine in dealt]


def label_proportions(
    labels: np.ndarray,
    proportions: Sequence[Sequence[float]],
    seed: int,
    examples_per_client: int | None = None,
) -> Parts:
    """Gives every client labels in the proportions stated, and all clients equally many examples.

    The split of FFA-LoRA (Sun et al., ICLR 2024, arXiv:2403.12313): three clients with (0.1, 0.9),
    (0.9, 0.1), (0.5, 0.5) of two labels. As proportions and sizes are fixed, examples are left
    over: those of labels that clients want less of than there are. They are left out, drawn at
    random. By default clients are as large as the scarcest label allows.

    Args:
      labels: Integers `[M]` from 0.
      proportions: `[N, L]`, for each client the proportions of all labels; rows sum to 1.
      seed: The same seed gives the same parts.
      examples_per_client: How many each has; by default as many as possible.

    Returns:
      N int32 arrays of positions in `0 .. M - 1`, each at most once. Numbers are rounded by largest
      remainders.

    Raises:
      ValueError: If proportions do not fit the labels or do not sum to 1, or there are not enough
        examples of a label.
    """
    labels, wanted = np.asarray(labels), _checked(proportions)
    num_labels = wanted.shape[1]
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_labels:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(
            f"proportions are of the labels 0 to {num_labels - 1}, but there is a label {wrong}"
        )
    available = np.bincount(labels, minlength=num_labels)
    largest = _largest_size(available, wanted)
    size = largest if examples_per_client is None else examples_per_client
    if not 1 <= size <= largest:
        raise ValueError(
            f"the {available.tolist()} examples of the labels allow from 1 to {largest} for each "
            f"client in these proportions, not {size}"
            if largest
            else f"there are {available.tolist()} examples of the labels: not enough for a client "
            "in these proportions"
        )
    generator = np.random.default_rng(seed)
    taken = _counts(size, wanted)
    pieces = []
    for label in range(num_labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        pieces.append(np.split(members, np.cumsum(taken[:, label]))[:-1])
    return [np.concatenate(mine).astype(np.int32) for mine in zip(*pieces, strict=True)]


def _checked(proportions: Sequence[Sequence[float]]) -> np.ndarray:
    try:
        wanted = np.array(proportions, float)
    except ValueError:
        wanted = np.zeros(0)
    if wanted.ndim != 2 or not wanted.size:
        raise ValueError(
            "proportions must be a table of numbers, a row a client and a column a label, not "
            f"{proportions}"
        )
    for client, row in enumerate(wanted):
        if not (row >= 0).all() or abs(row.sum() - 1) > 1e-6:
            raise ValueError(
                f"the proportions of client {client} must not be negative and sum to 1, and are "
                f"{row.tolist()}"
            )
    return wanted


def _counts(size: int, wanted: np.ndarray) -> np.ndarray:
    """Examples by client and label, `[N, L]`."""
    return np.array([apportion(size, row) for row in wanted])


def _largest_size(available: np.ndarray, wanted: np.ndarray) -> int:
    """The most examples that all clients can have."""
    total = wanted.sum(0)
    asked = total > 0
    size = int((available[asked] / total[asked]).min()) + 1
    while size and (_counts(size, wanted).sum(0) > available).any():
        size -= 1
    return size


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


def _draw_in_turns(
    labels: np.ndarray, num_clients: int, alpha: float, generator: np.random.Generator
) -> Parts:
    pools = [
        generator.permutation(np.flatnonzero(labels == label)).tolist()
        for label in np.unique(labels)
    ]
    shares = generator.dirichlet(np.full(len(pools), alpha), num_clients) + _SMALLEST_SHARE
    cumulative = _cumulative(shares)
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for turn, chance in enumerate(generator.random(len(labels)).tolist()):
        client = turn % num_clients
        pool = bisect.bisect_right(cumulative[client], chance)
        parts[client].append(pools[pool].pop())
        if not pools[pool] and turn + 1 < len(labels):
            shares[:, pool] = 0
            cumulative = _cumulative(shares)
    return [np.array(part, np.int32) for part in parts]


def _cumulative(shares: np.ndarray) -> list[list[float]]:
    sums = np.cumsum(shares, axis=1)
    return (sums / sums[:, -1:]).tolist()
