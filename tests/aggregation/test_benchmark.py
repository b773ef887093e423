"""The benchmark runs, on kernels of no size, and its dense reference is right."""

import sys

import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import aggregation, growth, memory, programs, rounds
from fedlora_jax.aggregation import REGISTRY
from fedlora_jax.models import ViT
from tests.aggregation import oracles

SIZE = aggregation.Size(clients=3, rank=2, layers=2, seed=0, repeats=1)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(aggregation, "KERNELS", {"q": (12, 12), "k": (12, 8), "v": (12, 8)})


@pytest.mark.parametrize("row", ["fedit", "flexlora", "fedrot_lora"])
def test_a_row(small, row):
    line = aggregation.measure(row, SIZE)
    assert line["best_s"] > 0 and line["stacked_bytes"] == 4 * 3 * 2 * 2 * (24 + 20 + 20)
    assert 0 < line["error"] < 1


@pytest.mark.filterwarnings("error::fedlora_jax.aggregation.UnequalFactors")
@pytest.mark.parametrize("row", aggregation.COMMON_A)
def test_a_row_of_clients_who_share_a(small, row):
    """Of whose products the mean is exact."""
    assert aggregation.measure(row, SIZE)["error"] < 1e-6


def test_no_row_has_a_comma_which_the_command_line_takes_for_another_row():
    assert not [name for name in (*aggregation.ROWS, *memory.LOSSES) if "," in name]


def test_the_report(small):
    results = {
        "environment": benchmark.environment(*benchmark.OF_AGGREGATION),
        "ours": {"flexlora": aggregation.measure("flexlora", SIZE)},
        "dense": {
            "svd_lowrank": {"best_s": 1.0, "extrapolated": "yes", "kinds": {}},
        },
    }
    page = aggregation.page(results)
    assert "flexlora" in page and "~1 s" in page and "6 kernels" not in page


def test_the_page_of_growth_says_where_it_was_measured():
    rows = {"fedit": {"exponent": 0.5}}
    environment = benchmark.environment(benchmark._REPEATS)
    page = growth.page({"environment": environment, "growth": {"K": rows, "r": rows}})
    assert "the best of 5 calls" in page and f"{environment['date']}, cpu" in page


def test_the_program_of_a_round(monkeypatch):
    small = {"vocab_size": 32, "width": 8, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 12}
    monkeypatch.setattr(programs, "SMOLLM2", {**small, "tied": True})
    line = programs.measure("fedit", blocks=1, clients=2, rank=2)
    assert line["lines"] > 1000 and line["compile_s"] > 0 and line["peak_bytes"] > 10**8
    assert line["held_bytes"] > 0 and line["working_bytes"] > 0
    facts = benchmark.environment(*benchmark.OF_PROGRAMS)
    page = programs.page({"environment": facts, "methods": {"fedit": line}})
    assert "| fedit" in page and str(line["lines"]) in page


@pytest.fixture
def tiny_round():
    """Our side of a round of no size."""
    model = ViT(num_classes=3, patch_size=4, width=8, depth=1, num_heads=2)
    tiny = {"model": model, "shape": (8, 8, 1), "clients": 3, "batch_size": 2, "steps": 2}
    case = rounds.CASES["digits"]._replace(**tiny, targets=("attention/query",), rank=2)
    side, compute, _ = rounds.ours(case, case.clients, ["all", "2"])
    return case, side, compute


def test_a_round_beside_another(tiny_round):
    case, side, compute = tiny_round
    whole, chunked = compute("all"), compute("2")
    assert np.isfinite(whole[1].loss) and not whole[1].excluded
    np.testing.assert_allclose(whole[1].client_loss, chunked[1].client_loss, rtol=1e-5)
    compute("server")

    torch = rounds.Side(dict(parameters=side.facts["parameters"]), lambda what: 100.0)
    sides = {"ours": (side, ["all", "2", "server"]), "torch": (torch, ["round"])}
    measured = rounds.compare(sides, 2)
    assert all(len(times) == 2 for times in measured["ours"]["seconds"].values())
    line = rounds.summary(case, measured)
    assert line["fastest_s"] <= line["all_s"] and line["server_share"] > 0
    assert line["rate"] == rounds.operations(case) / line["fastest_s"]
    assert 0 < line["share_of_matrix_rate"] == line["rate"] / side.facts["matrix_rate"]
    assert line["ratio_fastest"] == 100 / line["fastest_s"] >= line["ratio_all"] > 1

    measured = {"case": case._asdict(), **measured, "summary": line}
    page = rounds.report(
        {
            "environment": benchmark.environment(),
            "cases": {"digits": measured},
            "per_client": {"3": rounds.compare({"ours": (side, ["all"])}, 1)},
        }
    )
    assert f"{side.facts['parameters']:,}" in page and f"{line['ratio_all']:.2f}" in page
    assert "ms a client" in page

    other = rounds.Side({"parameters": 1}, lambda what: 1.0)
    with pytest.raises(ValueError, match=r"different numbers of parameters: .*'torch': 1"):
        rounds.compare({"ours": (side, ["all"]), "torch": (other, ["round"])}, 1)


def test_a_side_in_a_process_of_its_own():
    program = """
import sys
print('{"parameters": 2}', flush=True)
for line in sys.stdin:
    print({"all": 0.5}[line.strip()], flush=True)
"""
    with rounds.opened([sys.executable, "-c", program]) as side:
        assert side.facts == {"parameters": 2} and side.seconds("all") == 0.5
        with pytest.raises(RuntimeError, match="KeyError: 'some'"):
            side.seconds("some")


def test_sizes_of_chunks():
    assert rounds.sizes(["4", "all", "4", "1"]) == ["all", "4", "1"]
    for wrong in ("0", "-1", "two"):
        with pytest.raises(ValueError, match=f"--chunks={wrong}: expected"):
            rounds.sizes([wrong])


def test_every_row_names_a_function_and_dense_code():
    pytest.importorskip("torch")
    from experiments.benchmarks import dense

    for name, _, reference in aggregation.ROWS.values():
        assert name in REGISTRY
        assert not reference or callable(getattr(dense, reference))


def test_dense_reference():
    torch = pytest.importorskip("torch")
    from experiments.benchmarks import dense

    node = aggregation.adapters(0, 3, 2, {"k": (12, 8)})["k"]
    a, b = (np.array(x, np.float64) for x in node)
    p = np.array([0.2, 0.3, 0.5])
    given = [torch.from_numpy(np.array(x)) for x in node] + [torch.tensor(p, dtype=torch.float32)]

    def product(pair):
        return pair.numpy() if not isinstance(pair, tuple) else (pair[0] @ pair[1]).numpy()

    wanted = {
        "means": oracles.fedit(a, b, p),
        "stacking": oracles.ideal(a, b, p),
        "mean_of_products": oracles.ideal(a, b, p),
        "fedex": oracles.ideal(a, b, p) - oracles.fedit(a, b, p),
        "svd_lowrank": oracles.flexlora(a, b, p),
        "svd_full": oracles.flexlora(a, b, p),
        "svd_by_qr": oracles.flexlora(a, b, p),
    }
    for name, want in wanted.items():
        np.testing.assert_allclose(product(getattr(dense, name)(*given)), want, atol=1e-4)
    fair = product(dense.fair_sgd(20)(*given))
    np.testing.assert_allclose(fair, oracles.lora_fair(a, b, p, steps=20, units="raw"), atol=1e-4)
    near = product(dense.flora_na_descent(300)(*given))
    ideal = oracles.ideal(a, b, p)
    assert np.linalg.norm(near - ideal) < np.linalg.norm(oracles.fedit(a, b, p) - ideal)
