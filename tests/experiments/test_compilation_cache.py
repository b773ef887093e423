"""Where the programs keep what they compile; `test_programs` sees that a second start finds it."""

import jax
import pytest

from experiments.shared import apps

NAMES = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """The directory that a flag leads to, in a home that is new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before = {name: jax.config.values[name] for name in NAMES}

    def directory(wanted=None, already=None, enabled=True):
        jax.config.update("jax_compilation_cache_dir", already)
        jax.config.update("jax_enable_compilation_cache", enabled)
        apps.keep_compiled(wanted)
        return jax.config.values["jax_compilation_cache_dir"]

    yield directory
    for name, value in before.items():
        jax.config.update(name, value)


def test_one_switch_moves_it_and_turns_it_off(kept, tmp_path):
    assert kept(wanted="off", already=str(tmp_path)) is None
    assert kept(enabled=False) is None
    assert kept(already="elsewhere") == "elsewhere"
    assert not list(tmp_path.iterdir())
    assert kept(wanted=str(tmp_path / "mine"), already="elsewhere") == str(tmp_path / "mine")
    home = kept()
    assert home.startswith(str(tmp_path / "home" / "fedlora_jax" / "compiled")) and kept() == home


def test_a_place_that_cannot_be_written_stops_nothing(kept, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert kept(wanted=str(tmp_path / "file")) is None
    assert "Compiled programs are not kept" in caplog.text
