"""What the README says, done."""

import re
from pathlib import Path

from fedlora_jax import aggregation, methods

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_aggregation_example_runs():
    example = next(
        block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "stack(" in block
    )
    scope = {}
    exec(example, scope)
    found = aggregation.error(scope["stacked"], scope["weights"], scope["result"])
    assert 0 <= float(found) < 1
    assert scope["result"].residual is None


def test_methods_named_are_those_there_are():
    listed = re.search(r"Methods \(\[what each does\].*?: (.*?)A mistyped", README, re.S).group(1)
    assert set(re.findall(r"\w+(?=[,`.])", listed)) >= set(methods.REGISTRY)
