"""A folder of images."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import image_folder as configuration
from fedlora_jax.data import image_folder
from fedlora_jax.data.bad_records import BadRecord
from fedlora_jax.data.held_out import split_of
from fedlora_jax.experiment import partitions, setting

HELD_OUT = {"validation": 0.2, "test": 0.3}
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def write(root, domains, count=30):
    """Squares whose colour is their class and a pixel their number, with a border by domain."""
    for number, domain in enumerate(domains):
        for label, colour in COLOURS.items():
            folder = root / domain / label
            folder.mkdir(parents=True)
            for i in range(count):
                square = Image.new("RGB", (8, 8), colour)
                square.putpixel((0, 0), (number, i, i))
                image = Image.new("RGB", (8, 8 + 2 * number))
                image.paste(square, (0, number))
                image.save(folder / f"{i:03}.png")
    return root


@pytest.mark.parametrize("domains", [("",), ("one", "two")])
def test_a_folder_is_what_its_folders_say(tmp_path, domains):
    root = write(tmp_path, domains)
    known = [name for name in domains if name]
    assert image_folder.class_names(root) == ["blue", "red"]
    assert image_folder.class_names(root, "domain") == known
    count = 0
    for split in ("federated", *HELD_OUT):
        arrays = image_folder.load(split, root, size=8, held_out=HELD_OUT)
        images, labels = arrays["image"], arrays["label"]
        count += len(images)
        assert images.shape[1:] == (8, 8, 3) and images.dtype == np.uint8
        assert labels.dtype == np.int32
        # The middle of the image, of whatever shape it is.
        wanted = np.array([COLOURS[["blue", "red"][label]] for label in labels])
        np.testing.assert_array_equal(images[:, 4, 4], wanted)
        assert ("domain" in arrays) == bool(known)
    assert count == len(domains) * 60


def test_equal_files_are_in_one_split(tmp_path):
    root = write(tmp_path, ("one", "two"))
    for path in sorted(root.rglob("*.png")):
        path.with_name(f"copy_{path.name}").write_bytes(path.read_bytes())
    sets = [
        {x.tobytes() for x in image_folder.load(s, root, size=8, held_out=HELD_OUT)["image"]}
        for s in ("federated", *HELD_OUT)
    ]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]


def test_shares():
    shares = {"a": 0.25, "b": 0.5}
    found = [split_of(str(i).encode(), shares) for i in range(4000)]
    for name, share in {**shares, "federated": 0.25}.items():
        assert abs(found.count(name) / 4000 - share) < 0.03
    for bad in ({"a": -0.1}, {"a": 0.6, "b": 0.4}):
        with pytest.raises(ValueError, match="leave a rest"):
            split_of(b"", bad)


def test_the_digest_is_of_places_and_contents(tmp_path):
    root = write(tmp_path, ("",), count=2)
    before = image_folder.digest(root)
    assert before == image_folder.digest(root)
    path = root / "red" / "000.png"
    path.rename(root / "red" / "new.png")
    moved = image_folder.digest(root)
    Image.new("RGB", (8, 8)).save(root / "red" / "new.png")
    assert len({before, moved, image_folder.digest(root)}) == 3


def test_a_file_is_hashed_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    root = write(tmp_path, ("one", "two"), count=4)
    paths = sorted(root.rglob("*.png"))
    for path in paths:
        os.utime(path, (1e9, 1e9))
    read = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    before = image_folder.digest(root)
    assert sorted(read) == paths
    for split in ("federated", *HELD_OUT):
        image_folder.load(split, root, size=8, held_out=HELD_OUT)
    # Once more, to be decoded.
    assert image_folder.digest(root) == before and sorted(read) == sorted(paths * 2)
    digests = {before}
    for last in (b"1", b"2"):  # in the same moment, perhaps
        paths[0].write_bytes(paths[0].read_bytes()[:-1] + last)
        digests.add(image_folder.digest(root))
    assert len(digests) == 3


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image in .*root/class/image.png"):
        image_folder.class_names(tmp_path)
    root = write(tmp_path / "x", ("",), count=3)
    with pytest.raises(ValueError, match="unknown split 'tests'. Did you mean 'test'"):
        image_folder.load("tests", root, size=8, held_out=HELD_OUT)
    with pytest.raises(ValueError, match="no image .* is in the split 'validation'"):
        image_folder.load("validation", root, size=8, held_out={"validation": 0.0})
    (root / "red" / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="bad.png is not an image that can be read"):
        image_folder.load("federated", root, size=8, held_out={})
    with pytest.warns(UserWarning, match="skipped 1 bad record: .*bad.png"):
        found = image_folder.load("federated", root, size=8, held_out={}, on_bad_record="skip")
    assert len(found["image"]) == len(found["label"]) == 6
    (root / "red" / "bad.png").rename(root / "bad.png")
    with pytest.raises(ValueError, match="lies elsewhere than"):
        image_folder.class_names(root)


def test_links_to_nothing_are_bad_records(tmp_path):
    root = write(tmp_path / "x", ("",), count=3)
    whole = image_folder.digest(root)
    (root / "red" / "lost.png").symlink_to(tmp_path / "nothing.png")
    for read in (image_folder.load, image_folder.stored):
        with pytest.raises(BadRecord, match="lost.png cannot be read: No such file"):
            read("federated", root, size=8, held_out={})
    with pytest.warns(UserWarning, match="skipped 1 bad record: .*lost.png"):
        found = image_folder.load("federated", root, size=8, held_out={}, on_bad_record="skip")
    assert len(found["label"]) == 6
    assert image_folder.digest(root) != whole


def test_images_of_16_bits_are_turned_upright_and_of_32_are_bad(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2**16, (8, 8), np.uint16)
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png", exif=exif)
    (image,) = image_folder.load("federated", tmp_path, size=8, held_out={})["image"]
    np.testing.assert_array_equal(image[..., 1], np.rot90(pixels >> 8, -1))
    Image.fromarray(pixels / np.float32(2**16)).save(tmp_path / "a" / "1.tif")
    with pytest.raises(BadRecord, match="1.tif is not an image that can be read: pixels of 32 bit"):
        image_folder.load("federated", tmp_path, size=8, held_out={})


def test_every_picture_that_pillow_reads_is_found_and_others_are_counted(tmp_path):
    root = write(tmp_path / "x", ("",), count=1)
    image = Image.new("RGB", (8, 8))
    for suffix in ("ppm", "jp2", "TGA", "qoi"):
        image.save(root / "red" / f"1.{suffix}")
    for hidden in (".DS_Store", "Thumbs.db"):
        (root / "red" / hidden).touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = image_folder.load("federated", root, size=8, held_out={})
    assert len(found["label"]) == 6
    image.save(root / "blue" / "1.eps")
    (root / "notes.txt").touch()
    with pytest.warns(UserWarning, match=r"2 files in .* no images .* first .*blue/1.eps"):
        assert image_folder.class_names(root) == ["blue", "red"]
    # What a file is called does not make Pillow start Ghostscript either.
    (root / "blue" / "1.eps").rename(root / "blue" / "1.png")
    with pytest.raises(ValueError, match="blue/1.png is not an image that can be read"):
        image_folder.load("federated", root, size=8, held_out={})
    for path in root.glob("*/*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no image in .*, only files ending in \.txt: "):
        image_folder.class_names(root)


def test_links_to_folders_are_followed(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", ("",), count=2)
    root = tmp_path / "root"
    root.mkdir()
    (elsewhere / "red").rename(root / "red")
    (root / "blue").symlink_to(elsewhere / "blue")
    (root / "azure").symlink_to(elsewhere / "blue")
    (root / "red" / "round").symlink_to(root)
    assert image_folder.class_names(root) == ["azure", "blue", "red"]
    assert len(image_folder.load("federated", root, size=8, held_out={})["label"]) == 6


def test_images_in_no_folder_of_a_class(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(
        ValueError, match=f"{tmp_path}/0.png .* expected: {tmp_path}/CLASS/0.png or"
    ):
        image_folder.class_names(tmp_path)
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (tmp_path / "0.png").rename(deep / "0.png")
    with pytest.raises(ValueError, match=f"{tmp_path}/DOMAIN/CLASS/0.png"):
        image_folder.class_names(tmp_path)


def test_a_configuration_without_a_folder():
    with pytest.raises(ValueError, match="root=DIR"):
        configuration.get_config("size=32")


def test_patches_tile_images_of_any_size(tmp_path):
    root = write(tmp_path / "images", ("",), count=1)
    for size, patch in ((8, 1), (16, 2), (28, 2), (32, 4), (50, 5), (100, 10), (7, 1)):
        config = configuration.get_config(f"root={root},size={size}")
        assert config.model.options.patch_size == patch


def test_a_configuration_is_prepared(tmp_path):
    root = write(tmp_path / "images", ("one", "two"))
    config = configuration.get_config(f"root={root},size=8,clients=4,runlocal")
    config.backbone_dir = str(tmp_path / "backbones")
    config.pretraining.options.steps = 1
    config.model.options.update(width=8, depth=1, num_heads=2)
    made = setting.prepare(config)
    assert made.domains == ("one", "two") and made.train["image"].shape[1:] == (8, 8, 3)
    assert len(partitions.draw(config, made.train, 0)) == 4
    first = setting._backbone_path(config)
    Image.new("RGB", (8, 8)).save(root / "one" / "red" / "more.png")
    assert setting._backbone_path(config) != first
    pretrained = configuration.get_config(f"root={root},source=somewhere")
    assert pretrained.model.options.num_classes == 2 and "pretraining" not in pretrained


@pytest.mark.parametrize("domains", [("",), ("one", "two")])
def test_images_can_stay_in_their_files(tmp_path, domains):
    root = write(tmp_path, domains, count=8)
    loaded = image_folder.load("federated", root, size=6, held_out=HELD_OUT)
    stored = image_folder.stored("federated", root, size=6, held_out=HELD_OUT)
    np.testing.assert_array_equal(
        [stored.image(i) for i in range(len(loaded["label"]))], loaded.pop("image")
    )
    assert loaded.keys() == stored.columns.keys()
    for name, values in loaded.items():
        np.testing.assert_array_equal(stored.columns[name], values)
    for path in root.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"\.png is not an image"):
        stored.image(0)
