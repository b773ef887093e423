"""The table of bounds: nothing that is a number lacks one, and what is beyond it is refused."""

import inspect
import numbers

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, linear, python_docs_minilm, python_stdlib_smollm2
from fedlora_jax import aggregation, bounds, experiment, lora, methods, models
from fedlora_jax.data import partition
from fedlora_jax.experiment import program
from fedlora_jax.models.pretrain import pretrain
from tests.aggregation import cases

CONFIGS = {
    module.__name__: module.get_config().to_dict()
    for module in (digits, linear, python_docs_minilm, python_stdlib_smollm2)
}


def numeric(parameters):
    """The names of those that are numbers, by annotation."""
    kinds = {int, float, int | None, float | None, jax.Array | float}
    return [name for name, parameter in parameters.items() if parameter.annotation in kinds]


OPTIONS = [
    (owner, name)
    for owners, options in (
        (methods.REGISTRY, methods.hyperparameters),
        (partition.names(), partition.options),
    )
    for owner in owners
    for name in numeric(options(owner))
] + [("pretrain", name) for name in ("steps", "batch_size", "learning_rate", "seed")]


@pytest.mark.parametrize(("owner", "name"), OPTIONS)
def test_every_numeric_option_has_a_bound(owner, name):
    assert name in bounds.BOUNDS.get(owner, {}), f"a line in bounds.BOUNDS[{owner!r}] is missing"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_number_of_a_configuration_has_a_bound_that_it_keeps(config):
    bounds.check_config(config)
    for path, value in bounds._flat(config):
        first = value[0] if isinstance(value, tuple) and value else value
        # Of a variant the method's constructor checks them.
        if path.startswith("variants."):
            continue
        if isinstance(first, numbers.Number) and not isinstance(first, bool):
            assert bounds.bound_of(path, config), f"a line for {path} in bounds.BOUNDS is missing"


def test_every_bound_is_of_something_there_is():
    known = {*methods.REGISTRY, *partition.names(), "config", "model", "pretrain", "training"}
    known |= {"adapters", "fedprox", "private", "server_step", "epsilon", "faults", "robust", "run"}
    assert set(bounds.BOUNDS) <= known


@pytest.mark.parametrize(
    ("bound", "good", "bad"),
    [
        (bounds.Bound(1, whole=True), [1, np.int32(2), jnp.int32(3)], [0, -1, 1.5, "1", True]),
        (bounds.Bound(above=True), [1e-30, 1, np.float32(2)], [0, -1, np.nan, np.inf, None]),
        (bounds.Bound(0, 1, below=True), [0, 0.5], [1, -1e-9, "x", [0.5]]),
        (bounds.Bound(1, whole=True, optional=True), [None, 1], [0, False]),
        (bounds.Bound(1, whole=True, several=1), [(1,), [3, 2]], [(), (2, 0), (1.5,), 2, "12"]),
        (bounds.Bound(above=True, several=0), [(), (0.5,)], [(0.5, -1), 0.5, None]),
    ],
)
def test_bounds(bound, good, bad):
    assert not any(bound.fault(value) for value in good)
    assert all(bound.fault(value) for value in bad)


def test_traced_values_pass():
    def traced(strength):
        bounds.check("fedrot_lora", strength=strength)
        return strength

    assert jax.jit(traced)(2.0) == 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"local.learning_rate": -1.0}, "config.local.learning_rate must be above 0, got -1.0"),
        ({"local.clip_norm": -1.0}, "config.local.clip_norm must be at least 0"),
        ({"local.weight_decay": -5.0}, "config.local.weight_decay must be at least 0"),
        ({"local.steps": -5}, "config.local.steps must be at least 0, got -5"),
        ({"local.momentum": 1.0}, "config.local.momentum must be at least 0 and below 1"),
        ({"lora.scale": 0.0}, "config.lora.scale must be above 0"),
        ({"lora.targets": ()}, "there is no target pattern"),
        ({"lora.targets": ("(attention",)}, "'.attention' is no regular expression"),
        ({"lora.head": "["}, "is no regular expression"),
        ({"seed": -1}, "config.seed must be from 0 to 4294967295, got -1"),
        # Of fedsmooth_lora there is an option that refers to it.
        ({"rounds": 0}, "config.rounds must be at least 1, got 0"),
        ({"options.lora_fair.steps": -5}, "config.options.lora_fair.steps must be at least 0"),
        (
            {"options.spectral.threshold": 2.0},
            "options.spectral.threshold must be above 0 and at most 1",
        ),
        ({"data.partition_options.alpha": 0.0}, "data.partition_options.alpha must be above 0"),
        ({"pretraining.options.batch_size": 0}, "pretraining.options.batch_size must be at least"),
        ({"model.options.num_classes": 0}, "config.model.options.num_classes must be at least 1"),
        ({"privacy.delta": 1.0}, "privacy.delta must be above 0 and below 1"),
    ],
)
def test_configurations_without_sense_name_field_and_bound(values, message):
    config = digits.get_config()
    config.update_from_flattened_dict(values)
    with pytest.raises(ValueError, match=message):
        experiment.check(config)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: methods.lora_fair(steps=-5), "lora_fair: steps must be at least 0, got -5"),
        (lambda: methods.hetlora(decay=0.0), "hetlora: decay must be above 0 and at most 1"),
        (lambda: methods.fedsmooth_lora(gamma=0), "fedsmooth_lora: gamma must be above 0"),
        (
            lambda: aggregation.spectral(cases.clients(), cases.WEIGHTS, threshold=2),
            "spectral: threshold must be above 0 and at most 1, got 2",
        ),
        (
            lambda: aggregation.flexlora(cases.clients(), cases.WEIGHTS, rank=99),
            "flexlora: rank 99 is impossible for kernel 'block/",
        ),
        (
            lambda: lora.init(jax.random.key(0), {}, targets="a", rank=1, dtype=jnp.int8),
            "floating type, not int8",
        ),
        (lambda: lora.init(jax.random.key(0), {}, targets="a", rank=0), "adapters: rank must be"),
        (lambda: models.get("vit_digits", depth=0), "model: depth must be at least 1"),
        (lambda: models.get("vit_digits", widht=8), "option of the model 'vit_digits': 'widht'"),
        (lambda: pretrain(None, {}, steps=0), "pretrain: steps must be at least 1"),
    ],
)
def test_constructors_name_option_and_bound(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_clipping_gradients_are_what_they_are():
    """Clipped to a norm of 0 they would all be zero, and nothing learned."""
    config = digits.get_config().local
    config.update(optimizer="sgd", momentum=0.0, weight_decay=0.0, clip_norm=0.0)
    gradient = jnp.array([30.0, -40.0])
    for clip, expected in ((0.0, -gradient), (5.0, -gradient / 10)):
        config.clip_norm = clip
        optimizer = program.optimizer(config)
        update, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
        np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_numeric_finds_the_numbers():
    """Or the test that every option has a bound would say nothing."""
    assert ("lora_fair", "steps") in OPTIONS and ("flexlora", "rank") in OPTIONS
    assert ("dirichlet", "balanced") not in OPTIONS and len(OPTIONS) > 25
    assert "steps" in inspect.signature(pretrain).parameters
