"""`experiments.shared.rounds`: rounds one by one."""

import jax
import pytest

from experiments.shared import rounds
from fedlora_jax import experiment


@pytest.mark.parametrize(("wanted", "size"), [("3", 3), ("all", 4), ("auto", 4)])
def test_as_many_clients_train_at_once_as_is_configured(digits, wanted, size):
    """In one program. Of so few rounds none is tried: with `auto` as many as fit."""
    config = digits.copy_and_resolve_references()
    config.rounds, config.clients_per_chunk = 2, wanted
    setting = experiment.prepare(config)
    program = experiment.compile_program(config, setting)
    state = experiment.first_state(config, setting, program.method)
    asked = []
    function = jax.jit(lambda more, federation, data, *_: (federation, more + data.total))

    def make(size):
        asked.append(size)
        return function

    found = [int(total) for _, total in rounds.each(config, state, make, 1)]
    assert found == [int(state.data.total) + 1] * 2 and set(asked) == {size}
    assert function._cache_size() == 1
