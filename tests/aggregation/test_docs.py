"""The pages of documentation say what the docstrings say, and these say what they must."""

import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from fedlora_jax import aggregation

SCRIPT = Path(__file__).parents[2] / "docs" / "generate.py"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_current(generate):
    assert not generate.stale(), "run python docs/generate.py"


def test_pages_have_nothing_of_sphinx(generate):
    directive = re.compile(r"^\.\. |:\w+:`", re.M)
    assert not [name for name, text in generate.found().items() if directive.search(text)]


PAGES = sorted(path.name for path in (SCRIPT.parent / "aggregation").glob("*.md"))


@pytest.mark.parametrize("name", PAGES)
def test_examples_of_pages_run_as_they_stand(name):
    """They import what they use."""
    text = (SCRIPT.parent / "aggregation" / name).read_text()
    for example in re.findall(r"```python\n(.*?)```", text, re.S):
        test = doctest.DocTestParser().get_doctest(example, {}, name, name, 0)
        assert doctest.DocTestRunner().run(test) == (0, len(test.examples))


@pytest.mark.parametrize("name", sorted(aggregation.REGISTRY))
def test_docstrings_are_complete(name):
    doc = inspect.getdoc(aggregation.get(name))
    for part in (".. math::", "Cost:", "Up ", "Args:", "Returns:", "Raises:", ">>>", "References:"):
        assert part in doc, part
    parameters = inspect.signature(aggregation.get(name)).parameters
    assert list(parameters)[:2] == ["stacked", "weights"]
    for parameter in parameters:
        assert f"  {parameter}: " in doc, parameter
