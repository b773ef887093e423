"""The papers' configurations, each from small prepared data to metrics, with a small model."""

import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fedlora_jax import experiment
from fedlora_jax.data import preparation
from fedlora_jax.experiment import partitions
from tests.preparation import published, published_texts

pytest.importorskip("tokenizers", reason="needs the extra `text`")
pytest.importorskip("gguf", reason="needs the extra `gguf`")

from tests.experiment.test_text_sets import write_encoder
from tests.models import test_gguf as llama

SIZES = {"train": 60, "test": 12}
GLUE = ("glue/cola", "glue/mnli", "glue/stsb")


class Pictures(tfds.core.GeneratorBasedBuilder):
    """What TFDS's builder leaves of a data set, without TensorFlow: images are files already."""

    VERSION = tfds.core.Version("1.0.0")
    NUM_CLASSES = 100
    url_infos: dict = {}

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=self.NUM_CLASSES),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {split: self._generate_examples(count) for split, count in SIZES.items()}

    def _generate_examples(self, count):
        for i in range(count):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), published.colour(i % 5)).save(file, "png")
            file.seek(0)
            yield i, {"image": file, "label": i % 5}


class Cifar100(Pictures):
    """Under the name and version of TFDS's."""

    VERSION = tfds.core.Version("3.0.2")


class Domainnet(Pictures):
    """Under the name, the version and the configs of TFDS's."""

    NUM_CLASSES = 345
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=domain, version="1.0.0") for domain in published.DOMAINS
    ]


def prepare_all(directory):
    data = directory / "data"
    for name in published.DOMAINS:
        Domainnet(config=name, data_dir=data, file_format="array_record").download_and_prepare()
    Cifar100(data_dir=data, file_format="array_record").download_and_prepare()
    photographs = directory / "photographs"
    photographs.mkdir()
    counts = published.write_nico_pp(photographs)
    preparation.prepare(
        "nico_pp",
        data,
        manual_dir=photographs,
        examples={"nico_pp": counts},
        report=lambda _: None,
    )
    files = published_texts.write(directory / "texts")
    for name in (*GLUE, *published_texts.INSTRUCTIONS):
        published_texts.prepare(name, files, data)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    directory = tmp_path_factory.mktemp("papers")
    prepare_all(directory)
    write_encoder(directory / "encoder", "roberta")
    llama.write_random(directory / "decoder.gguf", context=1024)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_DATA_DIR", str(directory / "data"))
        yield directory


# A configuration, which of the sources above it takes, and its arguments.
TRAINED = [
    ("lora_fair_images", "", "data=domainnet,model=vit,skew=feature"),
    ("lora_fair_images", "", "data=nico_pp,model=mixer,skew=feature_label"),
    ("fedsmooth_lora_cifar100", "", "skew=dirichlet"),
    ("fedsmooth_lora_language", "decoder.gguf", "task=mathematics"),
    ("flora_na_generation", "decoder.gguf", "task=code"),
    ("flexlora_ranks", "decoder.gguf", "ranks=heavy_tail_light"),
    ("glue", "encoder", "paper=ffa_lora,task=mnli"),
    ("glue", "encoder", "paper=fedex_lora,task=stsb"),
]
ALL = [
    *TRAINED,
    ("lora_fair_images", "", "data=domainnet,model=mixer,skew=feature"),
    ("lora_fair_images", "", "data=nico_pp,model=vit,skew=feature"),
    ("fedsmooth_lora_cifar100", "", "skew=iid"),
    ("fedsmooth_lora_language", "decoder.gguf", "task=code"),
    ("fedsmooth_lora_language", "decoder.gguf", "task=chat"),
    ("flora_na_generation", "decoder.gguf", "task=mathematics"),
    ("glue", "encoder", "paper=flora_na,task=cola"),
]


def configured(here, name, source, arg, *flags):
    source = [f"source={here / source}"] if source else []
    module = importlib.import_module(f"configs.papers.{name}")
    return module.get_config(",".join([arg, *source, *flags]))


def runlocal(here, name, source, arg):
    config = configured(here, name, source, arg, "runlocal")
    config.rounds = 1
    if "pretraining" in config:
        config.backbone_dir = str(here / "backbones")
    if source == "decoder.gguf":  # its tokens are bytes
        config.data.update(length=512, end_token="<|end|>")
        # So that each kind of the few examples is both learned and judged.
        share = 0.6 if config.data.dataset == "databricks_dolly" else 0.3
        config.data.held_out.update(validation=0.0, test=share)
        if config.lora.targets == ("(attention|mlp)/",):
            # Seven kernels make a program three times as large, and are adapted in other tests.
            config.lora.targets = ("attention/query", "mlp/down")
    if source == "encoder":
        config.data.length = 100
    return config


def test_every_configuration_is_trained():
    files = Path(__file__).parents[2].glob("configs/papers/*.py")
    assert {path.stem for path in files} == {name for name, _, _ in TRAINED}


@pytest.mark.parametrize(("name", "source", "arg"), TRAINED, ids=lambda x: x or "-")
def test_runlocal(here, tmp_path, name, source, arg):
    config = runlocal(here, name, source, arg)
    setting = experiment.prepare(config)
    program = experiment.compile_program(config, setting)
    (row,) = experiment.run(config, setting, program, tmp_path)
    assert np.isfinite(row["loss"])
    assert row[config.metrics[0]] is not None or config.metrics[0] in ("pearson", "spearman")
    assert json.loads((tmp_path / "config.json").read_text())["method"] == config.method


@pytest.mark.parametrize(("name", "source", "arg"), ALL[len(TRAINED) :], ids=lambda x: x or "-")
def test_data_model_and_partition_fit(here, name, source, arg):
    config = runlocal(here, name, source, arg)
    experiment.check(config)
    setting = experiment.prepare(config)
    assert len(partitions.draw(config, setting.train, 0)) >= config.clients_per_round


@pytest.mark.parametrize(("name", "source", "arg"), ALL, ids=lambda x: x or "-")
def test_in_full_it_is_sound_and_larger(here, name, source, arg):
    small, full = (configured(here, name, source, arg, *flag) for flag in (["runlocal"], []))
    experiment.check(full)
    assert full.rounds > small.rounds and full.local.batch_size > 0
    assert full.clients_per_round >= small.clients_per_round
    assert full.task == small.task and full.metrics == small.metrics
    assert full.data.name == small.data.name and full.method == small.method


def test_numbers_of_the_papers(here):
    images = configured(here, "lora_fair_images", "", "skew=feature_label")
    assert (images.clients_per_round, images.lora.rank, images.local.batch_size) == (18, 16, 128)
    assert (images.data.size, images.data.classes, images.data.statistics) == (224, 100, "clip")
    cifar = configured(here, "fedsmooth_lora_cifar100", "", "skew=dirichlet")
    smooth = cifar.options.fedsmooth_lora
    assert (smooth.gamma, smooth.zeta, smooth.zeta_min, smooth.rounds) == (256, 1, 0, 10)
    language = configured(here, "fedsmooth_lora_language", "decoder.gguf", "task=code")
    assert language.lora.scale == pytest.approx(64 / 32**0.5)
    assert (language.local.steps, language.data.length, language.lora.rank) == (200, 1024, 32)
