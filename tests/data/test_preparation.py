"""Preparation that is killed, runs out of disk, or meets bad files: of NICO++."""

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import digits
from fedlora_jax.data import preparation, sources
from fedlora_jax.data.builders import BUILDERS
from fedlora_jax.experiment import setting
from tests.preparation import published
from tests.preparation.checks import read, train

NAME = "nico_pp"


@pytest.fixture(scope="module")
def published_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published")
    return directory, published.write_nico_pp(directory)


@pytest.fixture(scope="module")
def prepared(published_files, tmp_path_factory):
    """A data directory with NICO++; not to be written to."""
    return prepare(tmp_path_factory.mktemp("prepared"), published_files)


def prepare(data, published_files, **options):
    directory, counts = published_files
    options = {"examples": {NAME: counts}, "report": lambda _: None, **options}
    preparation.prepare(NAME, data, manual_dir=directory, **options)
    return data


def is_whole(data, count):
    arrays = [sources.load(NAME, split, data, size=8) for split in ("train", "test")]
    return sum(len(each["label"]) for each in arrays) == count and not list(
        data.rglob("incomplete.*")
    )


def shards(data):
    return sorted((data / NAME).rglob("*.array_record*"))


def test_it_is_prepared_read_and_trained_on(prepared, published_files):
    splits = {split: read(NAME, split, prepared) for split in ("train", "test")}
    sizes = {split: len(arrays["label"]) for split, arrays in splits.items()}
    assert sum(sizes.values()) == published_files[1]["train+test"] and sizes["train"] > 70
    assert 0.05 < sizes["test"] / sizes["train"] < 0.6
    for arrays in splits.values():
        train(arrays)
        assert set(np.unique(arrays["domain"])) == set(range(6))
    assert np.any(np.diff(splits["train"]["label"][:20]))  # not one class after the other


def test_images_are_kept_as_published(prepared, published_files):
    builder = tfds.core.read_only_builder.builder_from_files(NAME, data_dir=prepared)
    source = builder.as_data_source("test", decoders={"image": tfds.decode.SkipDecoding()})
    for example in source:
        path = published_files[0] / "public_dg_0416/train" / example["file_name"].decode()
        assert example["image"] == path.read_bytes()


def test_two_preparations_write_the_same_bytes(prepared, published_files, tmp_path):
    again = prepare(tmp_path, published_files)
    assert [path.read_bytes() for path in shards(again)] == [
        path.read_bytes() for path in shards(prepared)
    ]


def test_a_configuration_reads_it(prepared, monkeypatch):
    monkeypatch.setenv("FEDLORA_DATA_DIR", str(prepared))
    config = digits.get_config()
    config.data.name = NAME
    config.data.statistics = "clip"
    with config.data.unlocked():
        config.data.size, config.data.classes = 8, 10
    arrays, domains = setting._load(config, "train")
    assert domains == ("autumn", "dim", "grass", "outdoor", "rock", "water")
    assert arrays["image"].shape[1:] == (8, 8, 3) and set(arrays["label"].tolist()) == {0}
    (pixels,) = setting._images(config)(arrays)
    wanted = np.array(published.colour(0)) / 255 - 0.48145466
    np.testing.assert_allclose(pixels[0, 0, 0, 0], wanted[0] / 0.26862954, atol=0.1)
    path = setting._backbone_path(config)
    config.data.size = 16
    assert setting._backbone_path(config) != path


def test_a_second_call_writes_nothing(prepared, published_files):
    lines, times = [], [path.stat().st_mtime_ns for path in shards(prepared)]
    prepare(prepared, published_files, report=lines.append)
    assert times == [path.stat().st_mtime_ns for path in shards(prepared)]
    assert any("is there" in line for line in lines)


def test_a_kill_leaves_nothing_that_is_taken_for_whole(published_files, tmp_path):
    """Killed when all files are written, but not yet renamed."""
    program = """
import os, signal, sys
import tensorflow_datasets as tfds
from fedlora_jax.data import preparation
tfds.core.DatasetInfo.write_to_directory = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
preparation.prepare(sys.argv[1], sys.argv[2], manual_dir=sys.argv[3], examples={})
"""
    directory, counts = published_files
    command = [sys.executable, "-c", program, NAME, str(tmp_path), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.rglob("incomplete.*/*.array_record*"))
    with pytest.raises(FileNotFoundError, match="is not prepared"):
        sources.load(NAME, "train", tmp_path, size=8)
    (tmp_path / "downloads" / NAME / "track_1.tmp.0a").mkdir()  # a download that was under way
    prepare(tmp_path, published_files)
    assert is_whole(tmp_path, counts["train+test"])
    assert not list(tmp_path.rglob("*.tmp.*"))


def test_a_full_disk_loses_nothing(prepared, published_files, tmp_path):
    """The limit on the size of a file stands for the disk: the same failure in the same places."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, hard))
    try:
        with pytest.raises(OSError, match="is full .*or a limit is reached.*same command again"):
            prepare(tmp_path, published_files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not shards(tmp_path)
    prepare(tmp_path, published_files)
    assert is_whole(tmp_path, published_files[1]["train+test"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_from_other_failures(published_files, tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(BUILDERS[NAME], "_files", fail)
    with pytest.raises(OSError, match="the disk of .* is full") as caught:
        prepare(tmp_path, published_files)
    assert caught.value.errno == errno.ENOSPC


def test_a_failed_download_says_what_can_be_fetched_by_hand(published_files, tmp_path, monkeypatch):
    def fail(*_):
        raise ConnectionError("no answer")

    url = {"https://host/a.zip": tfds.core.download.checksums.UrlInfo(1, "0", "a.zip")}
    monkeypatch.setattr(BUILDERS[NAME], "_files", fail)
    monkeypatch.setattr(BUILDERS[NAME], "url_infos", url)
    with pytest.raises(OSError, match="no answer.*fetch a.zip from elsewhere"):
        prepare(tmp_path, published_files)


@pytest.mark.parametrize("cut", [slice(0, None), slice(-1, None), slice(1000, 1001)])
def test_a_damaged_file_stops_and_is_made_anew(prepared, published_files, tmp_path, cut):
    prepare(tmp_path, published_files)
    path = shards(tmp_path)[-1]
    content = bytearray(path.read_bytes())
    if cut.stop:
        content[cut] = b"\xff" if content[cut] != b"\xff" else b"\x00"
    else:
        del content[cut]
    path.write_bytes(content)
    command = f"prepare_data --dataset={NAME} --data_dir={tmp_path}"
    with pytest.raises(ValueError, match=f"{path.name} is truncated or damaged(.|\n)*{command}"):
        sources.load(NAME, "train", tmp_path, size=8, on_bad_record="skip")
    lines = []
    prepare(tmp_path, published_files, report=lines.append)
    assert any("truncated or damaged" in line and "made anew" in line for line in lines)
    assert is_whole(tmp_path, published_files[1]["train+test"])


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_missing_file_is_no_whole_data_set(published_files, tmp_path, name):
    prepare(tmp_path, published_files)
    next(tmp_path.rglob(name)).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=f"prepare_data --dataset={NAME}"):
        sources.load(NAME, "train", tmp_path, size=8)
    prepare(tmp_path, published_files)
    assert is_whole(tmp_path, published_files[1]["train+test"])


def test_another_version_is_refused_with_the_command(prepared, published_files, tmp_path):
    prepare(tmp_path, published_files)
    (old,) = (tmp_path / NAME).iterdir()
    info = json.loads((old / "dataset_info.json").read_text())
    (old / "dataset_info.json").write_text(json.dumps({**info, "version": "0.9.0"}))
    old.rename(old.with_name("0.9.0"))
    command = f"prepare_data --dataset={NAME} --data_dir={tmp_path}"
    with pytest.raises(ValueError, match=f"in version 0.9.0, but .* knows 1.0.0(.|\n)*{command}"):
        sources.load(NAME, "train", tmp_path, size=8)
    prepare(tmp_path, published_files)
    assert sources.full_name(NAME, tmp_path) == f"{NAME}/1.0.0"
    assert (tmp_path / NAME / "0.9.0").exists()
    (tmp_path / NAME / "0.9.0").rename(tmp_path / NAME / "2.0.0")  # newer than this code
    info["version"] = "2.0.0"
    (tmp_path / NAME / "2.0.0" / "dataset_info.json").write_text(json.dumps(info))
    assert sources.full_name(NAME, tmp_path) == f"{NAME}/1.0.0"


def test_a_bad_file_stops_or_is_skipped_and_counted(tmp_path):
    published.write_nico_pp(tmp_path / "files", each=1)
    files = sorted((tmp_path / "files").rglob("*.jpg"))
    bad = {files[0]: b"no image", files[1]: files[1].read_bytes()[:-200]}
    for path, content in bad.items():
        path.write_bytes(content)
    found = (tmp_path / "files", {"train+test": len(files)})
    with pytest.raises(ValueError, match=f"{files[0]}: not an image of a format"):
        prepare(tmp_path / "data", found)
    assert not (tmp_path / "data" / NAME / "1.0.0").exists()
    lines = []
    with pytest.warns(UserWarning, match=f"skipped 2 bad records: .*{files[1].name}"):
        prepare(tmp_path / "data", found, on_bad_record="skip", report=lines.append)
    assert any(f"{2} skipped" in line for line in lines)
    assert is_whole(tmp_path / "data", len(files) - 2)
    prepare(tmp_path / "data", found)  # those skipped are counted still


def test_numbers_of_examples_are_checked(prepared, published_files):
    with pytest.raises(ValueError, match=r"train\+test 108 examples, published are .* 88,866"):
        prepare(prepared, published_files, examples=preparation.EXAMPLES)


def test_a_class_that_is_none_is_named(tmp_path):
    published.write_nico_pp(tmp_path, each=1)
    folder = tmp_path / "public_dg_0416/train/dim"
    (folder / "wolf").rename(folder / "wolfs")
    with pytest.raises(ValueError, match="unknown class in .*dim: 'wolfs'. Did you mean 'wolf'"):
        prepare(tmp_path / "data", (tmp_path, {}))


def test_what_has_to_be_fetched_by_hand_is_said(tmp_path):
    place = tmp_path / "downloads" / "manual" / NAME
    with pytest.raises(FileNotFoundError, match=f"track_1.zip.*Here is {place}"):
        preparation.prepare(NAME, tmp_path, report=lambda _: None)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileNotFoundError, match="no folder public_dg_0416/train"):
        preparation.prepare(NAME, tmp_path, manual_dir=tmp_path / "other", report=lambda _: None)


def test_two_processes_do_not_prepare_the_same(published_files, tmp_path):
    lock = tmp_path / "downloads" / NAME / ".lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="prepared by another process"):
            prepare(tmp_path, published_files)


def test_only_what_takes_tensorflow_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"cifar10 takes TensorFlow: pip install .*\[prepare\]"):
        preparation.prepare("cifar10", tmp_path, report=lambda _: None)
    with pytest.raises(FileNotFoundError, match="nico_pp has to be fetched by hand"):
        preparation.prepare(NAME, tmp_path, report=lambda _: None)


def test_an_embedded_data_set_is_prepared_as_all_others(data_dir):
    lines = []
    preparation.prepare("digits_domains", data_dir, report=lines.append)
    assert "pretrain 600, federated 4,782" in lines[-1]


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'cifar100'"):
        preparation.prepare("cifar-100", tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'glue/qnli'"):
        preparation.prepare("glue/qnl", tmp_path)
    with pytest.raises(ValueError, match="Valid names: .*glue/cola.*glue/sst2"):
        preparation.prepare("glue", tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'skip'"):
        preparation.prepare("cifar100", tmp_path, on_bad_record="skp")


def test_the_table_has_every_builder_of_ours_and_every_number():
    assert set(BUILDERS) <= set(preparation.DATA_SETS)
    assert {name.partition("/")[0] for name in preparation.EXAMPLES} == set(preparation.DATA_SETS)
    parts = {f"{name}/{part}" for name, domains in sources.DOMAINS.items() for part in domains}
    assert parts <= set(preparation.EXAMPLES)
    for row in preparation.table():
        assert all(row)
