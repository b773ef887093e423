"""Archives whose checksum their publishers state, where TFDS has none on record."""

import hashlib
from pathlib import Path


def check(archive: Path, algorithm: str, published: str) -> None:
    """Checks that an archive is the one that was published.

    Args:
      archive: The file.
      algorithm: As `hashlib` names it.
      published: Its digest, in hexadecimal digits.

    Raises:
      ValueError: If it is another; it names both digests, and what to do.
    """
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != published:
        raise ValueError(
            f"{archive} is not the archive that was published: it has the {algorithm.upper()} sum "
            f"{found}, the published file {published}. Delete it, and prepare the data set again"
        )
