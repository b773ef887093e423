"""A run that goes on from damaged files: the same numbers, or an error that says what is wrong."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.lib import recfunctions

from fedlora_jax import experiment, locks
from fedlora_jax.checksums import Damaged
from fedlora_jax.experiment import chunking, finished, partitions, records
from tests.damage import cut, flip

ROUNDS = 4


@pytest.fixture(scope="module")
def world(digits, tmp_path_factory):
    """A configuration of a method that keeps clients' states, its program, and a finished run."""
    digits.rounds = ROUNDS
    digits.method = "fedsa_lora"
    digits.lora.rank = 2
    digits.clients_per_chunk = "auto"
    digits.local.schedule = "constant"
    setting = experiment.prepare(digits)
    workdir = tmp_path_factory.mktemp("resuming") / "run"
    return digits, setting, experiment.compile_program(digits, setting), workdir


@pytest.fixture(scope="module")
def whole(world):
    config, setting, program, workdir = world
    return experiment.run(config, setting, program, workdir)


@pytest.fixture
def copy(world, whole, tmp_path):
    return Path(shutil.copytree(world[3], tmp_path / "run"))


def run(world, workdir, rounds=ROUNDS):
    config = world[0].copy_and_resolve_references()
    config.rounds = rounds
    return without_seconds(experiment.run(config, world[1], world[2], workdir))


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def largest(directory: Path) -> Path:
    return max(directory.rglob("d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
@pytest.mark.parametrize(
    "what", ["checkpoint", "manifest", "checksums", "clients", "metrics", "backup"]
)
def test_what_is_damaged_is_made_again_or_mended(world, whole, copy, harm, what):
    newest = copy / "checkpoints" / str(ROUNDS)
    path = {
        "checkpoint": largest(newest),
        "manifest": newest / "default" / "manifest.ocdbt",
        "checksums": newest / "checksums.json",
        "clients": copy / "clients" / f"{ROUNDS - 1:06d}.npy",
        "metrics": copy / "metrics.jsonl",
        "backup": copy / "metrics.backup",
    }[what]
    harm(path)
    unseen = harm is Path.unlink and what in ("checksums", "metrics", "backup")
    if unseen:  # As an older version left it, or mended from the other.
        assert run(world, copy) == without_seconds(whole)
    else:
        with pytest.warns(UserWarning, match="same results|is mended"):
            assert run(world, copy) == without_seconds(whole)
        assert list((copy / "damaged").iterdir())
    for name in ("metrics.jsonl", "adapters.npz"):
        assert (copy / name).exists()
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert without_seconds(rows) == without_seconds(whole)
    a, b = (records.load_trainable(path / "adapters.npz") for path in (copy, world[3]))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_where_nothing_sound_is_left_the_error_says_so_and_nothing_is_changed(world, copy):
    for rounds in (ROUNDS - 1, ROUNDS):
        flip(largest(copy / "checkpoints" / str(rounds)))
    before = sorted(copy.rglob("*"))
    with pytest.raises(Damaged, match="no checkpoint of .* can be used: .* begin anew"):
        run(world, copy)
    assert [path for path in sorted(copy.rglob("*")) if path.name != ".lock"] == [
        path for path in before if path.name != ".lock"
    ]


def test_states_of_clients_that_nothing_else_has(world, copy):
    flip(min((copy / "clients").iterdir()))
    with pytest.raises(Damaged, match=r"clients/00000\d\.npy is damaged"):
        run(world, copy)
    min((copy / "clients").iterdir()).unlink()
    with pytest.raises(Damaged, match="lacks the states that . clients had after round"):
        run(world, copy)


def test_lines_that_are_lost_in_both_files_are_an_error(world, copy):
    (copy / "metrics.backup").unlink()
    path = copy / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\xff" + lines[1][1:], *lines[2:]]))
    before = path.read_bytes()
    with pytest.raises(Damaged, match="the line of round 1 is missing or cannot be read"):
        run(world, copy)
    assert path.read_bytes() == before


def test_a_bit_in_a_number_of_the_metrics_is_seen(world, whole, copy):
    path = copy / "metrics.jsonl"
    text = path.read_text()
    place = text.index('"loss": ') + len('"loss": ') + 3
    path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    assert without_seconds(records.read_metrics(copy)) == without_seconds(whole)


def test_a_bit_in_the_number_of_a_line_is_seen(world, whole, copy):
    """0 becomes 4, or 8, a round that is not there."""
    path = copy / "metrics.jsonl"
    text = path.read_text()
    for number in (4, 8):
        path.write_text(text.replace('"round": 0', f'"round": {number}', 1))
        assert without_seconds(records.read_metrics(copy)) == without_seconds(whole)


def test_a_line_whose_backup_was_not_written_any_more_counts(world, whole, copy):
    """A kill between the two."""
    cut_short = (copy / "metrics.backup").read_bytes()[:-9]
    (copy / "metrics.backup").write_bytes(cut_short)
    assert without_seconds(records.read_metrics(copy)) == without_seconds(whole)


def test_checkpoints_that_are_gone_are_missed(world, whole, copy):
    shutil.move(copy / "checkpoints", copy / "elsewhere")
    before = {path: path.read_bytes() for path in copy.glob("*.jsonl")}
    with pytest.raises(Damaged, match=f"has the metrics of {ROUNDS} rounds, but .*/checkpoints is"):
        run(world, copy)
    assert {path: path.read_bytes() for path in copy.glob("*.jsonl")} == before
    # As a kill leaves it, before the first one is there.
    (copy / "checkpoints").mkdir()
    assert run(world, copy) == without_seconds(whole)


@pytest.mark.parametrize("name", ["config.json", "partition.json", chunking.RECORD])
def test_every_bit_of_a_small_record_is_seen(world, whole, copy, name):
    """Or does not matter."""
    config, setting, _, _ = world
    path = copy / name
    read = {
        "config.json": lambda: records.read_sealed(path),
        "partition.json": lambda: [
            part.tolist() for part in partitions.of_run(config, setting.train, copy).parts
        ],
        chunking.RECORD: lambda: records.read_sealed(path),
    }[name]
    sound, expected = path.read_bytes(), read()
    places = range(0, len(sound), 1 if name == chunking.RECORD else 1 + len(sound) // 150)
    seen = 0
    for place in places:
        flip(path, place)
        try:
            assert read() == expected or b"sha256" not in path.read_bytes()
        except ValueError as error:
            seen += 1
            assert name in str(error)
        path.write_bytes(sound)
    assert seen > len(places) / 2


@pytest.mark.parametrize("name", ["config.json", "partition.json", chunking.RECORD])
def test_a_small_record_that_is_gone_is_missed(world, copy, name):
    """Without it the run would go on, of another configuration too."""
    (copy / name).unlink()
    before = (copy / "metrics.jsonl").read_bytes()
    with pytest.raises(Damaged, match=f"{copy / name} is gone, .* from a copy; or, to begin anew"):
        run(world, copy, ROUNDS + 1)
    assert not (copy / name).exists() and (copy / "metrics.jsonl").read_bytes() == before
    if name == "config.json":
        with pytest.raises(Damaged, match="is gone"):
            experiment.check_workdir(world[0], copy)


@pytest.mark.parametrize("left", ["metrics.jsonl", "metrics.backup", "checkpoints/3/_METADATA"])
def test_a_record_is_missed_as_soon_as_a_round_is_finished(tmp_path, left):
    path = tmp_path / left
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent == tmp_path:  # As a kill leaves it, before a line is whole.
        path.write_text('{"round": ')
        records.check_not_gone(tmp_path / "config.json")
    path.write_text('{"round": 0}\n')
    with pytest.raises(Damaged, match="config.json is gone"):
        records.check_not_gone(tmp_path / "config.json")
    (tmp_path / "config.json").touch()
    records.check_not_gone(tmp_path / "config.json")


def test_every_bit_of_the_adapters_is_seen(world, whole, copy):
    path = copy / "adapters.npz"
    expected, sound, seen = records.load_trainable(path), path.read_bytes(), 0
    for place in range(0, len(sound), 7):
        flip(path, place)
        try:
            found = records.load_trainable(path)
            jax.tree.map(np.testing.assert_array_equal, found, expected)
        except ValueError:
            seen += 1
        path.write_bytes(sound)
    assert seen > len(sound) / 7 / 2


def test_a_finished_run_is_judged_by_the_state_before_a_damaged_one(world, copy):
    flip(largest(copy / "checkpoints" / str(ROUNDS)))
    with pytest.warns(UserWarning, match=f"The state after {ROUNDS - 1} rounds is taken"):
        assert finished.restore(copy).rounds == ROUNDS - 1
    assert (copy / "checkpoints" / str(ROUNDS)).is_dir()


def test_of_an_older_version_all_is_taken_as_it_is(world, whole, copy):
    (copy / "metrics.backup").unlink()
    for path in copy.glob("checkpoints/*/checksums.json"):
        path.unlink()
    for path in (copy / "clients").iterdir():
        states = np.load(path)
        fields = [name for name in states.dtype.names if name != "after_round"]
        np.save(path, recfunctions.repack_fields(states[fields]))
    config = json.loads((copy / "config.json").read_text())
    config.pop("sha256")
    (copy / "config.json").write_text(json.dumps(config))
    assert run(world, copy) == without_seconds(whole)


def test_two_runs_in_one_directory_are_refused(world, copy):
    with locks.held(copy, copy / ".lock"):
        with pytest.raises(locks.Held, match=rf"{copy} is in use by process \d+ on .* since 2"):
            run(world, copy)


def test_a_directory_that_cannot_be_written_is_named(world, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write in .*file: it is no directory"):
        run(world, tmp_path / "file")
