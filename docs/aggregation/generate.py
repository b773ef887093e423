"""Writes a page a function from its docstring, and the index.

    python docs/aggregation/generate.py

`--check` writes nothing, and fails if a page is not what its docstring says.
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlora_jax import aggregation

HERE = Path(__file__).parent
OTHERS: list[Callable[..., Any]] = [
    aggregation.error,
    aggregation.diagnostics,
    aggregation.stack,
    aggregation.cut,
    aggregation.tail_penalty,
]
SECTIONS = ("Args", "Returns", "Raises", "Examples", "References")


def markdown(text: str) -> str:
    """Mathematics of Sphinx as Markdown renderers want it."""
    text = re.sub(r":math:`([^`]*)`", lambda m: "$" + " ".join(m[1].split()) + "$", text)

    def block(match: re.Match[str]) -> str:
        return "\n$$\n" + textwrap.dedent(match[1]).strip() + "\n$$\n"

    text = re.sub(r"\n\.\. math::\n((?:\n|[ \t]+.*\n?)+)", block, text + "\n").strip()
    return re.sub(r"\n\$\$\n(?=\*)", "\n$$\n\n", text)


def items(text: str) -> str:
    """The entries of a section `Args:` or `Raises:` as a list."""
    entries = re.split(r"\n(?=\S)", text.strip("\n"))
    lines = []
    for entry in entries:
        name, _, rest = " ".join(entry.split()).partition(": ")
        lines.append(f"* `{name}`: {rest}")
    return "\n".join(lines)


def page(function: Callable[..., Any]) -> str:
    """The page of one function."""
    name, doc = function.__name__, inspect.getdoc(function) or ""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", doc, flags=re.MULTILINE)
    parameters = inspect.signature(function).parameters.values()
    options = ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters
    )
    lines = [f"# {name}", "", f"`aggregation.{name}({options})`", "", markdown(parts[0])]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        body = textwrap.dedent(body).strip("\n")
        if title == "Examples":
            body = f"```python\n{body}\n```"
        elif title in ("Args", "Raises"):
            body = markdown(items(body))
        else:
            body = markdown(body)
        lines += ["", f"## {'Arguments' if title == 'Args' else title}", "", body]
    lines += ["", "<!-- Made by generate.py from the docstring. -->"]
    return "\n".join(lines) + "\n"


def summary(function: Callable[..., Any]) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(function) or "").splitlines()[0]


def index() -> str:
    """The table of all pages."""
    lines = ["# Aggregation functions", "", (aggregation.__doc__ or "").strip(), ""]
    lines += ["| function | what it does |", "|---|---|"]
    functions = [*aggregation.REGISTRY.values(), *OTHERS]
    lines += [f"| [{f.__name__}]({f.__name__}.md) | {summary(f)} |" for f in functions]
    lines += ["", "<!-- Made by generate.py from the docstrings. -->"]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Every page by file name."""
    functions = [*aggregation.REGISTRY.values(), *OTHERS]
    return {"index.md": index(), **{f"{f.__name__}.md": page(f) for f in functions}}


def stale() -> list[str]:
    """Pages that are missing, wrong, or of no function."""
    wanted = pages()
    found = {path.name: path.read_text() for path in HERE.glob("*.md")}
    return sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )


def main() -> None:
    """Writes the pages, or checks them."""
    if "--check" in sys.argv:
        if stale():
            sys.exit(f"not current: {', '.join(stale())}. Run python docs/aggregation/generate.py")
        return
    for path in HERE.glob("*.md"):
        path.unlink()
    for name, text in pages().items():
        (HERE / name).write_text(text)


if __name__ == "__main__":
    main()
