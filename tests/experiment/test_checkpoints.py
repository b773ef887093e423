"""What a checkpoint is without: arrays that whoever goes on reads from elsewhere."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax.experiment.checkpoints import Checkpoints, fingerprint

BIG = jnp.arange(200_000, dtype=jnp.float32).reshape(400, 500)


def saved(workdir, state, given=()):
    with contextlib.closing(Checkpoints(workdir, given)) as kept:
        kept.save(1, state)
    return sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file())


def restored(workdir, like):
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as kept:
        return kept.restore(1, like)


def state_of(kernel, other=0.0):
    return {"backbone": {"kernel": kernel, "other": jnp.full((3, 5), other)}, "round": jnp.int32(4)}


def test_what_was_given_is_not_written_and_what_changed_is(tmp_path):
    given = state_of(BIG)["backbone"]
    state = {"backbone": {**given, "other": jnp.ones((3, 5))}, "round": jnp.int32(4)}
    whole, part = saved(tmp_path / "whole", state), saved(tmp_path / "part", state, given)
    assert part < 0.1 * whole
    for name in ("whole", "part"):
        found = restored(tmp_path / name, state_of(jnp.array(BIG)))
        jax.tree.map(np.testing.assert_array_equal, found, state)


def test_an_equal_array_that_is_not_the_given_one_is_written(tmp_path):
    state = state_of(BIG)
    assert saved(tmp_path / "copy", state, [jnp.array(BIG)]) == pytest.approx(
        saved(tmp_path / "whole", state), rel=0.01
    )


def test_another_array_in_its_place_is_refused_by_name(tmp_path):
    state = state_of(BIG)
    saved(tmp_path, state, state["backbone"])
    with pytest.raises(ValueError, match="backbone/kernel is not what the run in .* began with"):
        restored(tmp_path, state_of(BIG.at[7, 11].add(1)))
    with pytest.raises(ValueError, match="of another model or method"):
        restored(tmp_path, {"backbone": {"kernel": BIG}, "round": jnp.int32(4)})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_any_change_of_one_number_is_seen(dtype):
    array = jnp.asarray(np.random.default_rng(0).normal(size=(13, 17)) * 100, dtype)
    changed = (array.at[i, j].add(jnp.ones((), dtype)) for i in range(13) for j in (0, 5, 16))
    assert int(fingerprint(array)) not in {int(fingerprint(x)) for x in changed}
    assert fingerprint(array) != fingerprint(array[::-1])


def test_until_a_checkpoint_is_there_the_two_before_it_count(tmp_path, monkeypatch):
    """A kill while it is written leaves these two, and the newer one may be damaged."""
    may_end, add = threading.Event(), Checkpoints._add_checksums
    monkeypatch.setattr(Checkpoints, "_add_checksums", lambda self: may_end.wait(60) and add(self))
    may_end.set()
    kept = Checkpoints(tmp_path)
    assert kept.oldest() == 0
    for rounds in (1, 2):
        kept.save(rounds, state_of(BIG))
    kept._manager.wait_until_finished()
    may_end.clear()
    kept.save(3, state_of(BIG))
    assert kept.oldest() == 1
    may_end.set()
    kept.close()
    assert kept.oldest() == 2
