"""`experiments.partition` from the outside, and its table and plot."""

import csv
import json

import numpy as np
import pytest

from experiments.shared import clients, plots
from fedlora_jax.experiment.partitions import Overview


def overview(num_clients=4, domains=("one", "two"), labels=3):
    counts = np.random.default_rng(0).integers(1, 9, (num_clients, len(domains), labels))
    counts[0, 1:] = 0
    return Overview(counts, counts.sum(0) + 1, domains)


def test_the_command_writes_a_table_a_plot_and_what_a_run_reads(program, tmp_path):
    code, out, err = program.run(
        "partition",
        f"--config={program.config}",
        f"--config.backbone_dir={tmp_path / 'backbones'}",
        f"--workdir={tmp_path}",
        "--seeds=2",
    )
    assert code == 0, err
    for seed in (0, 1):
        directory = tmp_path / f"seed_{seed}"
        assert {path.name for path in directory.iterdir()} == {
            "partition.json",
            "partition.csv",
            "partition.png",
        }
        written = json.loads((directory / "partition.json").read_text())
        assert written["seed"] == seed and f"seed {seed}\n" in out
        with open(directory / "partition.csv") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["examples"]) for row in rows] == [len(x) for x in written["parts"]]
        assert all(0 < float(row["label_entropy_nats"]) <= np.log(10) for row in rows)
        assert all(0 < float(row["distance_to_all"]) < 1 for row in rows)
        assert rows[0]["domain"] == "original"
    # No backbone was made for it.
    assert {path.name for path in tmp_path.iterdir()} == {"seed_0", "seed_1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.seed=2", "--seeds=2"], "config.seed is 2, but --seeds=2 runs the seeds 0 to 1"),
        (["--config.seed=-1"], "config.seed must be from 0 to "),
    ],
)
def test_a_seed_that_makes_no_sense_is_refused_before_any_work(
    program, tmp_path, arguments, message
):
    code, _, err = program.run(
        "partition", f"--config={program.config}", f"--workdir={tmp_path}", *arguments
    )
    assert code == 1 and message in err and not list(tmp_path.iterdir())


def test_table_of_few_clients_and_of_many():
    head, rows = clients.table(overview())
    assert head == ["client", "domain", "examples", "label entropy nats", "distance to all"]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "smallest", "median", "largest"]
    assert [row[1] for row in rows[:2]] == ["one", "2 domains"]
    counts = overview().counts.sum((1, 2))
    assert [row[2] for row in rows[:4]] == [str(x) for x in counts]
    assert rows[4][2] == str(counts.min()) and rows[6][2] == str(counts.max())
    head, rows = clients.table(overview(num_clients=101))
    assert [row[0] for row in rows] == ["smallest", "median", "largest"]


def test_a_legend_says_how_many_examples_no_client_has():
    found = overview()
    given = found.counts.sum()
    assert f"4 clients with {given} of {given + 6} training examples" in clients.legend(found)


@pytest.mark.parametrize(
    ("domains", "labels", "columns", "panels"),
    [
        (("one", "two"), 3, ["domain", "label entropy nats", "distance to all"], 4),
        (("all",), 3, ["label entropy nats", "distance to all"], 4),
        (("one", "two"), 1, ["domain", "domain entropy nats", "distance to all"], 3),
        (("all",), 1, [], 1),
    ],
)
def test_what_clients_cannot_differ_in_is_left_out(tmp_path, domains, labels, columns, panels):
    found = overview(domains=domains, labels=labels)
    if len(domains) == 1:
        found = found._replace(counts=found.counts + 1)
    head, _ = clients.table(found)
    assert [name for name in head if name not in ("client", "examples")] == columns
    plot = plots.partition(found)
    drawn = [axes for axes in plot.figure.axes if axes.get_label() != "<colorbar>"]
    assert len(drawn) == panels
    assert ("label" in plot.caption) == (labels > 1)
    plots.save(tmp_path, {"partition": plot})
    assert (tmp_path / "partition.png").stat().st_size > 1000
