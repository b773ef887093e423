"""What docs/your_own_data.md says, done."""

import re
from pathlib import Path

import pytest

from configs import image_folder as images_config
from configs import jsonl as text_config
from configs import table as table_config
from fedlora_jax import experiment
from fedlora_jax.data import image_folder, jsonl, record_files, text

PAGE = (Path(__file__).parents[1] / "docs" / "your_own_data.md").read_text()
TEXTS, TABLE, IMAGES = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_of_examples(here):
    exec(TEXTS, {})
    config = text_config.get_config("file=examples.jsonl")
    experiment.check(config)
    examples = jsonl.read(
        config.data.files.federated,
        text.format_template("{prompt} {response}"),
        config.data.fields,
    )
    assert len(examples) > 200
    assert len({example.client for example in examples}) == 12
    assert {example.domain for example in examples} == {"files", "numbers", "text"}


@pytest.mark.parametrize("line", re.findall(r"^examples.jsonl:\d+: .*$", PAGE, re.M))
def test_errors_are_as_shown(here, line):
    number = int(line.split(":")[1])
    bad = {
        3: '{"prompt": "a", "respons": "b"}',
        7: '{"prompt": "a"',
        9: '{"prompt": "", "response": "b"}',
    }
    good = ['{"prompt": "a", "response": "b"}'] * (number - 1)
    Path("examples.jsonl").write_text("\n".join([*good, bad[number]]))
    with pytest.raises(ValueError) as raised:
        jsonl.read("examples.jsonl", text.format_template("{prompt} {response}"))
    assert str(raised.value) == line


def test_a_table_of_texts(here):
    exec(TABLE, {})
    config = table_config.get_config("file=sentences.csv,clients=8")
    experiment.check(config)
    assert config.model.options.num_classes == 6 and config.data.classes[0] == "math"
    assert config.data.partition_options.num_clients == 8
    assert len(record_files.read("sentences.csv")) > 100


def test_a_record_that_cannot_be_used_is_left_to_the_reading_of_a_table(here, recwarn):
    Path("x.csv").write_text("text,label\na,cat\n,dog\nb,cow\n")
    config = table_config.get_config("file=x.csv,clients=2")
    assert config.data.classes == ("cat", "cow") and not recwarn.list
    Path("x.csv").write_text("test,label\na,cat\n")
    with pytest.raises(ValueError, match="x.csv:2: no field 'text'. Did you mean 'test'"):
        table_config.get_config("file=x.csv,clients=2")


def test_a_table_without_a_file():
    with pytest.raises(ValueError, match="configs/table.py:file=PATH"):
        table_config.get_config("clients=2")


def test_a_folder_of_images(here):
    exec(IMAGES, {})
    config = images_config.get_config("root=images,size=16")
    experiment.check(config)
    assert image_folder.class_names("images", "domain") == ["inverted", "plain"]
    assert config.model.options.num_classes == 10 and config.clients_per_round == 6
    options = {"size": config.data.size, "held_out": config.data.held_out}
    count = {
        split: len(image_folder.load(split, "images", **options)["image"])
        for split in ("federated", "validation", "test", "pretrain")
    }
    assert sum(count.values()) == 2 * 1797 and min(count.values()) > 250
