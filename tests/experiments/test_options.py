"""Every option of every method can be set on the command line."""

import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs import digits, python_docs_minilm
from fedlora_jax import methods

OPTIONS = [(name, key) for name in sorted(methods.REGISTRY) for key in methods.defaults(name)]


@pytest.fixture
def parsed(monkeypatch):
    """The options that a program gets from its command line."""

    def parse(*arguments):
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        # Where `config_flags` looks for what is overridden.
        monkeypatch.setattr("sys.argv", ["program", f"--config={digits.__file__}", *arguments])
        values(sys.argv)
        return values.config.options

    return parse


@pytest.mark.parametrize(("name", "key"), OPTIONS)
def test_an_option_is_set(parsed, name, key):
    default = methods.defaults(name)[key]
    text = {"str": f"{default}x", "bool": str(not default), "float": "0.25"}.get(
        type(default).__name__, "3"
    )
    found = parsed(f"--config.options.{name}.{key}={text}")[name][key]
    assert str(found) == text and found != default


def test_zeta_is_the_authors():
    """Constant 1 (language), and 1 falling to 0 over the rounds (images)."""
    language = python_docs_minilm.get_config().options.fedsmooth_lora
    images = digits.get_config()
    assert (language.zeta, language.zeta_min, language.gamma) == (1, 1, 64)
    ours = images.options.fedsmooth_lora
    assert (ours.zeta, ours.zeta_min, ours.gamma, ours.rounds) == (1, 0, 256, images.rounds)
    assert methods.defaults("fedsmooth_lora")["zeta_min"] == 1
