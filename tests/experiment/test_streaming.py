"""Training images that are read round by round: the same run as with all of them in memory."""

import jax
import numpy as np
import pytest

from fedlora_jax import experiment
from fedlora_jax.experiment import loop, setting, streaming


@pytest.fixture(scope="module")
def base(digits):
    """A configuration whose rounds take a moment, what its runs share, and the same streamed."""
    digits.lora.rank = 4
    digits.local.schedule = "constant"
    whole = experiment.prepare(digits)
    digits.data.streaming = True
    return digits, whole, experiment.prepare(digits)


def in_memory():
    """How many arrays of images of clients of a cohort there are."""
    return sum(x.ndim == 5 and x.dtype == np.uint8 for x in jax.live_arrays())


def without_seconds(rows):
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def test_a_streamed_run_is_the_run_in_memory_to_the_bit(base, tmp_path, monkeypatch):
    """Of a method that reads its clients' images twice, before it starts and to train."""
    config = base[0].copy_and_resolve_references()
    config.method = "fedsmooth_lora"
    options = config.options.fedsmooth_lora
    options.zeta_min = options.zeta  # so that more rounds go on with fewer
    read, held = streaming.load_images, []
    monkeypatch.setattr(
        streaming, "load_images", lambda *args: (held.append(in_memory()), read(*args))[1]
    )

    program = experiment.compile_program(config, base[1])

    def run(setting, workdir, rounds):
        config.rounds, config.data.streaming = rounds, setting.stored is not None
        return experiment.run(config, setting, program, workdir)

    whole = run(base[1], tmp_path / "whole", 4)
    assert not held
    # Ended after two rounds, and gone on with.
    run(base[2], tmp_path / "streamed", 2)
    rows = run(base[2], tmp_path / "streamed", 4)
    assert without_seconds(rows) == without_seconds(whole)
    assert all(0 <= row["seconds_waiting"] <= row["seconds"] for row in rows)
    adapters = [np.load(tmp_path / name / "adapters.npz") for name in ("whole", "streamed")]
    for name in adapters[0].files:
        np.testing.assert_array_equal(adapters[0][name], adapters[1][name])
    # Every round's are read once, and while they are, there are those of one other round at most.
    assert len(held) == 4 and max(held) == 1


def test_images_that_cannot_be_read_end_a_run_and_are_named(base, tmp_path):
    config, _, streamed = base
    config = config.copy_and_resolve_references()
    config.rounds = 2

    def image(index):
        if index:  # the first is read for its shape
            raise ValueError(f"number {index} is not an image")
        return streamed.stored.image(index)

    broken = streamed._replace(stored=streamed.stored._replace(image=image))
    program = experiment.compile_program(config, broken)
    with pytest.raises(ValueError, match=r"number \d+ is not an image"):
        experiment.run(config, broken, program, tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data.on_bad_record": "skip"}, "set it to 'stop'"),
        ({"data.name": "python_docs"}, "the texts of 'python_docs' are held in memory"),
    ],
)
def test_what_cannot_be_streamed_is_refused(base, change, message):
    config = base[0].copy_and_resolve_references()
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        setting.training_examples(config)


def test_where_data_wait_makes_no_other_run(base, tmp_path):
    config = base[0].copy_and_resolve_references()
    loop._claim(config, tmp_path)
    config.data.streaming = False
    loop._claim(config, tmp_path)
