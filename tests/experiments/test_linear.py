"""`experiments.linear`: its optimum, its programs, and what it leaves on disk."""

import json
import re
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import linear
from experiments.linear_study import problem, program, report, results, study
from experiments.linear_study.program import Dials, Outcome, Run
from experiments.linear_study.results import Key
from fedlora_jax import methods, transforms
from fedlora_jax.checksums import Damaged
from fedlora_jax.data.clients import client_data
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.round import Recipe, create, make_round

DIALS = Dials(heterogeneity=1.0, clients=3, rank=2, local_steps=3, momentum=0.0)


def small(**changes):
    """Three clients and a kernel of 8 x 6."""
    config = linear.get_config("runlocal")
    config.problem.update(inputs=8, outputs=6, examples=10)
    config.base.update(**DIALS._asdict())
    config.dials.update(
        heterogeneity=(0.0, 1.0), clients=(3,), rank=(2,), local_steps=(1, 3, 4), momentum=(0.0,)
    )
    config.local.batch_size = 5
    config.runs_at_once = 4
    config.update(changes)
    return config


def loss(drawn, kernel):
    """The mean over clients of half the mean squared distance, from the examples themselves."""
    x, y = drawn.x.astype(np.float64), drawn.y.astype(np.float64)
    return np.mean([np.mean(np.sum((a @ kernel - b) ** 2, axis=1)) / 2 for a, b in zip(x, y)])


@pytest.mark.parametrize("heterogeneity", [0.0, 2.0])
def test_optimum(heterogeneity):
    """Against NumPy's least squares, and excess against losses of examples."""
    sizes = {"clients": 3, "inputs": 8, "outputs": 6, "examples": 10}
    drawn = problem.draw(1, heterogeneity=heterogeneity, **sizes)
    x, y = drawn.x.reshape(-1, 8).astype(np.float64), drawn.y.reshape(-1, 6).astype(np.float64)
    np.testing.assert_allclose(drawn.optimum, np.linalg.lstsq(x, y)[0], rtol=1e-9, atol=1e-12)
    kernel = np.random.default_rng(0).normal(size=(8, 6))
    direct = loss(drawn, kernel) - loss(drawn, drawn.optimum)
    found = problem.excess(kernel, drawn.optimum, drawn.curvature)
    np.testing.assert_allclose(found, direct, rtol=1e-9)
    # No descent on factors of rank 2 ends lower, and full rank leaves nothing.
    least = problem.best_of_rank(drawn, 2)
    relative = 1 / problem.excess(drawn.pretrained, drawn.optimum, drawn.curvature)
    reached = relative * descended(drawn, 2)
    assert least <= reached * (1 + 1e-9) and reached == pytest.approx(least, rel=1e-3)
    assert problem.best_of_rank(drawn, 6) == 0
    # Another heterogeneity is another problem from the same draws.
    other = problem.draw(1, heterogeneity=0.5, **sizes)
    np.testing.assert_array_equal(other.pretrained, drawn.pretrained)
    assert np.ptp(other.y - drawn.y) > 0.1
    with pytest.raises(ValueError, match="do not determine a kernel of 8 inputs"):
        problem.draw(1, clients=1, heterogeneity=0.0, inputs=8, examples=7)


def descended(drawn, rank):
    """The excess loss after alternating least squares on factors of that rank."""
    b = np.random.default_rng(0).normal(size=(rank, drawn.optimum.shape[1]))
    wanted, h = drawn.optimum - drawn.pretrained, drawn.curvature
    for _ in range(500):
        a = wanted @ np.linalg.pinv(b)
        b = np.linalg.solve(a.T @ h @ a, a.T @ h @ wanted)
    return problem.excess(drawn.pretrained + a @ b, drawn.optimum, h)


@pytest.mark.parametrize(("name", "steps"), [("central", 20), ("fedex_lora", 1)])
def test_of_full_rank_the_optimum_is_reached(name, steps):
    config = small(rounds=600 // steps, runs_at_once=1)
    # No saddle on the way: a of 6 x 6 leaves b to solve it.
    config.problem.update(inputs=6, outputs=8)
    config.local.batch_size = 10  # All of a client's.
    dials = DIALS._replace(rank=6, local_steps=steps)
    (outcome,) = program.make_runner(config)(name, dials, [Run(0.1, 1.0, 0)])
    assert outcome.error < 1e-3 and outcome.aggregation_error < 1e-4


def test_runs_at_once_are_those_of_single_rounds():
    config = small()
    points = [(0.02, 1.0, 0), (0.05, 2.0, 1), (0.05, 1.0, 0), (0.1, 1.5, 5)]
    runs = [Run(*point) for point in points]
    found = program.make_runner(config)("fedit", DIALS, runs)
    assert len({outcome.error for outcome in found}) == 4
    assert found[1].error == pytest.approx(by_hand(config, runs[1]), rel=1e-4)


def by_hand(config, run):
    """The error of `fedit` after the rounds of a run, one compiled round after the other."""
    drawn = problem.draw(
        run.seed, clients=DIALS.clients, heterogeneity=DIALS.heterogeneity, **config.problem
    )
    examples = {"x": drawn.x.reshape(-1, 8), "y": drawn.y.reshape(-1, 6)}
    data = client_data(examples, np.split(np.arange(30), 3))
    method = transforms.server_step(methods.fedit(), rate=run.step)
    optimizer = program.configured.optimizer(config.local)
    training = LocalTraining(optimizer, config.local.batch_size, DIALS.local_steps)
    key = jax.random.key(run.seed)
    server = program.first_server(key, jnp.asarray(drawn.pretrained), DIALS.rank, 2.0)
    federation = create(program.randomness.stream(key, "method"), method, server, 3)
    one_round = make_round(Recipe(program.make_task(6), method, training))
    for index in range(config.rounds):
        rate = run.rate * (1 + np.cos(np.pi * index / config.rounds)) / 2
        federation, _ = one_round(federation, data, jnp.arange(3), key, rate)
    kernel = np.asarray(program.kernel_of(federation.server), np.float64)
    return (loss(drawn, kernel) - loss(drawn, drawn.optimum)) / (
        loss(drawn, drawn.pretrained) - loss(drawn, drawn.optimum)
    )


class Fake:
    """Runs that take no time; the error follows from the run, and a large rate diverges."""

    def __init__(self):
        self.ran = []

    def __call__(self, config):
        return self.outcomes

    def outcomes(self, name, dials, runs):
        self.ran += [Key(name, dials, run) for run in runs]
        return [self.outcome(name, dials, run) for run in runs]

    @staticmethod
    def outcome(name, dials, run):
        # Steps of 1 are better, and so is the larger rate, but it diverges under a seed.
        if run.rate > 0.05 and run.seed == (100 if name == "fedit" else 102):
            return Outcome(float("nan"), 0.0)
        digit = (len(name) + run.seed + dials.local_steps) % 7 + 1
        return Outcome(digit * 0.01 * (run.step or 1) * (0.5 if run.rate > 0.05 else 1), 0.123456)


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(study, "make_runner", fake)
    return fake


def test_it_goes_on_after_a_cut_line(fake, tmp_path):
    config, names = small(), ["fedit", "central"]
    text = study.run_study(config, tmp_path, names).read_text()
    whole, every = (tmp_path / results.RUNS).read_bytes(), set(fake.ran)
    # Four settings; two rates, two steps of fedit, the finalist again (of central the next best
    # too), and two seeds.
    assert len(fake.ran) == len(every) == 4 * (4 + 1 + 2 + 2 + 2 + 2)
    fake.ran.clear()
    (tmp_path / results.RUNS).write_bytes(whole[: whole[:-1].rfind(b"\n") + 30])
    assert study.run_study(config, tmp_path, names).read_text() == text
    assert len(fake.ran) == 1 and set(fake.ran) < every
    assert (tmp_path / results.RUNS).read_bytes() == whole
    fake.ran.clear()
    # More seeds and settings join what is there.
    config.seeds = 3
    study.run_study(config, tmp_path, names)
    assert len(fake.ran) == 8 and {key.run.seed for key in fake.ran} == {2}


def test_what_is_not_as_written_is_named(fake, tmp_path):
    config = small()
    study.run_study(config, tmp_path, ["fedit"])
    path = tmp_path / results.RUNS
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace('"rate": 0.0', '"rate": 0.9')
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(Damaged, match="line 3 of .* is not what was written"):
        study.run_study(config, tmp_path, ["fedit"])
    config.problem.noise = 0.7
    with pytest.raises(ValueError, match="config.problem.noise is 0.1 there, 0.7 here"):
        study.run_study(config, tmp_path, ["fedit"])
    with pytest.raises(ValueError, match="some of the seeds 0 to 100"):
        study.run_study(small(seeds=101), tmp_path, ["fedit"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": 0}, "config.seeds must be at least 1, got 0"),
        ({"finalists": 0}, "config.finalists must be at least 1, got 0"),
        ({"runs_at_once": 0}, "config.runs_at_once must be at least 1, got 0"),
        ({"learning_rates": ()}, r"config.learning_rates must be at least 1 number, .* got \(\)"),
        ({"learning_rates": (0.1, -0.1)}, "config.learning_rates must be above 0, got -0.1"),
        ({"server_steps": ()}, "config.server_steps must be at least 1 number"),
        ({"tuning_seeds": ()}, "config.tuning_seeds must be at least 1 number"),
        ({"confirming_seeds": (-1,)}, "config.confirming_seeds must be from 0 to"),
        ({"local.batch_size": -3}, "config.local.batch_size must be at least 1, got -3"),
        ({"lora.scale": -1.0}, "config.lora.scale must be above 0, got -1.0"),
        ({"base.local_steps": 0}, "config.base.local_steps must be at least 1, got 0"),
        ({"dials.local_steps": (4, 0)}, "config.dials.local_steps must be at least 1, got 0"),
        ({"dials.momentum": (1.0,)}, "config.dials.momentum must be at least 0 and below 1"),
        ({"problem.noise": -1.0}, "config.problem.noise must be at least 0, got -1.0"),
        ({"local.optimizer": "adm"}, "unknown optimizer 'adm'. Did you mean 'adamw'"),
        ({"local.schedule": "cosin"}, "unknown schedule 'cosin'. Did you mean 'cosine'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(fake, tmp_path, values, message):
    config = small()
    config.update_from_flattened_dict(values)
    with pytest.raises(ValueError, match=message):
        study.run_study(config, tmp_path, ["fedit"])
    assert not fake.ran and not list(tmp_path.iterdir())


def test_a_configuration_without_a_run_does_not_keep_others_out(fake, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(fake, "outcomes", Mock(side_effect=RuntimeError("out of memory")))
        study.run_study(small(rounds=1000), tmp_path, ["fedit"])
    study.run_study(small(), tmp_path, ["fedit"])
    with pytest.raises(ValueError, match="config.rounds is 3 there, 1000 here"):
        study.run_study(small(rounds=1000), tmp_path, ["fedit"])


def test_no_dial_has_to_be_turned(fake, tmp_path):
    config = small(confirming_seeds=())
    config.dials.update(dict.fromkeys(DIALS._fields, ()))
    study.run_study(config, tmp_path, ["fedit"])
    assert len(fake.ran) == 4 + 2


def test_the_report_says_what_the_runs_say(fake, tmp_path):
    """Every number of the tables again, from the lines on disk."""
    text = study.run_study(small(seeds=3), tmp_path, ["fedit", "ffa_lora"]).read_text()
    rows = [json.loads(line) for line in (tmp_path / results.RUNS).read_text().splitlines()]

    def errors(method, **dials):
        setting = {**DIALS._asdict(), **dials}
        mine = [r for r in rows if r["method"] == method and r["setting"] == setting]
        final = [r for r in mine if r["seed"] < 100]
        assert {(r["rate"], r["step"]) for r in final} == {(0.02, 1.0)}
        assert any(r["error"] is None for r in mine if r["rate"] > 0.05)
        return np.array([r["error"] for r in sorted(final, key=lambda r: r["seed"])])

    def table(head):
        lines = text[text.index(f"| {head}") :].split("\n\n")[0].splitlines()[2:]
        return {row[0]: row[1:] for row in (re.split(r"\s*\|\s*", x.strip("| ")) for x in lines)}

    base = table("method")
    for name in ("fedit", "ffa_lora"):
        mean, ends = np.exp(np.log(errors(name)).mean()), [f(errors(name)) for f in (min, max)]
        assert base[name][0] == f"{100 * mean:.3g}"
        assert base[name][1] == " to ".join(f"{100 * end:.3g}" for end in ends)
        assert base[name][5:8] == ["0.02 *", "1 *", "0.1235"]
    ratio = np.exp(np.log(errors("ffa_lora") / errors("fedit")).mean())
    assert base["ffa_lora"][2] == f"{ratio:.3f}" and base["fedit"][2] == "-"
    # a and b of rank 2, 4 bytes a number; ffa_lora sends b alone.
    assert base["fedit"][-2:] == [f"{4 * 2 * 14 / 1000:.2f}"] * 2
    assert base["ffa_lora"][-2:] == [f"{4 * 2 * 6 / 1000:.2f}"] * 2
    logs = [
        np.log(errors("ffa_lora", **turned) / errors("fedit", **turned))
        for turned in [{}, {"heterogeneity": 0.0}, {"local_steps": 1}, {"local_steps": 4}]
    ]
    everywhere = text[text.index("## All settings") :]
    half = [4.302653 * x.std(ddof=1) / np.sqrt(3) for x in logs]  # Student's t, two degrees.
    better = sum(x.mean() + h < 0 for x, h in zip(logs, half))
    worse = sum(x.mean() - h > 0 for x, h in zip(logs, half))
    (line,) = [x for x in everywhere.splitlines() if x.startswith("| ffa_lora")]
    assert re.split(r"\s*\|\s*", line.strip("| "))[1:] == [
        *(f"{np.exp(np.mean(logs)):.3f}", str(better), str(worse), "4")
    ]
    along = table("local steps")
    assert len(set(along.pop("best of the rank"))) == 1
    for name, cells in along.items():
        wanted = [100 * np.exp(np.log(errors(name, local_steps=n)).mean()) for n in (1, 3, 4)]
        assert cells == [f"{error:.3g} (0.123)" for error in wanted]
    assert (tmp_path / "local_steps.png").exists() and not (tmp_path / "rank.png").exists()
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (
        len(found["rows"]) == 8
        and found["rows"][0]["errors"]
        == errors(found["rows"][0]["method"], **found["rows"][0]["dials"]).tolist()
    )


def test_methods():
    config = linear.get_config()
    names = study.method_names(config, ["all"])
    assert {"fedit", "central", "flora", "lora_fair_lambda_0"} < set(names)
    assert not {"local", "fedsa_lora", "oracle", "spectral"} & set(names)
    assert study.method_names(config, ["oracle", "oracle"]) == ["oracle"]
    with pytest.raises(ValueError, match="local has no model for all"):
        study.method_names(config, ["local"])
    with pytest.raises(ValueError, match="fedit"):
        study.method_names(config, ["fedti"])


def test_every_setting_is_one_turn_away_from_the_base():
    settings = study.settings_of(linear.get_config())
    base = settings[0]
    assert len(set(settings)) == len(settings)
    assert all(sum(np.not_equal(each, base)) == 1 for each in settings[1:])
    assert report.title(base, base) == "base"


def test_as_a_user_starts_it(program, tmp_path):
    sizes = ("inputs=8", "outputs=8", "examples=20")
    status, printed, errors = program.run(
        "linear",
        "--config=configs/linear.py:runlocal",
        f"--workdir={tmp_path}",
        "--methods=fedit",
        *(f"--config.problem.{size}" for size in sizes),
        "--config.dials.rank=(4,)",
    )
    assert status == 0, errors
    assert "fedit, base: " in printed
    (row,) = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert len(row["errors"]) == 2 and all(0 < error < 1 for error in row["errors"])
