"""Configurations with and without sense: they are accepted and run, or an error names the field.

Some hundred by default; `HYPOTHESIS_EXAMPLES=100000` checks so many, and runs a thousandth of them.
"""

import math
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora_jax import bounds, experiment, methods

COUNT = int(os.environ.get("HYPOTHESIS_EXAMPLES", "60"))
fuzz = settings(
    deadline=None,
    derandomize=COUNT < 1000,
    database=None,
    suppress_health_check=list(HealthCheck),
)

# What else than a number a field may be, and what it may not.
NAMES = {
    "method": (sorted(methods.REGISTRY), ["lorafair", ""]),
    "weights": (["examples", "equal"], ["exampls"]),
    "clients_per_chunk": (["all", "1", "3"], ["some", "-2", "1.5"]),
    "local.optimizer": (["adamw", "sgd"], ["adam", "sdg"]),
    "local.schedule": (["constant", "cosine"], ["cosin"]),
    "server.optimizer": (["none", "fedavgm", "fedadam", "fedyogi"], ["adam"]),
    "precision.compute": (["float32", "bfloat16"], ["float16"]),
    "precision.storage": (["float32", "bfloat16"], ["int8"]),
    "lora.ranks": (["equal", "uniform", "heavy_tail_light"], ["uniforn", "4,x", "4,-1"]),
    "lora.targets": (
        [("attention/query",), ("attention", "mlp")],
        [(), ("(attention",), ("*",), ("[",)],
    ),
    "lora.head": (["head", None], ["(", "["]),
    "data.partition": (["domain_dirichlet"], ["dirichlet", "iid", "diriclet"]),
    "faults.kind": (["none", "nan", "sign_flip"], ["sign_flop"]),
    "robust.rule": (["none", "norm_clip", "median", "multi_krum"], ["medain"]),
    "task": (["classification"], ["clasification", "causal_lm"]),
    "metrics": (
        [("accuracy",), ("cross_entropy", "accuracy"), ("f1",)],
        [(), ("acuracy",), ("nll",)],
    ),
}
# Values that a run of moments can have, for fields whose bounds allow more.
SMALL = {"rounds": 2, "clients_per_round": 6, "lora.rank": 4, "local.steps": 3, "local.epochs": 2}
FIXED = {"seed": 7, "mesh.clients": 1, "mesh.model": 1, "local.learning_rate": 0.01}


def numbers(config):
    """The bound of each numeric field."""
    values = dict(bounds._flat(config.to_dict()))
    found = {path: bounds.bound_of(path, config.to_dict()) for path in values}
    return {path: bound for path, bound in found.items() if bound is not None}


def good(path, bound):
    if path in FIXED:
        return st.just(FIXED[path])
    low = bound.low + bound.above * (1 if bound.whole else 1e-3)
    if bound.whole:
        return st.integers(int(low), min(bound.high, SMALL.get(path, int(low) + 3)))
    return st.floats(low, min(bound.high - 1e-3 * bound.below, low + 2))


def bad(bound):
    values = [bound.low - 1]
    values += [bound.low] * bound.above + [bound.high] * bound.below
    values += [bound.high + 1] * (bound.high < math.inf)
    values += [] if bound.whole else [math.nan, math.inf]
    return st.sampled_from(values).map(int if bound.whole else float)


def changed(digits, values):
    config = digits.copy_and_resolve_references()
    config.update_from_flattened_dict(values)
    return config


@settings(fuzz, max_examples=COUNT)
@given(st.data())
def test_one_wrong_value_is_named(digits, data):
    bound_of = numbers(digits)
    field = data.draw(st.sampled_from(sorted({**bound_of, **NAMES})))
    wrong = st.sampled_from(NAMES[field][1]) if field in NAMES else bad(bound_of[field])
    value = data.draw(wrong)
    with pytest.raises(ValueError) as error:
        experiment.check(changed(digits, {field: value}))
    words = [field, field.split(".")[-1], *(map(repr, value) if field in NAMES else [])]
    assert any(word in str(error.value) for word in (*words, repr(value))) or value in ((), "")
    assert "\n" not in str(error.value)


@st.composite
def sensible(draw, digits, most=8):
    """Values that are good each for itself."""
    bound_of = numbers(digits)
    fields = draw(st.sets(st.sampled_from(sorted({**bound_of, **NAMES})), max_size=most))
    return {
        field: draw(
            st.sampled_from(NAMES[field][0]) if field in NAMES else good(field, bound_of[field])
        )
        for field in sorted(fields)
        # Another data set, model or backbone would have to be made.
        if not field.startswith(("pretraining.", "model.", "data.held_out"))
    }


@settings(fuzz, max_examples=COUNT)
@given(st.data())
def test_good_values_are_accepted_or_do_not_go_together(digits, data):
    values = data.draw(sensible(digits))
    try:
        experiment.check(changed(digits, values))
    except ValueError as error:
        # Methods say what they cannot be combined with, steps or epochs there must be, and Krum
        # needs many clients.
        known = ("cannot be combined", "local.epochs", "krum needs")
        assert any(words in str(error) for words in known), error


@settings(fuzz, max_examples=max(2, COUNT // 1000))
@given(st.data())
def test_what_is_accepted_runs_two_rounds(digits, tmp_path_factory, data):
    values = data.draw(sensible(digits, most=4))
    config = changed(digits, {**values, "rounds": 2})
    try:
        experiment.check(config)
        setting = experiment.prepare(config)
        program = experiment.compile_program(config, setting)
        rows = experiment.run(config, setting, program, tmp_path_factory.mktemp("run"))
    except ValueError as error:
        known = (
            "cannot be combined",
            "local.epochs",
            "krum needs",
            "needs 2 r",
            "impossible for",
            "rank",
        )
        assert any(words in str(error) for words in known), error
        return
    except FloatingPointError:
        return
    assert len(rows) == 2 and all(np.isfinite(row[config.metrics[0]]) for row in rows)
