"""The pages of documentation say what the docstrings say, and these say what they must."""

import importlib.util
import inspect
from pathlib import Path

import pytest

from fedlora_jax import aggregation

SCRIPT = Path(__file__).parents[2] / "docs" / "generate.py"


def test_pages_are_current():
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert not generate.stale(), "run python docs/generate.py"


@pytest.mark.parametrize("name", sorted(aggregation.REGISTRY))
def test_docstrings_are_complete(name):
    doc = inspect.getdoc(aggregation.get(name))
    for part in (".. math::", "Cost:", "Up ", "Args:", "Returns:", "Raises:", ">>>", "References:"):
        assert part in doc, part
    parameters = inspect.signature(aggregation.get(name)).parameters
    assert list(parameters)[:2] == ["stacked", "weights"]
    for parameter in parameters:
        assert f"  {parameter}: " in doc, parameter
