"""Which split an example is in where nobody has said: by a hash of what it holds."""

import hashlib
from collections.abc import Mapping


def split_of(content: bytes, shares: Mapping[str, float]) -> str:
    """The split of an example: of all of them, about the share of each; the rest is `federated`.

    It depends on the content alone, so that equal examples are in one split, and examples that are
    added move no others.

    Args:
      content: What the example is told by.
      shares: From split to share.

    Raises:
      ValueError: If a share is negative, or they leave no rest.
    """
    return split_by(hashlib.sha256(content).digest(), shares)


def split_by(digest: bytes, shares: Mapping[str, float]) -> str:
    """`split_of` a content by its SHA-256.

    Raises:
      ValueError: As `split_of`.
    """
    if min(shares.values(), default=0) < 0 or sum(shares.values()) >= 1:
        raise ValueError(f"shares that are held out must be in 0 .. 1 and leave a rest: {shares}")
    place = int.from_bytes(digest[:8]) / 2**64
    for name in sorted(shares):
        place -= shares[name]
        if place < 0:
            return name
    return "federated"
