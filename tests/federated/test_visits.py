"""Which examples a client meets in a round."""

import jax
import numpy as np
import optax
import pytest

from fedlora_jax.data.clients import NO_PLACE, local_batch
from fedlora_jax.federated import randomness, visits
from fedlora_jax.federated.local import LocalTraining
from tests.world import any_client, method_of

batch = jax.jit(local_batch, static_argnums=3)
MEMBERS, COUNTS = np.array([4, -1, 0, 7]), np.array([3, 1, 40, 11])


@pytest.mark.parametrize("steps, epochs, calibration", [(1, 0, 0), (3, 0, 2), (9, 0, 1), (0, 2, 1)])
def test_they_are_those_of_the_batches(steps, epochs, calibration):
    training = LocalTraining(optax.sgd(1.0), batch_size=4, steps=steps, epochs=epochs)
    seed = jax.random.key(1)
    draw = visits.make_visits(training, calibration, largest=40)
    found = np.asarray(draw(seed, 5, MEMBERS, COUNTS))
    assert found.shape == (4, min(40, (steps + calibration) * 4) if steps else 40)
    for places, client, count in zip(found, MEMBERS, COUNTS):
        wanted = set()
        if client >= 0:
            available = int(training.steps_of_epoch(count))
            numbers = {
                "batches": int(training.steps_of(count)),
                "calibration": min(calibration, available),
            }
            for stream, number in numbers.items():
                key = randomness.of_client(seed, stream, 5, client)
                for step in range(number):
                    wanted |= set(np.asarray(batch(count, key, step, 4)[0]).tolist())
        assert places.tolist() == sorted(wanted) + [NO_PLACE] * (len(places) - len(wanted))


@pytest.mark.parametrize("name, batches", [("fedit", 0), ("fedsmooth_lora", 8)])
def test_the_batches_of_calibration_are_those_that_a_method_asks_for(world, name, batches):
    federation = world.federation(method_of(name))
    client = any_client(federation)
    assert visits.calibration_batches(method_of(name), federation.server, client) == batches
