"""What happens to files."""

from pathlib import Path


def flip(path: Path, place: int | None = None) -> None:
    """Changes a bit, of the byte in the middle or at `place`."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Leaves the first half."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
