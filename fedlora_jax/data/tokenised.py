"""Token ids that were made once and are kept, beside the prepared data sets.

A file's name is a digest of all that its ids depend on, so that nothing stale is ever read.
"""

import contextlib
import hashlib
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedlora_jax.data.text import Texts

# To be counted up when the same text becomes other ids, or a file has another form.
_FORMAT = 3
_ABOUT = "about"
_DAMAGE = (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile, zlib.error)


def kept(
    directory: str | os.PathLike[str], recipe: Mapping[str, Any], make: Callable[[], Texts]
) -> Texts:
    """What `make` gives, read from a file if it was made before.

    What `make` warns of is kept too, and said again. A file that is damaged is made anew; where
    nothing can be written, a warning says so and no more is lost.

    Args:
      directory: Where prepared data sets are; files are in `tokenised` therein.
      recipe: All that the result depends on, as JSON has it.
      make: Makes it.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, recipe], sort_keys=True).encode()).hexdigest()
    path = Path(directory).expanduser() / "tokenised" / f"{digest[:24]}.npz"
    found = _read(path)
    if found is None:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            texts = make()
        found = texts, [str(x.message) for x in given if x.category is UserWarning]
        for other in given:
            if other.category is not UserWarning:
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        _write(path, *found)
    texts, said = found
    for message in said:
        warnings.warn(message, stacklevel=2)
    return texts


def _read(path: Path) -> tuple[Texts, list[str]] | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(arrays.pop(_ABOUT).tobytes())
        texts = Texts(arrays, tuple(about["clients"]), tuple(about["domains"]))
        return texts, about["said"]
    except _DAMAGE as error:
        warnings.warn(f"{path} is damaged, and made anew: {error}", stacklevel=3)
        return None


def _write(path: Path, texts: Texts, said: list[str]) -> None:
    """Writes a file that is whole or not there."""
    about = {"clients": texts.clients, "domains": texts.domains, "said": said}
    encoded = np.frombuffer(json.dumps(about).encode(), np.uint8)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **texts.arrays, **{_ABOUT: encoded})
        partial.replace(path)
    except OSError as error:
        warnings.warn(f"token ids are made anew next time, for {error}", stacklevel=3)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
