"""From a configuration to a finished run, in process, on the demo's data with a tiny ViT."""

import importlib
import itertools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax import experiment, transforms
from fedlora_jax.experiment import (
    checkpoints,
    chunking,
    hosts,
    loop,
    partitions,
    program,
    records,
    setting,
)
from fedlora_jax.experiment.state import first_state
from fedlora_jax.federated import faults, ranks


@pytest.fixture(scope="module")
def base(digits):
    """A configuration whose rounds take a moment, and what all runs share."""
    digits.rounds = 3
    digits.lora.rank = 4
    digits.local.schedule = "constant"
    return digits, experiment.prepare(digits)


@pytest.fixture
def make(base):
    def changed(**values):
        config = base[0].copy_and_resolve_references()
        config.update_from_flattened_dict(values)
        return config

    return changed


@pytest.fixture(scope="module")
def run(base):
    """Runs a configuration; those whose rounds are alike share their programs."""
    programs = {}

    def run(config, workdir, **options):
        key = config.copy_and_resolve_references()
        del key.rounds, key.seed, key.options.fedsmooth_lora.rounds
        del key.evaluate_every, key.checkpoint_every
        key = key.to_json(sort_keys=True)
        if key not in programs:
            programs[key] = experiment.compile_program(config, base[1])
        return experiment.run(config, base[1], programs[key], workdir, **options)

    return run


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_one_compilation_serves_seeds_rates_and_restarts(base, make, tmp_path, caplog):
    config = make()
    program = experiment.compile_program(config, base[1])
    config.rounds = 2
    experiment.run(config, base[1], program, tmp_path / "0")
    caplog.clear()
    with jax.log_compiles():
        config.seed, config.local.learning_rate = 1, 0.3
        experiment.run(config, base[1], program, tmp_path / "1")
        config.rounds = 3
        experiment.run(config, base[1], program, tmp_path / "1")
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA" in r.getMessage()]
    assert not [text for text in compiled if "round_function" in text or "evaluate" in text]


def test_more_rounds_go_on_with_a_finished_run(run, make, tmp_path):
    short = make(rounds=2)
    run(short, tmp_path / "grown")
    grown = run(make(rounds=3), tmp_path / "grown")
    whole = run(make(rounds=3), tmp_path / "whole")
    assert without_seconds(grown) == without_seconds(whole)
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["rounds"] == 3
    with pytest.raises(ValueError, match="config.rounds is 3 there, 2 here"):
        run(short, tmp_path / "grown")


@pytest.mark.parametrize("until", [0, -1])
def test_no_rounds_cannot_be_asked_for(run, make, tmp_path, until):
    with pytest.raises(ValueError, match=f"run: until must be at least 1, got {until}"):
        run(make(rounds=2), tmp_path / "run", until=until)
    assert not (tmp_path / "run").exists()


def ending(after):
    """An `advance` that ends a run after so many rounds, as a signal would."""
    finished = itertools.count(1)

    def advance():
        if next(finished) == after:
            raise SystemExit

    return advance


def test_rounds_may_pass_between_evaluations_and_between_checkpoints(
    run, make, tmp_path, monkeypatch
):
    rare = make(method="fedsa_lora", rounds=5, evaluate_every=2, checkpoint_every=3)
    whole = run(make(method="fedsa_lora", rounds=5), tmp_path / "whole")
    rows = run(rare, tmp_path / "rare")
    judged = [row["round"] for row in rows if "accuracy" in row]
    assert judged == [1, 3, 4]
    held_out = {name for name in whole[0] if name.endswith(("accuracy", "cross_entropy"))}
    assert len(held_out) == 10
    for row, usual in zip(without_seconds(rows), without_seconds(whole), strict=True):
        left_out = set() if row["round"] in judged else held_out
        assert row == {name: value for name, value in usual.items() if name not in left_out}
    assert checkpoints.finished(tmp_path / "rare") == [3, 5]
    # Another number is no other run.
    assert run(make(method="fedsa_lora", rounds=5), tmp_path / "rare") == rows
    with pytest.raises(SystemExit):
        run(rare, tmp_path / "ended", advance=ending(2))
    assert checkpoints.finished(tmp_path / "ended") == [2]
    monkeypatch.setattr(checkpoints.Checkpoints, "save_waiting", lambda self: None)
    with pytest.raises(SystemExit):  # Killed: what waited is lost, and made again.
        run(rare, tmp_path / "ended", advance=ending(5 - 1))
    assert checkpoints.finished(tmp_path / "ended") == [2, 3]
    assert without_seconds(run(rare, tmp_path / "ended")) == without_seconds(rows)


@pytest.mark.parametrize(
    "falls",
    [
        {"local.schedule": "cosine"},
        {"method": "fedsmooth_lora", "options.fedsmooth_lora.zeta_min": 0.1},
    ],
)
def test_more_rounds_are_refused_where_they_would_change_the_first_ones(
    base, make, tmp_path, falls
):
    path = tmp_path / "config.json"
    experiment.check_workdir(make(rounds=2, **falls), tmp_path)
    assert not path.exists()
    loop._claim(make(rounds=2, **falls), tmp_path)
    before = path.read_text()
    with pytest.raises(ValueError, match="config.rounds is 2 there, 3 here"):
        loop._claim(make(rounds=3, **falls), tmp_path)
    with pytest.raises(ValueError, match="config.rounds is 2 there, 3 here"):
        experiment.check_workdir(make(rounds=3, **falls), tmp_path)
    assert path.read_text() == before


def test_memory_is_announced_before_the_first_round_alone(run, make, tmp_path):
    heard = []
    run(make(rounds=1), tmp_path, announce=heard.append)
    run(make(rounds=1), tmp_path, announce=heard.append)
    assert len(heard) == 1
    assert re.fullmatch("fedit: 4 clients at once; a round needs .* to train, of .* free", heard[0])


def test_a_run_is_the_same_whether_its_number_of_clients_at_once_was_found_or_given(
    base, make, tmp_path, caplog
):
    config = make(rounds=4, clients_per_chunk="auto")
    program = experiment.compile_program(config, base[1])
    with jax.log_compiles():
        rows = experiment.run(config, base[1], program, tmp_path / "found")
    record = json.loads((tmp_path / "found" / chunking.RECORD).read_text())
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA" in r.getMessage()]
    assert len([text for text in compiled if "round_function" in text]) == len(record["seconds"])
    config.clients_per_chunk = str(record["clients_per_chunk"])
    given = experiment.run(config, base[1], program, tmp_path / "given")
    assert without_seconds(given) == without_seconds(rows)
    assert not (tmp_path / "given" / chunking.RECORD).exists()


def test_metrics_of_unequal_ranks_and_missed_rounds(run, make, tmp_path):
    config = make(method="flora", **{"lora.ranks": "heavy_tail_strong"})
    rows = run(config, tmp_path)
    assigned = ranks.assign("heavy_tail_strong", 4, 30, seed=0)
    size, head = 4 * (16 + 16), 4 * (16 * 10 + 10)
    seen = {}
    for index, row in enumerate(rows):
        mine = [assigned[client] for client in row["cohort"]]
        assert row["rank"] == mine
        assert row["megabytes_up"] * 1e6 == pytest.approx(sum(mine) * size + 4 * head)
        assert row["megabytes_down"] * 1e6 == pytest.approx(4 * (sum(mine) * size + head))
        absent = [index - seen.get(client, -1) - 1 for client in row["cohort"]]
        assert (row["megabytes_catch_up"] > 0) == any(absent)
        seen.update(dict.fromkeys(row["cohort"], index))
    assert any(absent)


def test_a_client_that_does_not_answer_sends_nothing(run, make, tmp_path):
    """One of four in each round, of whatever rank it is."""
    values = {"lora.ranks": "heavy_tail_strong", "faults.kind": "dropout", "faults.share": 0.25}
    config = make(rounds=2, **values)
    dropout = faults.make("dropout", share=0.25)
    for index, row in enumerate(run(config, tmp_path)):
        cohort = jnp.array(row["cohort"])
        answers = ~np.asarray(faults.drawn(dropout, jax.random.key(config.seed), index, cohort))
        size, head = 4 * (16 + 16), 4 * (16 * 10 + 10)
        sent = np.array(row["rank"]) * size + head
        assert row["absent_clients"] == 1 == 4 - answers.sum()
        assert row["megabytes_up"] * 1e6 == pytest.approx(sent[answers].sum())
        assert row["megabytes_down"] * 1e6 == pytest.approx(sent.sum())


def test_epsilon_grows_with_the_rounds(run, make, tmp_path):
    pytest.importorskip("dp_accounting")
    config = make(method="ffa_lora", **{"privacy.clip": 0.5, "privacy.noise_multiplier": 2.0})
    spent = [row["epsilon"] for row in run(config, tmp_path)]
    assert 0 < spent[0] < spent[1] < spent[2]
    assert run(make(rounds=1), tmp_path / "open")[0]["epsilon"] is None


def test_accuracy_of_clients_is_on_data_like_theirs(base, run, make, tmp_path):
    config, setting = make(rounds=1), base[1]
    (row,) = run(config, tmp_path)
    parts = partitions.draw(config, setting.train, config.seed)
    # A client of one domain and mixed labels: reweighted, its accuracy lies between the extremes of
    # that domain, and equals the domain's if its labels are as frequent as those held out.
    assert len(row["client_accuracy"]) == len(parts) == 30
    assert row["personal_accuracy"] == pytest.approx(np.mean(row["client_accuracy"]))
    assert np.ptp(row["client_accuracy"]) > 0.05


def test_with_many_clients_a_panel_is_listed_and_all_are_summed_up(base, make, tmp_path):
    config = make(rounds=1)
    program = experiment.compile_program(config, base[1])
    (whole,) = experiment.run(config, base[1], program, tmp_path / "whole")
    config.judged_clients = 4
    (row,) = experiment.run(config, base[1], program, tmp_path / "panel")
    assert "panel" not in whole and len(row["panel"]) == 4
    assert row["client_accuracy"] == [whole["client_accuracy"][who] for who in row["panel"]]
    for name in ("accuracy", "personal_accuracy", "quantiles_accuracy"):
        assert row[name] == whole[name]
    expected = np.quantile(whole["client_accuracy"], [0.1, 0.5, 0.9])
    np.testing.assert_allclose(list(row["quantiles_accuracy"].values()), expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "flora", "local.scaffold": True}, "flora: .* SCAFFOLD: its adapters are reset"),
        ({"method": "local", "local.proximal": 0.1}, "local: .* FedProx: no server model"),
        ({"method": "lora_fair", "privacy.clip": 1.0}, "lora_fair: .* differential privacy"),
        ({"method": "fedsvd", "server.optimizer": "fedadam"}, "fedsvd: .* a server optimiser"),
        ({"method": "frlora", "lora.ranks": "uniform"}, "frlora: .* unequal ranks"),
        ({"server.optimizer": "fedadm"}, "'fedadam'"),
        ({"method": "local", "server.step": 2.0}, "local: .* a server's step .* learns nothing"),
        ({"server.optimizer": "fedadam", "server.step": 2.0}, "in that of factors"),
        ({"server.step_momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"lora.ranks": "heavytail_light"}, "'heavy_tail_light'"),
        ({"lora.ranks": "heavy_tail_light,3"}, "unknown distribution of ranks"),
        ({"local.steps": 0}, "local.steps or config.local.epochs must be at least 1"),
        ({"clients_per_chunk": "-1"}, "clients_per_chunk must be auto, all or a number"),
        ({"local.scaffold": True, "privacy.clip": 1.0}, "unprotected"),
        ({"precision.compute": "bfloat61"}, "'bfloat16'"),
        ({"model.options": {"dtype": "bfloat16"}}, "config.precision.compute"),
    ],
)
def test_senseless_configurations_are_refused_before_any_work(make, values, message):
    with pytest.raises(ValueError, match=message):
        experiment.check(make(**values))


@pytest.mark.parametrize(
    ("listed", "message"), [("4,2", "2 ranks were given"), ("5," * 29 + "1", "from 1 to 4")]
)
def test_impossible_lists_of_ranks_leave_the_directory_alone(run, make, tmp_path, listed, message):
    with pytest.raises(ValueError, match=message):
        run(make(**{"lora.ranks": listed}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_everything_at_once(run, make, tmp_path):
    """Epochs, chunks, ranks, FedProx, SCAFFOLD and a server's step, killed and gone on with."""
    values = {
        "lora.ranks": "uniform",
        "local.epochs": 1,
        "local.proximal": 0.01,
        "local.scaffold": True,
        "server.step": 1.5,
        "server.step_momentum": 0.5,
        "diagnostics": True,
        "clients_per_chunk": "3",
    }
    whole = run(make(rounds=3, **values), tmp_path / "whole")
    run(make(rounds=2, **values), tmp_path / "parts")
    parts = run(make(rounds=3, **values), tmp_path / "parts")
    assert without_seconds(parts) == without_seconds(whole)
    assert np.isfinite([row["loss"] for row in whole]).all()
    for row in whole:
        # FedIT in its own basis: the means are the means, and no better than the best of rank r.
        assert 0 < row["dropped_share"] < row["aggregation_error"] < 1
        assert 0.5 < row["cosine"] < 1 and row["cosine_b"] == pytest.approx(1, abs=1e-5)


def wide_kernels():
    """The buffers of float32 that have the shape of an adapted kernel."""
    arrays = [x for x in jax.live_arrays() if x.shape == (16, 16) and x.dtype == jnp.float32]
    return arrays, {x.unsafe_buffer_pointer() for x in arrays}


def test_bfloat16_by_configuration(run, make, tmp_path):
    """Killed and gone on with; near float32, on the same backbone.

    Of the kernels that are merged into it holds the last state alone, in float32.
    """
    types = {"precision.compute": "bfloat16", "precision.storage": "bfloat16"}
    config = make(method="flora", **types)
    setting = experiment.prepare(config)
    assert {x.dtype for x in jax.tree.leaves(setting.params)} == {np.dtype(jnp.bfloat16)}
    assert setting.task.model.dtype == jnp.bfloat16
    program = experiment.compile_program(config, setting)
    (kept, others), held = wide_kernels(), []

    def advance():
        held.append(len(wide_kernels()[1] - others))

    short = make(method="flora", rounds=2, **types)
    experiment.run(short, setting, program, tmp_path / "half", advance)
    rows = experiment.run(config, setting, program, tmp_path / "half", advance)
    assert held[:2] == [1, 1] and held[-1] == 1
    del kept
    whole = run(make(method="flora"), tmp_path / "whole")
    for row, wanted in zip(rows, whole, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=0.01)
    assert rows[-1]["loss"] != whole[-1]["loss"]


@pytest.mark.parametrize("name", ["uniform", "heavy_tail_light", "heavy_tail_strong"])
def test_distributions_of_ranks(name):
    found = ranks.assign(name, 64, 100, seed=3)
    shares = [found.count(64 >> power) for power in range(5)]
    assert (
        shares
        == {
            "uniform": [20, 20, 20, 20, 20],
            "heavy_tail_light": [10, 10, 20, 20, 40],
            "heavy_tail_strong": [40, 20, 20, 10, 10],
        }[name]
    )
    other = ranks.assign(name, 64, 100, seed=4)
    assert sorted(other) == sorted(found) and other != found
    assert min(ranks.assign(name, 2, 100, seed=0)) == 1
    assert len(ranks.assign(name, 8, 7, seed=0)) == 7


def test_adapters_are_put_in_order_for_unequal_ranks_alone(make, monkeypatch):
    """Equal ranks must not pay for it."""
    wrapped = []
    monkeypatch.setattr(transforms, "ordered", lambda method: wrapped.append(method) or method)
    program.make_method(make())
    assert not wrapped
    program.make_method(make(**{"lora.ranks": "uniform"}))
    assert len(wrapped) == 1


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_pattern_is_no_head(base, make, nothing):
    """Not a pattern that is found everywhere."""
    config = make(**{"lora.head": nothing})
    method = program.make_method(config)
    trainable = first_state(config, base[1], method).server.trainable
    assert not trainable.head and trainable.adapters


def test_equal_and_listed_ranks():
    assert ranks.assign("equal", 4, 3, seed=0) == [4, 4, 4]
    assert ranks.assign("4, 2,1", 4, 3, seed=0) == [4, 2, 1]


def test_values_that_cannot_be_learned_from_are_refused_before_any_work(base, make, monkeypatch):
    config, ours = make(), base[1]
    changes = {
        "'label' of example 3 of the split 'test', and of 1 more, is no class 0 to 9": {
            "label": np.where(np.isin(np.arange(len(ours.test["label"])), (3, 5)), 10, 0)
        },
        "'image' of example 0 of the split 'test', and of .* more, is not finite": {
            "image": np.full(ours.test["image"].shape, np.nan, np.float32)
        },
        "the split 'test', on which models are judged, has no example of the domain .*noisy": {
            "domain": np.zeros_like(ours.test["domain"])
        },
    }
    load = setting._load
    monkeypatch.setattr(setting, "_backbone", lambda *_: pytest.fail("work was done"))
    for message, change in changes.items():

        def changed(config, split, change=change):
            arrays, domains = load(config, split)
            return (arrays | change if split == "test" else arrays), domains

        monkeypatch.setattr(setting, "_load", changed)
        with pytest.raises(ValueError, match=message):
            experiment.prepare(config)


def test_what_is_not_finite_is_null_in_the_metrics(base, make, tmp_path, monkeypatch):
    """Of clients that are left out, or of a loss that overflows."""
    config = make(rounds=1)
    program = experiment.compile_program(config, base[1])

    def sick(*arguments):
        server, states, measured = program.make_round(None)(*arguments)
        losses = measured.client_loss.at[0].set(jnp.nan)
        return server, states, measured._replace(loss=jnp.float32(jnp.inf), client_loss=losses)

    monkeypatch.setattr(chunking, "of_run", lambda *_: sick)
    (row,) = experiment.run(config, base[1], program, tmp_path)
    assert row["loss"] is None and row["client_loss"][0] is None and row["client_loss"][1] > 0

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_metrics_are_written_without_torch(tmp_path, monkeypatch):
    """Also where it is installed. Who wants it afterwards gets it, unless it was ruled out."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("tensorboardX", "torch"):
            monkeypatch.delitem(sys.modules, name)
    records.MetricsWriter(tmp_path, 0).close()
    with pytest.raises(RuntimeError, match="torch was imported"):
        importlib.import_module("torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    records.MetricsWriter(tmp_path, 0).close()
    assert sys.modules["torch"] is None


def test_what_hosts_may_not_differ_in_is_named(base, make, monkeypatch):
    """Each has its own checksums; another seed, and a backbone that is one bit away."""
    monkeypatch.setattr("fedlora_jax.experiment.hosts.are_several", lambda: True)
    shared = base[1]
    leaves, structure = jax.tree.flatten(shared.params)
    other = np.nextafter(np.asarray(leaves[0]), np.float32(9))
    changed = shared._replace(params=jax.tree.unflatten(structure, [other, *leaves[1:]]))
    mine = setting._alike(make(), shared)
    theirs = [setting._alike(make(), shared), setting._alike(make(seed=5), changed)]

    def check(number):
        everyone = np.array([[*mine.values()], [*theirs[number].values()]], np.uint32)
        monkeypatch.setattr("jax.process_count", lambda: 2)
        monkeypatch.setattr(hosts.multihost_utils, "process_allgather", lambda x: everyone)
        hosts.check_same(mine)

    check(0)
    with pytest.raises(ValueError, match="hosts differ in settings and backbone: give all"):
        check(1)
