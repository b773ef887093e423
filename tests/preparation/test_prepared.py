"""Public data sets through preparation, reading and a step of training; takes TensorFlow."""

import hashlib

import pytest

pytest.importorskip("tensorflow")

import tensorflow_datasets as tfds

from fedlora_jax.data import preparation, sources
from fedlora_jax.data.builders import fgvc_aircraft
from tests.preparation import published
from tests.preparation.checks import read, serve, train

NAMES = [name for name in published.WRITERS if preparation.DATA_SETS[name].tensorflow]


def make(name, tmp_path, monkeypatch):
    """Writes and prepares a small data set; the numbers of its examples, and what was reported."""
    files, lines = tmp_path / "files", []
    files.mkdir()
    counts = published.WRITERS[name](files)
    if name == "fgvc_aircraft":
        content = (files / "fgvc-aircraft-2013b.tar.gz").read_bytes()
        monkeypatch.setattr(fgvc_aircraft, "MD5", hashlib.md5(content).hexdigest())
    serve(monkeypatch, files)
    parts = [f"{name}/{part}" for part in sources.DOMAINS.get(name, ())] or [name]
    expected = {part: counts for part in parts}
    preparation.prepare(name, tmp_path / "data", examples=expected, report=lines.append)
    return counts, lines


@pytest.mark.parametrize("name", NAMES)
def test_it_is_prepared_read_and_trained_on(name, tmp_path, monkeypatch):
    counts, lines = make(name, tmp_path, monkeypatch)
    domains = len(sources.DOMAINS.get(name, [0]))
    for split, count in counts.items():
        arrays = read(name, split, tmp_path / "data")
        assert len(arrays["label"]) == count * domains
        assert not {"segmentation_mask", "file_name", "id"} & set(arrays)
        train(arrays)
    assert sum("downloading" in line for line in lines) == domains
    lines.clear()
    preparation.prepare(name, tmp_path / "data", examples={}, report=lines.append)
    assert not any("downloading" in line for line in lines)
    if name == "domainnet":
        check_domains(tmp_path / "data")


def check_domains(data):
    arrays = sources.load("domainnet", "train", data, size=16, classes=100)
    assert set(arrays["label"].tolist()) == {0, 1}  # not 100, not 344
    assert arrays["domain"].tolist() == sorted(arrays["domain"].tolist())
    assert set(arrays["domain"].tolist()) == set(range(6))
    assert tuple(sources.class_names("domainnet", "domain", data)) == published.DOMAINS
    assert len(sources.class_names("domainnet", "label", data)) == 345
    assert sources.full_name("domainnet", data) == "domainnet/1.0.0"
    assert "domain" not in sources.load("domainnet/real", "train", data, size=16)


def test_another_archive_is_refused(tmp_path, monkeypatch):
    published.write_fgvc_aircraft(tmp_path)
    serve(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="has the MD5 sum .* the published file d4acdd"):
        preparation.prepare("fgvc_aircraft", tmp_path / "data", report=lambda _: None)


def test_a_file_fetched_by_hand_is_checked(tmp_path):
    """By the checksum that TFDS has recorded: the small file is not the published one."""
    published.write_cifar10(tmp_path)
    with pytest.raises(ValueError, match="wrong checksum(.|\n)*prepare cifar10 again"):
        preparation.prepare(
            "cifar10", tmp_path / "data", manual_dir=tmp_path, report=lambda _: None
        )


def test_a_server_that_does_not_answer(tmp_path, monkeypatch):
    def fail(*_):
        raise ConnectionError("no answer")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", fail)
    with pytest.raises(OSError, match="no answer.*fetch cars_test.tgz, .*cars_train.tgz"):
        preparation.prepare("cars196", tmp_path, report=lambda _: None)


def test_an_archive_cut_short_is_named(tmp_path, monkeypatch):
    published.write_domainnet(tmp_path)
    serve(monkeypatch, tmp_path)
    path = tmp_path / "real.zip"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="extracting .*real.zip(.|\n)*prepare domainnet/real"):
        preparation.prepare("domainnet/real", tmp_path / "data", report=lambda _: None)
