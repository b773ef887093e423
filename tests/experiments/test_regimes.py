"""The papers' regimes, and many clients in private: what their configurations ask for."""

import pytest

from configs import digits_private, digits_regimes
from fedlora_jax import experiment
from fedlora_jax.experiment.program import epsilon


@pytest.mark.parametrize(
    ("arg", "clients", "rank"),
    [
        ("", 6, 4),
        ("regime=fedsmooth_lora", 5, 2),
        ("regime=fedsmooth_lora,clients=3,alpha=0.1", 3, 2),
        ("regime=flora_na,alpha=0.3", 10, 4),
    ],
)
def test_all_clients_train_an_epoch_by_sgd(arg, clients, rank):
    config = digits_regimes.get_config(arg)
    experiment.check(config)
    options = config.data.partition_options
    present = options.get("num_clients", 6 * options.get("clients_per_domain", 0))
    assert config.clients_per_round == present == clients and config.lora.rank == rank
    assert (config.local.epochs, config.local.steps, config.local.optimizer) == (1, 0, "sgd")


def test_a_number_that_a_regime_does_not_have_is_refused():
    with pytest.raises(ValueError, match="six clients, one a domain"):
        digits_regimes.get_config("regime=lora_fair,clients=3")


def test_among_a_thousand_clients_noise_buys_privacy():
    found = []
    for noise in ("noise=1", "", "noise=4"):
        config = digits_private.get_config(noise)
        experiment.check(config)
        clients = config.data.partition_options.num_clients
        found.append(epsilon(config, num_clients=clients, rounds=config.rounds))
    assert clients == 1000 and config.clients_per_round == 100
    assert found == pytest.approx([32.3, 7.57, 2.79], rel=0.02)
