"""Writes the pages that follow from the code: the aggregation functions, and the methods.

    python docs/generate.py

`--check` writes nothing, and fails if a page is not what the code says.
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fedlora_jax import Factors, aggregation, methods
from fedlora_jax.federated import communication
from fedlora_jax.methods import Server, Trainable

HERE = Path(__file__).parent
OTHERS: list[Callable[..., Any]] = [
    aggregation.error,
    aggregation.diagnostics,
    aggregation.stack,
    aggregation.cut,
    aggregation.ordered,
    aggregation.shares,
    aggregation.tail_penalty,
    aggregation.gram,
    aggregation.clip_scales,
    aggregation.krum_weights,
    aggregation.geometric_median_weights,
    aggregation.coordinate_median,
    aggregation.coordinate_trimmed_mean,
]
SECTIONS = ("Args", "Returns", "Raises", "Examples", "References")


def markdown(text: str) -> str:
    """Mathematics of Sphinx as Markdown renderers want it."""
    text = re.sub(r":math:`([^`]*)`", lambda m: "$" + " ".join(m[1].split()) + "$", text)

    def block(match: re.Match[str]) -> str:
        return "\n$$\n" + textwrap.dedent(match[1]).strip() + "\n$$\n"

    text = re.sub(r"\n\.\. math::(.*\n(?:\n|[ \t]+.*\n?)*)", block, text + "\n").strip()
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


def method_page() -> str:
    """All methods: what they do, their options, and what they combine with."""
    lines = ["# Methods", "", (methods.__doc__ or "").strip(), ""]
    lines += ["| method | what clients and server do | options and defaults |", "|---|---|---|"]
    for name in sorted(methods.REGISTRY):
        options = ", ".join(f"`{k}={v!r}`" for k, v in methods.defaults(name).items())
        lines.append(f"| `{name}` | {summary(methods.get(name))} | {options} |")
    lines += ["", "## What combines with what", "", _COMBINING, ""]
    lines += [f"| method | {' | '.join(_TITLES.values())} |", "|---" * (1 + len(_TITLES)) + "|"]
    reasons: dict[str, int] = {}
    for name in sorted(methods.REGISTRY):
        refuses = methods.get(name)().refuses
        cells = [
            f"- ({reasons.setdefault(refuses[key], len(reasons) + 1)})" if key in refuses else "yes"
            for key in _TITLES
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    lines += ["", "## What a client sends and keeps", "", _SENDING, ""]
    lines += ["| method | sends | the mean would do | keeps of its own |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {' | '.join(crossing(name))} |" for name in sorted(methods.REGISTRY)]
    lines += ["", "<!-- Made by generate.py from the code. -->"]
    return "\n".join(lines) + "\n"


def crossing(name: str) -> tuple[str, str, str]:
    """What a client of a method sends, whether its mean would do, and what the client keeps."""
    method = methods.get(name)()
    kernel = jnp.zeros((5, 7))
    adapters = {"layer": Factors(jnp.zeros((5, 2)), jnp.zeros((2, 7)))}
    trainable = Trainable(adapters, {"head": jnp.zeros(3)})
    server = Server({"layer": {"kernel": kernel}}, trainable, jnp.float32(1), (), jnp.int32(0))
    server, client = method.init(jax.random.key(0), server)
    upload = communication.messages(method, server, client, 3).upload
    even, odd = (_parts(method.sent(upload, round_index)) for round_index in (0, 1))
    sends = even if even == odd else f"{even} in rounds 0, 2, ..; {odd} in rounds 1, 3, .."
    mean = "-" if even == "-" else "no" if "robust_entries" in method.refuses else "yes"
    return sends, mean, _parts(client)


def _parts(tree: Any) -> str:
    """The factors and the head among arrays, by their sizes."""

    def part(shape: tuple[int, ...]) -> str:
        if len(shape) < 2:
            return {(3,): "head", (): "a number"}[shape]
        return {5: "`a`"}.get(shape[0]) or {7: "`b`"}[shape[1]]

    shapes = [x.shape[-2:] for x in jax.tree.leaves(tree)]
    return ", ".join(dict.fromkeys(map(part, shapes))) or "-"


_TITLES = {
    "unequal_ranks": "unequal ranks",
    "fedprox": "FedProx",
    "scaffold": "SCAFFOLD",
    "server_optimizer": "server optimiser",
    "server_step": "server step",
    "privacy": "privacy",
    "robust_selection": "krum, multi_krum",
    "robust_weights": "norm_clip, geometric_median",
    "robust_entries": "median, trimmed_mean",
}
_COMBINING = """\
How to ask for it is in [combinations.md](combinations.md). A combination without "yes" is refused
before training, with the reason below the table."""

_SENDING = """\
By `Method.sent`, on which alone the server's step depends, as a test checks. `fedsmooth_lora` sends
the change that it wishes for, of rank r, in factors. Where the mean would do, the server needs no
more than a sum over clients, and the option for privacy gives it no more; elsewhere its step reads
each client's factors. What that can tell of a client's data is in [SECURITY.md](../SECURITY.md)."""


def pages() -> dict[str, str]:
    """Every page by its path within this folder."""
    functions = [*aggregation.REGISTRY.values(), *OTHERS]
    return {
        "methods.md": method_page(),
        "aggregation/index.md": index(),
        **{f"aggregation/{f.__name__}.md": page(f) for f in functions},
    }


def found() -> dict[str, str]:
    """The pages that are there; all in `aggregation` are made here."""
    paths = [HERE / "methods.md", *(HERE / "aggregation").glob("*.md")]
    return {str(path.relative_to(HERE)): path.read_text() for path in paths if path.exists()}


def stale() -> list[str]:
    """Pages that are missing, wrong, or of no function."""
    wanted, there = pages(), found()
    return sorted(
        name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)
    )


def main() -> None:
    """Writes the pages, or checks them."""
    if "--check" in sys.argv:
        if stale():
            sys.exit(f"not current: {', '.join(stale())}. Run python docs/generate.py")
        return
    for name in found():
        (HERE / name).unlink()
    for name, text in pages().items():
        (HERE / name).write_text(text)


if __name__ == "__main__":
    main()
