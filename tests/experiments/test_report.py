"""Tables and plots from metrics."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from experiments.shared import apps, plots, report
from fedlora_jax import locks
from fedlora_jax.experiment.partitions import Overview
from fedlora_jax.federated import metrics

DOMAINS = ["original", "noisy"]
ACCURACY = metrics.get("accuracy")


def rounds(method, seed, accuracies, error=0.1, clients=3, **fields):
    """The metrics of a run: a row a round, as `experiment.run` writes it."""
    return [
        {
            "round": index,
            "method": method,
            "seed": seed,
            "accuracy": accuracy,
            "domain_accuracy": {"original": accuracy + 0.1, "noisy": accuracy - 0.1},
            "personal_accuracy": accuracy + 0.05,
            "loss": 1.0,
            "aggregation_error": error,
            "excluded_clients": 0,
            "megabytes_up": 1.0 + index,
            "megabytes_down": 2.0,
            "megabytes_catch_up": 0.0,
            "epsilon": None,
            "seconds": 0.5,
            "cohort": list(range(clients)),
            "client_loss": [1.0] * clients,
            "client_accuracy": [accuracy] * clients,
            **fields,
        }
        for index, accuracy in enumerate(accuracies)
    ]


@pytest.fixture
def runs():
    return {
        "local": [rounds("local", s, [0.3, 0.4 + s / 100], error=None) for s in range(3)],
        "fedit": [rounds("fedit", s, [0.4, 0.5 + s / 50]) for s in range(3)],
    }


def columns(runs, rates=None):
    head, rows = report.table(runs, rates or dict.fromkeys(runs, 0.1), ACCURACY)
    return {name: [row[i] for row in rows] for i, name in enumerate(head)}


def test_table(runs):
    assert columns(runs) == {
        "method": ["local", "fedit"],
        "accuracy %": ["41.0 ± 1.0", "52.0 ± 2.0"],
        "original": ["51.0", "62.0"],
        "noisy": ["31.0", "42.0"],
        "personal %": ["46.0 ± 1.0", "57.0 ± 2.0"],
        "agg. error": ["-", "0.1000"],
        "MB up": ["1.50", "1.50"],
        "MB down": ["2.00", "2.00"],
        "s / round": ["0.50", "0.50"],
    }


def test_columns_that_only_some_studies_have(runs):
    runs["flora"] = [
        rounds("flora", s, [0.4, 0.5], megabytes_catch_up=1.5, epsilon=8.125) for s in range(3)
    ]
    found = columns(runs, {"local": 0.1, "fedit": 0.02, "flora": 0.1})
    assert found["MB catch-up"] == ["0.00", "0.00", "1.50"]
    assert found["epsilon"] == ["-", "-", "8.12"]
    assert found["learning rate"] == ["0.1", "0.02", "0.1"]


def test_metrics_of_older_versions(runs):
    for row in (row for seeds in runs.values() for each in seeds for row in each):
        for field in ("personal_accuracy", "megabytes_catch_up", "epsilon", "client_accuracy"):
            del row[field]
    assert not {"personal %", "MB catch-up", "epsilon"} & columns(runs).keys()


def test_paired_table(runs):
    lines = report.render_paired(runs, "fedit", ACCURACY).splitlines()
    assert lines[0].split() == "minus fedit points 95% interval higher on p (Holm)".split()
    # Differences -10, -11, -12: mean -11, standard error 1 / sqrt(3), t(0.975, 2) = 4.303.
    assert lines[2].split()[:5] == ["local", "-11.00", "-13.48", "to", "-8.52"]
    assert "0 of 3" in lines[2]


def test_what_is_compared_with_what(runs):
    assert report.reference_of(runs) == "fedit"
    assert report.reference_of({"flora": [[], []], "local": [[], []]}) == "flora"
    assert report.reference_of({"fedit": runs["fedit"]}) is None
    assert report.reference_of({name: seeds[:1] for name, seeds in runs.items()}) is None
    one_seed = {name: seeds[:1] for name, seeds in runs.items()}
    assert "minus" not in report.summary(one_seed, study(dict.fromkeys(runs, 0.1)))


def test_a_method_that_ends_without_a_number_is_compared_with_nothing(runs, tmp_path):
    """A loss that overflowed, or the correlation of a constant."""
    runs |= {name: [rounds(name, s, [0.4, 0.5]) for s in range(3)] for name in ("flora", "fedsvd")}
    runs["frlora"] = [rounds("frlora", s, [0.3, 0.4]) for s in range(3)]
    runs["frlora"][1][-1] |= {
        "accuracy": None,
        "domain_accuracy": {"original": None, "noisy": None},
        "personal_accuracy": None,
    }
    known = study(dict.fromkeys(runs, 0.1))
    text = report.write(tmp_path, runs, known).read_text()
    assert "Of frlora the accuracy after the last round is no number under some seed" in text
    against = text.split("## Against fedit")[1]
    assert "frlora" not in against and "for the 3 comparisons" in against
    assert report.summary(runs, known).count("frlora") == 1
    assert (tmp_path / "error_and_accuracy.png").exists()


def test_domains_may_have_any_name(runs, tmp_path):
    for row in (row for seeds in runs.values() for each in seeds for row in each):
        row["domain_accuracy"] = {"method": 0.125, "personal %": 0.25, "US$_$": 0.375}
    head, rows = report.table(runs, dict.fromkeys(runs, 0.1), ACCURACY)
    assert head[2:6] == ["method", "personal %", "US$_$", "personal %"]
    assert rows[0][0] == "local" and rows[0][2:6] == ["12.5", "25.0", "37.5", "46.0 ± 1.0"]
    for methods in (runs, {f"m{i}": runs["local"] for i in range(7)}):
        plot = plots.domains(methods, ACCURACY)
        plots.save(tmp_path, {"domains": plot})
        shown = [label.get_text() for label in plot.figure.axes[0].get_xticklabels()]
        assert "US\\$_\\$" in shown


def test_rounds_that_were_not_evaluated_leave_no_gap(runs):
    for seeds in runs.values():
        for each in seeds:
            each.insert(0, {k: v for k, v in each[0].items() if "accuracy" not in k})
    lines = plots.over_rounds(runs, ACCURACY).figure.axes[0].get_lines()
    assert [line.get_xdata().tolist() for line in lines] == [[2, 3]] * 2
    sent = plots.over_megabytes(runs, ACCURACY).figure.axes[0].get_lines()
    assert [line.get_xdata().tolist() for line in sent] == [[6, 10]] * 2
    np.testing.assert_allclose(sent[1].get_ydata(), [40, 52])
    first = json.loads(report.curves(runs, ACCURACY).splitlines()[0])
    assert first["accuracy"] == [None, 0.3, 0.4]


def test_a_round_without_answers_is_in_no_mean(runs):
    runs["fedit"][0][0] |= {"loss": None, "aggregation_error": None}
    assert columns(runs)["agg. error"] == ["-", "0.1000"]
    assert '"aggregation_error": [null, 0.1]' in report.curves(runs, ACCURACY)


def study(rates):
    clients = Overview(np.ones((4, 2, 3), int), np.full((2, 3), 4), tuple(DOMAINS))
    return report.Study("the command", clients, 1200, rates, ACCURACY)


def test_report_of_many_methods(tmp_path):
    names = [f"method_{i}" for i in range(18)]
    runs = {
        name: [
            rounds(name, s, [0.3, 0.5 + i / 100 + (i * s % 5) / 500], error=0.3 - i / 100)
            for s in range(2)
        ]
        for i, name in enumerate(names)
    }
    runs["method_0"] = [rounds("method_0", s, [0.9, 0.9], error=0.0, clients=1) for s in range(2)]
    text = report.write(tmp_path, runs, study(dict.fromkeys(names, 0.1))).read_text()
    for name in ("accuracy", "paired", "domains", "aggregation_error", "error_and_accuracy"):
        assert f"({name}.png)" in text and (tmp_path / f"{name}.png").stat().st_size > 1000
    assert "| 3        | 2 domains |" in text and "4 clients with 24 of 24" in text
    assert "corrected by Holm for the 17 comparisons" in text and "the same 1,200" in text
    # The method on pooled data is not among those that aggregate.
    assert "over the 17 methods that aggregate, within each seed: mean -" in text
    assert len({tuple(look.items()) for look in plots.styles(names).values()}) == 18


def test_a_line_for_each_run_has_what_differences_need(tmp_path, runs):
    report.write(tmp_path, runs, study(dict.fromkeys(runs, 0.1)))
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(x["method"], x["seed"]) for x in lines] == [(m, s) for m in runs for s in range(3)]
    assert lines[1] == {
        "method": "local",
        "seed": 1,
        "accuracy": [0.3, 0.41],
        "aggregation_error": [None, None],
    }
    assert lines[-1]["aggregation_error"] == [0.1, 0.1]


def test_a_report_waits_for_another_process_that_writes_there(tmp_path, runs):
    # Both have `report.md.part`, and the second one to give it its name would find it gone.
    waits = pytest.warns(UserWarning, match="waiting for .* in use by")
    with ThreadPoolExecutor() as pool, waits as said:
        with locks.held(tmp_path, tmp_path / ".lock"):
            second = pool.submit(report.write, tmp_path, runs, study(dict.fromkeys(runs, 0.1)))
            while not said and not second.done():
                time.sleep(0.01)
            assert not second.done() and not list(tmp_path.glob("*.p*"))
        assert second.result() == tmp_path / "report.md"
    assert second.result().exists()


def test_report_of_few_methods(tmp_path, runs):
    only_local = {"local": runs["local"][:1]}
    text = report.write(tmp_path, only_local, study({"local": 0.1})).read_text()
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {"accuracy", "accuracy_and_megabytes", "domains", "partition"}
    assert "Against" not in text and "one standard deviation over seeds" not in text


def test_map_of_domains_shows_every_number_sorted():
    runs = {f"m{i}": [rounds(f"m{i}", 0, [0.2 + i / 20])] for i in range(7)}
    axes = plots.domains(runs, ACCURACY).figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"m{6 - i}" for i in range(7)]
    texts = [text.get_text() for text in axes.texts]
    assert texts[:3] == ["50.0", "60.0", "40.0"] and len(texts) == 7 * 3


def test_accuracy_over_megabytes():
    runs = {
        "flora": [rounds("flora", s, [0.4, 0.6], megabytes_catch_up=1.5) for s in range(2)],
        "local": [rounds("local", 0, [0.5, 0.6])],
    }
    for row in runs["local"][0]:
        row.update(megabytes_up=0.0, megabytes_down=0.0)
    (line,) = plots.over_megabytes(runs, ACCURACY).figure.axes[0].lines
    assert line.get_label() == "flora"
    np.testing.assert_allclose(line.get_xdata(), [4.5, 10])
    np.testing.assert_allclose(line.get_ydata(), [40, 60])
    assert plots.over_megabytes({"local": runs["local"]}, ACCURACY) is None


def test_correlation_of_error_with_accuracy():
    accuracies = {"a": [0.5, 0.8], "b": [0.4, 0.7], "c": [0.45, 0.6]}
    runs = {
        name: [rounds(name, s, [x], error=0.1 + 0.1 * i) for s, x in enumerate(each)]
        for i, (name, each) in enumerate(accuracies.items())
    }
    plot = plots.error_against(runs, ACCURACY)
    assert plot.caption.endswith("mean -0.75, from -1.00 to -0.50")
    assert plots.error_against({name: runs[name] for name in "ab"}, ACCURACY) is None


def test_names_of_methods():
    assert apps.method_names(["fedit", "local", "fedit"]) == ["fedit", "local"]
    everything = apps.method_names(["fedsvd", "all"])
    assert everything[0] == "fedsvd" and len(everything) == len(set(everything)) > 15
    with pytest.raises(ValueError, match="Did you mean 'lora_fair'"):
        apps.method_names(["lorafair"])
    with pytest.raises(ValueError, match="names none"):
        apps.method_names([])


def test_learning_rates_from_a_file(tmp_path):
    path = tmp_path / "learning_rates.json"
    path.write_text('{"learning_rates": {"fedit": 0.02, "flora_na": 0.06}}')
    assert apps.read_learning_rates(path, ["fedit"]) == {"fedit": 0.02}
    with pytest.raises(ValueError, match=r"no learning rate of flora \(.* flora_na\), central\."):
        apps.read_learning_rates(path, ["flora", "fedit", "central"])
    path.write_text("[]")
    with pytest.raises(ValueError, match="no file of experiments.tune"):
        apps.read_learning_rates(path, ["fedit"])
    for bad in ('"0.02"', "null", "0", "[0.02]", "true"):
        path.write_text(f'{{"learning_rates": {{"fedit": {bad}, "local": 0.02}}}}')
        with pytest.raises(ValueError, match="rates.json: the learning rate of fedit must be"):
            apps.read_learning_rates(path, ["local", "fedit"])
        assert apps.read_learning_rates(path, ["local"]) == {"local": 0.02}


def test_server_steps_from_a_file(tmp_path):
    path = tmp_path / "learning_rates.json"
    path.write_text('{"server_steps": {"fedit": 2, "local": null}}')
    assert apps.read_server_steps(path) == {"fedit": 2, "local": None}
    path.write_text('{"server_steps": {"fedit": "2"}}')
    with pytest.raises(ValueError, match="rates.json: the server step of fedit must be"):
        apps.read_server_steps(path)


def test_report_where_lower_is_better(tmp_path):
    def of_language(method, seed, values):
        return [
            {
                **row,
                "nll": value,
                "domain_nll": {"original": value + 0.1, "noisy": value - 0.1},
                "personal_nll": None,
            }
            for row, value in zip(rounds(method, seed, [0, 0]), values, strict=True)
        ]

    runs = {
        "fedit": [of_language("fedit", s, [3.0, 2.5 + s / 100]) for s in range(3)],
        "flora": [of_language("flora", s, [3.0, 2.25 + s / 50]) for s in range(3)],
        "fedsvd": [of_language("fedsvd", s, [3.0, 2.75]) for s in range(3)],
    }
    nll = metrics.get("nll")
    untouched = {"nll": 3.25, "domain_nll": {"original": 3.5, "noisy": 3.0}, "personal_nll": 3.125}
    known = study(dict.fromkeys(runs, 0.1))._replace(metric=nll, untouched=untouched)
    text = report.write(tmp_path, runs, known).read_text()
    assert "ccuracy" not in text
    assert "lower is better" in text and "Nll minus that of fedit" in text
    head, rows = report.table(runs, known.learning_rates, nll, untouched)
    assert head[:4] == ["method", "nll nats/token", "original", "noisy"]
    assert rows[0] == ["untouched model", "3.250", "3.500", "3.000", *["-"] * (len(head) - 4)]
    assert rows[2][:2] == ["flora", "2.270 ± 0.020"]
    lines = report.render_paired(runs, "fedit", nll).splitlines()
    assert "lower on" in lines[0] and "nats/token" in lines[0]
    assert "-0.2400" in lines[2] and "3 of 3" in lines[2] and "0 of 3" in lines[3]
    assert (tmp_path / "nll.png").exists() and (tmp_path / "error_and_nll.png").exists()
    best_on_top = plots.domains(runs, nll).figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in best_on_top] == ["flora", "fedit", "fedsvd"]
