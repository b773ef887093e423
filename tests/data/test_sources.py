import io
import re
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fedlora_jax.data import sources
from fedlora_jax.data.builders import BUILDERS
from fedlora_jax.data.decoding import decode


def _image(i, size=4):
    return np.full((size, size, 3), 10 * i, np.uint8)


class ToyImages(tfds.core.GeneratorBasedBuilder):
    """Images stored as PNG, as the public data sets have them."""

    VERSION = tfds.core.Version("1.0.0")
    SIZES = (4, 4, 4)
    url_infos = {}

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "id": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, size in enumerate(self.SIZES):
            png = io.BytesIO()
            Image.fromarray(_image(i, size)).save(png, "png")
            png.seek(0)
            yield i, {"image": png, "label": i % 2, "id": f"number {i}"}


class RaggedImages(ToyImages):
    """The same in different sizes."""

    SIZES = (4, 5)


def _prepare(builder_type, data_dir, file_format="array_record"):
    builder_type(data_dir=data_dir, file_format=file_format).download_and_prepare()


def test_prepared_data_set_is_read_without_its_builder(tmp_path):
    _prepare(ToyImages, tmp_path)
    examples = sources.load("toy_images", "train", tmp_path)
    assert set(examples) == {"image", "label"}  # text is left out
    np.testing.assert_array_equal(examples["image"], np.stack([_image(i) for i in range(3)]))
    assert examples["image"].dtype == np.uint8
    assert examples["label"].dtype == np.int32 and examples["label"].tolist() == [0, 1, 0]
    assert len(sources.load("toy_images", "train[:2]", tmp_path)["label"]) == 2


def test_class_names(tmp_path, data_dir):
    _prepare(ToyImages, tmp_path)
    assert sources.class_names("toy_images", data_dir=tmp_path) == ["cat", "dog"]
    domains = sources.class_names("digits_domains", "domain", data_dir)
    assert domains == ["original", "inverted", "transposed", "sheared", "outlined", "noisy"]
    with pytest.raises(ValueError, match="Did you mean 'label'"):
        sources.class_names("toy_images", "labels", tmp_path)


def test_images_of_unequal_size_are_refused(tmp_path):
    _prepare(RaggedImages, tmp_path)
    with pytest.raises(ValueError, match="'ragged_images' differ in the shape of 'image'"):
        sources.load("ragged_images", "train", tmp_path)
    resized = sources.load("ragged_images", "train", tmp_path, size=8)["image"]
    np.testing.assert_array_equal(resized, np.stack([_image(i, 8) for i in range(2)]))


def test_images_are_resized_whole_by_bicubic_interpolation(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    found = decode(file.getvalue(), size=12)
    wanted = Image.fromarray(pixels).resize((12, 12), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(found, np.asarray(wanted))
    gray = decode(file.getvalue(), channels=1)
    assert gray.shape == (20, 30, 1)


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm", "jpeg2000"])
def test_of_16_bits_the_upper_8_are_kept(kind):
    pixels = np.random.default_rng(0).integers(0, 2**16, (20, 30), np.uint16)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    np.testing.assert_array_equal(decode(file.getvalue())[..., 0], pixels >> 8)
    np.testing.assert_array_equal(decode(file.getvalue(), channels=None)[..., 0], pixels >> 8)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_an_image_of_unknown_range_is_refused(kind):
    file = io.BytesIO()
    Image.fromarray(np.ones((4, 4), kind)).save(file, "tiff")
    with pytest.raises(ValueError, match=r"pixels of 32 bits \(mode [IF]\).* 8 or 16 bits"):
        decode(file.getvalue())


def test_the_first_classes_are_kept(tmp_path):
    _prepare(ToyImages, tmp_path)
    examples = sources.load("toy_images", "train", tmp_path, classes=1)
    assert examples["label"].tolist() == [0, 0] and examples["image"][1, 0, 0, 0] == 20
    with pytest.raises(ValueError, match="3 classes are wanted of .*, which has 2"):
        sources.load("toy_images", "train", tmp_path, classes=3)


def test_there_has_to_be_an_image_to_resize(data_dir):
    with pytest.raises(ValueError, match="'digits_domains' has no image files"):
        sources.load("digits_domains", "test", data_dir, size=8)


class BadImages(ToyImages):
    """Five records: the second is no image, the third cut short, the fourth of no class."""

    def _generate_examples(self):
        whole = io.BytesIO()
        Image.fromarray(_image(1)).save(whole, "png")
        contents = [whole.getvalue(), b"no image", whole.getvalue()[:40]] + [whole.getvalue()] * 2
        for i, content in enumerate(contents):
            label = -1 if i == 3 else 1
            yield i, {"image": io.BytesIO(content), "label": label, "id": ""}


def test_bad_records_stop_or_are_skipped_and_counted(tmp_path):
    _prepare(BadImages, tmp_path)
    place = "bad_images-train.array_record-00000-of-00001: record 1 of split 'train[:3]'"
    with pytest.raises(ValueError, match=re.escape(place) + ": not an image of a format"):
        sources.load("bad_images", "train[:3]", tmp_path)
    with pytest.raises(ValueError, match="record 3 .*: label -1 is not a class, 0 to 1"):
        sources.load("bad_images", "train[3:]", tmp_path)
    with pytest.warns(UserWarning, match="skipped 3 bad records: .*record 1.*record 2.*record 3"):
        examples = sources.load("bad_images", "train", tmp_path, on_bad_record="skip")
    assert len(examples["image"]) == len(examples["label"]) == 2
    with pytest.raises(ValueError, match="unknown on_bad_record 'skp'. Did you mean 'skip'"):
        sources.load("bad_images", "train", tmp_path, on_bad_record="skp")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="is empty"):
        sources.load("bad_images", "train[1:2]", tmp_path, on_bad_record="skip")


def test_files_of_another_format_are_refused(tmp_path):
    _prepare(ToyImages, tmp_path)
    info = next(tmp_path.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="file format FileFormat.TFRECORD is not supported"):
        sources.load("toy_images", "train", tmp_path)


def test_unprepared_data_set_names_the_command(tmp_path):
    command = f"python -m experiments.prepare_data --dataset=cifar100 --data_dir={tmp_path}"
    with pytest.raises(FileNotFoundError, match=re.escape(command)):
        sources.load("cifar100", "train", tmp_path)


def test_unknown_names(tmp_path, data_dir):
    with pytest.raises(ValueError, match="Did you mean 'digits_domains'"):
        sources.load("digit_domain", "train", tmp_path)
    with pytest.raises(ValueError, match="pretrain.*federated.*test"):
        sources.load("digits_domains", "train", data_dir)


def test_directory_comes_from_the_environment(tmp_path, monkeypatch):
    _prepare(ToyImages, tmp_path)
    monkeypatch.setenv("FEDLORA_DATA_DIR", str(tmp_path))
    assert len(sources.load("toy_images", "train")["label"]) == 3


def test_a_killed_preparation_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tfds.core.DatasetInfo, "write_to_directory", killed)
        with pytest.raises(KeyboardInterrupt):
            sources.load("digits_domains", "test", tmp_path)
    assert not (tmp_path / "digits_domains" / "1.0.0").exists()
    assert len(sources.load("digits_domains", "test", tmp_path)["label"]) == 1200


def test_losing_the_race_to_prepare_is_no_error(tmp_path, monkeypatch):
    builder_type = BUILDERS["digits_domains"]
    prepare = builder_type.download_and_prepare

    def overtaken(self):
        prepare(builder_type(data_dir=tmp_path, file_format="array_record"))
        raise OSError("Directory not empty")

    monkeypatch.setattr(builder_type, "download_and_prepare", overtaken)
    assert len(sources.load("digits_domains", "test", tmp_path)["label"]) == 1200


@pytest.mark.parametrize("classes", [None, 1])
def test_images_can_stay_in_their_files(tmp_path, classes):
    _prepare(ToyImages, tmp_path)
    options = {"size": 3, "classes": classes}
    loaded = sources.load("toy_images", "train[1:]", tmp_path, **options)
    stored = sources.stored("toy_images", "train[1:]", tmp_path, **options)
    images = np.stack([stored.image(i) for i in range(len(loaded["label"]))])
    np.testing.assert_array_equal(images, loaded["image"])
    np.testing.assert_array_equal(stored.columns["label"], loaded["label"])
    assert set(stored.columns) == {"label"}


def test_an_image_in_its_file_that_is_of_another_shape_is_refused(tmp_path):
    _prepare(RaggedImages, tmp_path)
    stored = sources.stored("ragged_images", "train", tmp_path)
    assert stored.image(0).shape == (4, 4, 3)
    with pytest.raises(ValueError, match=r"\(5, 5, 3\) and \(4, 4, 3\)"):
        stored.image(1)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\xff\xfe"])
def test_damaged_descriptions_of_a_data_set_are_named(data_dir, tmp_path, name, content):
    sources.info("digits_domains", data_dir)  # made, if it is not there
    new = tmp_path / "digits_domains"
    shutil.copytree(data_dir / "digits_domains", new)
    (found,) = new.glob(f"*/{name}")
    found.write_bytes(content)
    with pytest.raises(ValueError, match=f"'digits_domains' is damaged.*Remove {new}"):
        sources.load("digits_domains", "test", tmp_path)
