"""Python's own standard library as text: fifteen clients, each with its kind of source files.

The source is on every machine that runs Python: real code of many hands, asyncio beside email
beside unittest, 6 MB of it. A client is a package or a group of modules, a domain a family of them.
Tests, tables and what is generated are left out, and so is what a version of Python does not have.
Text differs between versions, and so do results: `edition` names the one at hand.
"""

import functools
import hashlib
import platform
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedlora_jax.data.text import Encoder, Rows, Texts, pack
from fedlora_jax.names import lookup

# By domain and client: modules and packages.
_GROUPS = {
    "network": {
        "http": "http urllib wsgiref socketserver",
        "email": "email",
        "protocols": "ftplib imaplib mailbox nntplib poplib smtpd smtplib telnetlib",
        "sockets": "ipaddress netrc socket ssl uuid webbrowser xmlrpc",
    },
    "formats": {
        "xml": "html xml",
        "data": "_compat_pickle configparser copyreg csv dbm json pickle plistlib shelve sqlite3 "
        "tomllib",
        "text": "_pydatetime _strptime calendar datetime difflib gettext pprint re reprlib shlex "
        "string textwrap",
        "files": "_compression bz2 compression filecmp fileinput fnmatch genericpath glob gzip "
        "lzma ntpath os pathlib posixpath shutil tarfile tempfile zipfile",
    },
    "concurrency": {
        "asyncio": "asyncio",
        "multiprocessing": "multiprocessing",
        "threads": "_threading_local _weakrefset concurrent contextlib queue sched selectors "
        "subprocess threading weakref",
    },
    "tools": {
        "unittest": "doctest unittest",
        "debugging": "bdb cProfile cmd code inspect pdb profile pstats timeit trace traceback "
        "tracemalloc",
        "compiling": "ast codeop compileall dis importlib modulefinder opcode pkgutil py_compile "
        "pyclbr runpy symtable tabnanny token tokenize zipimport",
        "commands": "argparse ensurepip getopt logging optparse platform pydoc site sysconfig venv",
    },
}

_LEFT_OUT = {"__pycache__", "idle_test", "site-packages", "test", "tests"}
_TABLES = {"html/entities.py", "re/_casefix.py", "token.py"}
# Bytes below which a file is little more than a licence.
_SHORTEST = 1000
# One file in so many of a client, and at least one, is held out.
_TEST, _VALIDATION = 4, 10


class _File(NamedTuple):
    path: str
    client: str
    text: str


def client_names() -> list[str]:
    """Names of the clients, in order."""
    return [client for clients in _GROUPS.values() for client in clients]


def domain_names() -> list[str]:
    """Names of the domains, in order."""
    return list(_GROUPS)


def edition() -> str:
    """The text at hand: the version of Python, and a digest of all files, `"3.11.7-0123456789ab"`.

    Raises:
      FileNotFoundError: If this Python comes without the source of its library.
    """
    digest = hashlib.sha256()
    for file in _files():
        digest.update(f"{file.path}\0{file.client}\0{file.text}\0".encode())
    return f"{platform.python_version()}-{digest.hexdigest()[:12]}"


def files(split: str) -> dict[str, list[str]]:
    """The files of a split, by client; a file is in one split alone.

    Those of a client are ordered by a hash of their names; the first fourth, and at least one, is
    for testing, the next tenth, and at least one, for validation.

    Args:
      split: `'federated'`, `'validation'` or `'test'`.

    Raises:
      FileNotFoundError: As `edition`.
      ValueError: If there is no such split.
    """
    return {client: [file.path for file in members] for client, members in _of_split(split).items()}


def load(
    split: str,
    encoder: Encoder,
    length: int,
    *,
    windows_per_client: int = 0,
    windows_per_file: int = 0,
) -> Texts:
    """The windows of a split, file by file, all of whose tokens are to be predicted.

    Args:
      split: `'federated'`, `'validation'` or `'test'`.
      encoder: The tokenizer, and what ends a file.
      length: T, tokens of a window.
      windows_per_client: At most so many of a client, evenly spaced over its text; 0 for all.
      windows_per_file: At most so many of a file, before that; 0 for all.

    Returns:
      Rows with their clients and domains; in the order of these, of files and of the text.

    Raises:
      FileNotFoundError: As `edition`.
      ValueError: If there is no such split.
    """
    rows: list[Rows] = []
    owners: list[int] = []
    for client, members in enumerate(_of_split(split).values()):
        documents = encoder.documents([file.text for file in members])
        of_files = [
            pack([document], length, encoder.end).thinned(windows_per_file)
            for document in documents
        ]
        mine = Rows(*map(np.concatenate, zip(*of_files))).thinned(windows_per_client)
        rows.append(mine)
        owners += [client] * len(mine.tokens)
    clients = np.array(owners, np.int32)
    domain_of = [index for index, members in enumerate(_GROUPS.values()) for _ in members]
    tokens, answer = map(np.concatenate, zip(*rows))
    return Texts(
        {
            "tokens": tokens,
            "answer": answer,
            "client": clients,
            "domain": np.array(domain_of, np.int32)[clients],
        },
        tuple(client_names()),
        tuple(domain_names()),
    )


def _of_split(split: str) -> dict[str, list[_File]]:
    chosen: dict[str, list[_File]] = {}
    for client in client_names():
        members = [file for file in _files() if file.client == client]
        members.sort(key=lambda file: (zlib.crc32(file.path.encode()), file.path))
        test = max(1, len(members) // _TEST)
        validation = test + max(1, len(members) // _VALIDATION)
        parts = {
            "federated": members[validation:],
            "validation": members[test:validation],
            "test": members[:test],
        }
        chosen[client] = lookup(parts, split, "split")
    return chosen


@functools.cache
def _files() -> tuple[_File, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found = tuple(
        _File(path.relative_to(root).as_posix(), client, text)
        for clients in _GROUPS.values()
        for client, modules in clients.items()
        for path in _sources(root, modules.split())
        if len(text := _read(path)) >= _SHORTEST
    )
    poor = [c for c in client_names() if sum(file.client == c for file in found) < 3]
    if poor:
        raise FileNotFoundError(
            f"the library of this Python, {root}, lacks the source of {', '.join(poor)}: a full "
            "installation of Python has it (on Debian and Ubuntu the package libpython3-stdlib)"
        )
    return found


def _sources(root: Path, modules: list[str]) -> Iterator[Path]:
    for module in modules:
        found = [root / f"{module}.py", *(root / module).rglob("*.py")]
        for path in sorted(found):
            relative = path.relative_to(root)
            if (
                path.is_file()
                and relative.as_posix() not in _TABLES
                and not _LEFT_OUT & set(relative.parts)
            ):
                yield path


def _read(path: Path) -> str:
    with tokenize.open(path) as file:
        return file.read()
