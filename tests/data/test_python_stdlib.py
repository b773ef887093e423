"""The source of Python's standard library."""

import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from fedlora_jax.data import python_stdlib
from fedlora_jax.data.text import Encoder
from tests import letters

SPLITS = ("federated", "validation", "test")
ROOT = Path(sysconfig.get_path("stdlib"))


@pytest.fixture
def other_library(tmp_path, monkeypatch):
    """A copy of the library that may be changed."""
    for client_files in (f for split in SPLITS for f in python_stdlib.files(split).values()):
        for name in client_files:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    python_stdlib._files.cache_clear()
    yield tmp_path
    python_stdlib._files.cache_clear()


def test_every_client_has_files_of_its_own_in_every_split():
    splits = [python_stdlib.files(split) for split in SPLITS]
    names = python_stdlib.client_names()
    assert 12 <= len(names) <= 16 and len(python_stdlib.domain_names()) == 4
    everything = [name for split in splits for files in split.values() for name in files]
    assert len(everything) == len(set(everything)) > 200
    assert not [name for name in everything if "test" in Path(name).parts]
    for split in splits:
        assert list(split) == names and all(split.values())
    sizes = [sum((ROOT / f).stat().st_size for s in splits for f in s[name]) for name in names]
    assert max(sizes) < 3 * min(sizes)
    assert all(name.startswith("asyncio/") for name in splits[0]["asyncio"])


def test_windows():
    pytest.importorskip("tokenizers", reason="needs the extra `text`")
    tokenizer = letters.tokenizer()
    encoder = Encoder(tokenizer, letters.END)
    found = python_stdlib.load("test", encoder, 600, windows_per_client=5, windows_per_file=3)
    arrays = found.arrays
    count = len(arrays["tokens"])
    assert arrays["tokens"].shape == arrays["answer"].shape == (count, 600)
    each = np.bincount(arrays["client"], minlength=len(found.clients))
    assert each.min() >= 1 and each.max() == 5
    assert np.bincount(arrays["domain"], minlength=len(found.domains)).min() > 0
    pairs = set(zip(arrays["client"].tolist(), arrays["domain"].tolist()))
    assert len(pairs) == len(found.clients)
    assert found.domains[dict(pairs)[found.clients.index("asyncio")]] == "concurrency"
    first = arrays["tokens"][arrays["client"] == found.clients.index("asyncio")][0]
    source = (ROOT / python_stdlib.files("test")["asyncio"][0]).read_text()
    assert source.startswith(tokenizer.decode(first[:100].tolist()))


def test_the_edition_is_that_of_the_text(other_library):
    before = python_stdlib.edition()
    python_stdlib._files.cache_clear()
    assert python_stdlib.edition() == before
    (other_library / "queue.py").write_text((other_library / "queue.py").read_text() + "# more\n")
    python_stdlib._files.cache_clear()
    after = python_stdlib.edition()
    assert after != before and after.split("-")[0] == before.split("-")[0]


def test_modules_that_a_version_lacks(other_library):
    wanted = {split: python_stdlib.files(split)["xml"] for split in SPLITS}
    for name in ("nntplib.py", "smtpd.py", "telnetlib.py", "uuid.py"):
        (other_library / name).unlink(missing_ok=True)
    python_stdlib._files.cache_clear()
    assert {split: python_stdlib.files(split)["xml"] for split in SPLITS} == wanted
    assert all(python_stdlib.files("test").values())


def test_a_library_without_source(other_library):
    shutil.rmtree(other_library / "asyncio")
    (other_library / "asyncio").mkdir()
    (other_library / "asyncio" / "queues.pyc").touch()
    python_stdlib._files.cache_clear()
    with pytest.raises(FileNotFoundError, match="lacks the source of asyncio"):
        python_stdlib.edition()


def test_errors():
    with pytest.raises(ValueError, match="unknown split 'train'"):
        python_stdlib.files("train")
