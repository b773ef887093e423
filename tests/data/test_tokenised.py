"""Token ids are kept, and nothing stale or damaged is read."""

import warnings

import numpy as np
import pytest

from fedlora_jax.data import tokenised
from fedlora_jax.data.text import Texts

TEXTS = Texts(
    {
        "tokens": np.arange(12, dtype=np.int32).reshape(3, 4),
        "answer": np.eye(3, 4, dtype=bool),
        "label": np.array([0, 0.5, 1], np.float32),
    },
    ("ann", "b\u00f6b"),
    ("all",),
)


@pytest.fixture
def made():
    return []


def keep(directory, recipe, made, said=()):
    def make():
        made.append(recipe)
        for message in said:
            warnings.warn(message, stacklevel=1)
        return TEXTS

    found = tokenised.kept(directory, recipe, make)
    assert found[1:] == TEXTS[1:] and found.arrays.keys() == TEXTS.arrays.keys()
    for name, array in TEXTS.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype
    return found


def test_it_is_made_once_for_each_recipe(tmp_path, made):
    recipes = [{"a": 1, "b": [2, None]}, {"a": 2, "b": [2, None]}]
    for recipe in recipes + recipes[::-1]:
        keep(tmp_path, dict(reversed(recipe.items())), made)
    assert made == recipes and len(list((tmp_path / "tokenised").iterdir())) == 2


def test_what_was_said_is_said_again(tmp_path, made):
    for _ in range(2):
        with pytest.warns(UserWarning) as given:
            keep(tmp_path, {}, made, ["two are cut", "one is bad"])
        assert [str(x.message) for x in given] == ["two are cut", "one is bad"]
    assert len(made) == 1


DAMAGES = [lambda x: x[:-40], lambda x: b"", lambda x: x[:99] + b"!" + x[100:]]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(tmp_path, made, damage):
    keep(tmp_path, {}, made)
    (path,) = (tmp_path / "tokenised").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match="is damaged, and made anew"):
        keep(tmp_path, {}, made)
    assert len(made) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep(tmp_path, {}, made)
    assert len(made) == 2


def test_where_nothing_can_be_written_nothing_is_lost(tmp_path, made, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="made anew next time"):
        keep(tmp_path / "file", {}, made)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="No space left"):
        keep(tmp_path, {}, made)
    assert len(made) == 2 and not list((tmp_path / "tokenised").iterdir())
