"""A run's partition on file: written, read back, refused, and made of others' files."""

import json

import numpy as np
import pytest

from fedlora_jax import experiment
from fedlora_jax.data import partition
from fedlora_jax.experiment import finished, partitions
from fedlora_jax.experiment import setting as experiment_setting


@pytest.fixture(scope="module")
def base(digits):
    """A configuration whose rounds take a moment, and what all runs share."""
    digits.rounds = 1
    digits.lora.rank = 2
    return digits, experiment.prepare(digits)


@pytest.fixture
def make(base):
    def changed(name="domain_dirichlet", options=None, **values):
        config = base[0].copy_and_resolve_references()
        config.data.partition = name
        if options is not None:
            config.data.partition_options = options
        config.update_from_flattened_dict(values)
        return config

    return changed


def keep(config, train, workdir):
    found = partitions.of_run(config, train, workdir)
    return found, partitions.write(found, workdir)


def same(one, two):
    return partition.digest_of_parts(one) == partition.digest_of_parts(two)


def test_a_file_says_all_that_made_it(base, make, tmp_path):
    config, train = make(seed=5), base[1].train
    found, path = keep(config, train, tmp_path)
    content = json.loads(path.read_text())
    assert content["format"] == 1 and content["seed"] == 5
    assert content["data"]["name"] == "digits_domains/2.0.0"
    assert content["data"]["split"] == "federated"
    assert content["data"]["num_examples"] == len(train["label"])
    assert content["partitioner"] == "domain_dirichlet"
    assert content["options"] == {"alpha": 0.5, "clients_per_domain": 5}
    assert content["sha256"] == partition.digest_of_parts(found.parts)
    assert content["parts"] == [part.tolist() for part in found.parts]
    assert len(path.read_text().splitlines()) < 20 + len(found.parts)
    assert list(tmp_path.iterdir()) == [path]


CASES = {
    "iid": {"num_clients": 4},
    "label_proportions": {"proportions": ((0.1,) * 10, (0.5, 0.5, *[0.0] * 8))},
    "dirichlet": {"num_clients": 4, "alpha": 0.5, "balanced": True},
}


@pytest.mark.parametrize("name", CASES)
def test_what_was_written_is_read_back_and_not_drawn_anew(base, make, tmp_path, name, monkeypatch):
    config, train = make(name, CASES[name]), base[1].train
    first, path = keep(config, train, tmp_path)
    text = path.read_text()
    monkeypatch.setattr(partitions, "draw", None)
    again, _ = keep(config, train, tmp_path)
    assert same(first.parts, again.parts) and first.origin == again.origin
    assert path.read_text() == text


def test_another_seed_option_or_data_is_refused(base, make, tmp_path):
    train = base[1].train
    _, path = keep(make(), train, tmp_path)
    text = path.read_text()
    other = {**train, "label": train["label"][::-1].copy()}
    fewer = {name: values[:-1] for name, values in train.items()}
    changed = {
        "seed is 0 there, 1 here": (make(seed=1), train),
        "options.alpha is 0.5 there, 0.1 here": (
            make(options={"clients_per_domain": 5, "alpha": 0.1}),
            train,
        ),
        "partitioner is domain_dirichlet there, iid here": (make("iid", CASES["iid"]), train),
        "data.digest is": (make(), other),
        f"data.num_examples is {len(train['label'])} there": (make(), fewer),
    }
    for message, (config, examples) in changed.items():
        with pytest.raises(ValueError, match=f"{path} holds another partition .*{message}") as got:
            partitions.of_run(config, examples, tmp_path)
        assert "Choose another work directory" in str(got.value)
    assert path.read_text() == text


def test_other_text_is_other_data(make, tmp_path):
    text = {"domain": np.zeros(6, np.int32), "tokens": np.arange(18).reshape(6, 3)}
    config = make("iid", {"num_clients": 2})
    found, path = keep(config, text, tmp_path)
    assert same(partitions.draw(make("file", {"path": str(path)}), text, 0), found.parts)
    other = {**text, "tokens": text["tokens"] + 1}
    with pytest.raises(ValueError, match="data.digest is"):
        partitions.of_run(config, other, tmp_path)
    with pytest.raises(ValueError, match="is a partition of other data"):
        partitions.draw(make("file", {"path": str(path)}), other, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x["parts"][0].reverse(), "was changed after it was written"),
        (lambda x: x.update(format=2), "in format 2, and this version reads format 1"),
        (lambda x: x.pop("sha256"), "lacks sha256"),
        (lambda x: x.pop("parts"), "not a partition that a run has written"),
    ],
)
def test_a_file_that_was_tampered_with_is_refused(base, make, tmp_path, change, message):
    _, path = keep(make(), base[1].train, tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        partitions.of_run(make(), base[1].train, tmp_path)


def test_the_file_of_a_run_serves_another_run_on_the_same_data(base, make, tmp_path):
    train = base[1].train
    found, path = keep(make("label_proportions", CASES["label_proportions"]), train, tmp_path)
    config = make("file", {"path": str(path)}, seed=3)
    assert same(partitions.draw(config, train, 3), found.parts)
    other = {**train, "label": train["label"][::-1].copy()}
    with pytest.raises(ValueError, match=f"{path} is a partition of other data: of 4782 examples"):
        partitions.draw(config, other, 3)


def test_a_run_keeps_the_partition_of_a_file(base, make, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("[[0, 1], [2]]")
    config, train, workdir = make("file", {"path": str(path)}), base[1].train, tmp_path / "run"
    workdir.mkdir()
    found, _ = keep(config, train, workdir)
    path.write_text("[[0], [1, 2]]")
    with pytest.raises(ValueError, match="mine.json is another"):
        partitions.of_run(config, train, workdir)
    path.unlink()
    assert same(partitions.of_run(config, train, workdir).parts, found.parts)


def test_what_a_data_set_lacks_and_what_a_partitioner_does_not_know(base, make):
    train = base[1].train
    with pytest.raises(ValueError, match="'natural' needs clients, which .*'digits_domains'"):
        partitions.draw(make("natural", {}), train, 0)
    own = make("natural", {})
    with own.unlocked():
        own.data.files = {"federated": "mine.csv"}
    with pytest.raises(ValueError, match="does not have: .* clients=N"):
        partitions.draw(own, train, 0)
    unlabelled = {"image": train["image"], "domain": train["domain"]}
    with pytest.raises(ValueError, match="'shards' needs labels"):
        partitions.draw(make("shards", {"num_clients": 2, "shards_per_client": 2}), unlabelled, 0)
    with pytest.raises(ValueError, match="Did you mean 'num_clients'"):
        experiment.check(make("iid", {"num_client": 3}))
    with pytest.raises(ValueError, match="'file' needs the option path"):
        experiment.check(make("file", {}))


def test_overview_counts_what_is_left_out(base, make):
    setting = base[1]
    config = make("label_proportions", CASES["label_proportions"])
    parts = partitions.draw(config, setting.train, 0)
    found = partitions.overview(setting.train, setting.domains, parts)
    assert found.counts.shape == (2, 6, 10) and found.whole.shape == (6, 10)
    assert found.counts.sum() == sum(map(len, parts)) < found.whole.sum() == 4782
    assert (found.counts.sum(0) <= found.whole).all()
    np.testing.assert_array_equal(found.counts, experiment.partition_counts(config, setting))
    unlabelled = {"domain": setting.train["domain"]}
    found = partitions.overview(unlabelled, setting.domains, parts)
    assert found.kind == "domain" and found.by_kind.shape == (2, 6)


def test_a_client_with_one_example_trains(base, make, tmp_path):
    """And the run uses the partition that it finds, also when it is restored."""
    setting = base[1]
    many = np.arange(1, 400).tolist()
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"clients": {"one": [0], "many": many, "two": [400, 401]}}))
    config = make("file", {"path": str(path)}, clients_per_round=3)
    program = experiment.compile_program(config, setting)
    workdir = tmp_path / "run"
    (row,) = experiment.run(config, setting, program, workdir)
    loss = dict(zip(row["cohort"], row["client_loss"], strict=True))
    assert sorted(loss) == [0, 1, 2] and np.isfinite(list(loss.values())).all()
    assert row["excluded_clients"] == 0 and len(row["client_accuracy"]) == 3
    kept = json.loads((workdir / "partition.json").read_text())
    assert kept["parts"] == [[0], many, [400, 401]]
    path.unlink()
    restored = finished.restore(workdir)
    assert restored.state.data.counts.tolist() == [1, 399, 2]
    assert experiment.run(config, setting, program, workdir) == [row]
    with pytest.raises(ValueError, match="seed is 0 there, 1 here"):
        experiment.run(
            make("file", {"path": str(path)}, clients_per_round=3, seed=1),
            setting,
            program,
            workdir,
        )


def test_a_client_with_no_example_is_refused(base, make, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("[[0, 1], [], [2]]")
    config = make("file", {"path": str(path)}, clients_per_round=2)
    program = experiment.compile_program(config, base[1])
    with pytest.raises(ValueError, match=f"{path}: client 1 is empty"):
        experiment.run(config, base[1], program, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [("domain_dirichlet", None, 30), ("iid", {"num_clients": 4}, 4)],
)
def test_too_large_a_cohort_is_refused_before_the_backbone_is_made(
    make, monkeypatch, name, options, count
):
    def make_backbone(*_):
        raise NotImplementedError

    monkeypatch.setattr(experiment_setting, "_backbone", make_backbone)
    message = f"clients_per_round is 31, but the partition '{name}' makes only {count} clients"
    with pytest.raises(ValueError, match=message):
        experiment.prepare(make(name, options, clients_per_round=31))
    # Of all clients' examples together there is no cohort.
    for values in ({"clients_per_round": count}, {"clients_per_round": 31, "method": "central"}):
        with pytest.raises(NotImplementedError):
            experiment.prepare(make(name, options, **values))
