import subprocess
import sys

import numpy as np
import pytest

from fedlora_jax.data import sources
from fedlora_jax.data.builders import digits_domains
from fedlora_jax.data.builders.digits_domains import DOMAINS, SPLIT_SIZES, DigitsDomains


@pytest.fixture(scope="module")
def splits(data_dir):
    return {split: sources.load("digits_domains", split, data_dir) for split in SPLIT_SIZES}


def test_splits_share_no_source_image_and_use_all(splits):
    ids = [set(examples["image_id"].tolist()) for examples in splits.values()]
    assert [len(each) for each in ids] == list(SPLIT_SIZES.values())
    assert set.union(*ids) == set(range(1797))  # disjoint, as the sizes add up to this


def test_validation_came_out_of_the_federated_images_of_version_1():
    """So that a backbone pretrained on version 1 has seen no image of the other splits."""
    from sklearn.datasets import load_digits

    labels = load_digits().target
    now = digits_domains._split(labels)
    before = digits_domains._stratified_split(labels, [600, 997, 200], digits_domains.SEED)
    both = np.sort(np.concatenate([now["federated"], now["validation"]]))
    for mine, old in zip((now["pretrain"], both, now["test"]), before, strict=True):
        np.testing.assert_array_equal(mine, old)


@pytest.mark.parametrize("split", ["federated", "validation", "test"])
def test_every_source_image_is_drawn_once_in_every_domain(splits, split):
    examples = splits[split]
    drawn = set(zip(examples["image_id"].tolist(), examples["domain"].tolist(), strict=True))
    assert len(drawn) == len(examples["label"]) == 6 * SPLIT_SIZES[split]
    assert {domain for _, domain in drawn} == set(range(6))


def test_pretraining_sees_the_first_domain_only(splits):
    assert np.unique(splits["pretrain"]["domain"]).tolist() == [0]


def test_splits_are_alike_in_their_labels(splits):
    shares = [np.bincount(each["label"], minlength=10) for each in splits.values()]
    shares = np.array([share / share.sum() for share in shares])
    np.testing.assert_allclose(shares, shares[:1].repeat(4, axis=0), atol=0.01)


def test_labels_are_those_of_the_source(splits):
    from sklearn.datasets import load_digits

    target = load_digits().target
    for examples in splits.values():
        np.testing.assert_array_equal(examples["label"], target[examples["image_id"]])


def test_domains_differ_and_use_the_range_of_a_pixel(splits):
    examples = splits["test"]
    order = np.lexsort((examples["domain"], examples["image_id"]))
    images = examples["image"][order].reshape(-1, 6, 16 * 16).astype(float)
    for i in range(6):
        assert np.ptp(images[:, i]) > 200
        for j in range(i):
            assert np.abs(images[:, i] - images[:, j]).mean() > 10
    np.testing.assert_allclose(images[:, 0] + images[:, 1], 255)


def test_an_image_never_changes():
    image = np.linspace(0, 1, 256).reshape(16, 16)
    for domain in DOMAINS:
        first, again = (digits_domains.draw(image, domain, 7) for _ in range(2))
        np.testing.assert_array_equal(first, again)
    other = digits_domains.draw(image, "noisy", 8)
    assert not np.array_equal(other, digits_domains.draw(image, "noisy", 7))


def test_two_builds_write_the_same_bytes(splits, data_dir, tmp_path):
    builder = DigitsDomains(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    first = {path.name: path for path in data_dir.rglob("*array_record*")}
    again = {path.name: path for path in tmp_path.rglob("*array_record*")}
    assert first.keys() == again.keys() and len(first) == 4
    for name in first:
        assert first[name].read_bytes() == again[name].read_bytes()


def test_tensorflow_is_not_needed_and_nothing_is_printed(tmp_path):
    program = """
import sys
from fedlora_jax.data import sources
sources.load("digits_domains", "test", sys.argv[1])
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_full_name_has_the_version(data_dir):
    """What is made from the data, a backbone, is kept under a name that changes with it."""
    expected = f"digits_domains/{DigitsDomains.VERSION}"
    assert sources.full_name("digits_domains", data_dir) == expected
