"""What the benchmarks at scale read and compute; their tables from what workers say."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from jax.sharding import NamedSharding, PartitionSpec

from experiments import benchmark
from experiments.benchmarks import clients, endurance, engines, hlo, mesh, profiles, tree
from fedlora_jax import Factors, aggregation
from fedlora_jax.federated import placement

needs_four = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")


def compiled(function, *shapes):
    """The text of a program for four devices, its inputs spread along their first axis."""
    rows = NamedSharding(placement.make_mesh(4), PartitionSpec("clients"))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows) for shape in shapes]
    whole = NamedSharding(rows.mesh, PartitionSpec())
    return jax.jit(function, out_shardings=whole).lower(*arguments).compile().as_text()


@needs_four
def test_a_sum_is_one_reduction_of_its_result():
    found = hlo.collectives(compiled(lambda x: x.sum(0), (8, 16)))
    assert found == {"all-reduce": hlo.Sent(1, 4 * 16)}


@needs_four
def test_an_array_that_all_need_is_gathered():
    found = hlo.collectives(compiled(lambda x: x, (8, 16)))
    assert found == {"all-gather": hlo.Sent(1, 4 * 8 * 16)}


@needs_four
def test_what_is_in_a_loop_counts_as_often_as_it_turns():
    def function(x):
        return jax.lax.fori_loop(0, 5, lambda _, y: jnp.sin(x * y.sum()).sum(0), jnp.ones(16))

    text = compiled(function, (8, 16))
    assert hlo.collectives(text)["all-reduce"] == hlo.Sent(5, 5 * 4 * 16)
    assert hlo.collectives(text, only_in_loops=True)["all-reduce"] == hlo.Sent(5, 5 * 4 * 16)
    outside = compiled(lambda x: x.sum(0), (8, 16))
    assert not hlo.collectives(outside, only_in_loops=True)


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[4,8]{1,0}", 128), ("(bf16[3], s32[], pred[2])", 12), ("s4[3]", 2), ("token[]", 0)],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo.num_bytes(shape) == size


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no one ENTRY"):
        hlo.collectives("nothing")


def test_operations_of_a_program_by_kind():
    def function(x, kernel, a, b, heads):
        scores = heads @ heads.mT
        y = jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ kernel), x)
        return y + (x @ a) @ b, scores, jnp.linalg.qr(a)[1], jnp.flip(kernel, 1).T

    shapes = ((96, 64), (64, 64), (64, 4), (4, 64), (6, 32, 16))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    flops = {}
    for kind, number in profiles.operations(text, rank=4).values():
        flops.setdefault(kind, []).append(number)
    # One in a loop is there once.
    assert list(filter(None, flops.pop(profiles.LARGE))) == [2 * 96 * 64 * 64]
    assert list(filter(None, flops.pop(profiles.LOW_RANK))) == [2 * 96 * 64 * 4] * 2
    assert list(filter(None, flops.pop(profiles.BATCHED))) == [2 * 6 * 32 * 32 * 16]
    assert set(flops) == {profiles.CALLS, profiles.COPIES, profiles.REST}


def test_a_product_that_a_library_computes():
    dimensions = '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]'
    batch = '"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]'
    text = f"""
ENTRY %main (x: bf16[96,64], y: bf16[64,32]) -> (bf16[96,32], s8[4]) {{
  %x = bf16[96,64]{{1,0}} parameter(0)
  %y = bf16[64,32]{{1,0}} parameter(1)
  ROOT %gemm.1 = (bf16[96,32]{{1,0}}, s8[4]{{0}}) custom-call(%x, %y), custom_call_target="__cublas$gemm", backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{{dimensions},{batch}}}}}}}
}}
"""  # noqa: E501
    found = profiles.operations(text, rank=4)
    assert found["gemm.1"] == profiles.Operation(profiles.LARGE, 2 * 96 * 64 * 32)


def test_shares_of_a_profile():
    kinds = {kind: {"seconds": 0.5, "ran": 2, "flops": 0.0} for kind in profiles.KINDS}
    kinds[profiles.LARGE] = {"seconds": 2.5, "ran": 9, "flops": 2.5e11}
    facts = {
        "date": "2026-01-01",
        "device": "cpu",
        "cores": 2,
        "load_average_at_start": 0.1,
        "versions": {"jax": "0"},
    }
    rows = {"digits:all": {"kinds": kinds, "matrix_rate": 2e11}}
    line = profiles.page({"environment": facts, "rows": rows}).splitlines()[6]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["`digits`", "all", "50%", *["10%"] * 5, "5", "100", "200"]


@pytest.fixture(scope="module")
def sent():
    """Two kernels of clients who share a start; their weights."""
    generator = np.random.default_rng(0)
    kernels = []
    for d_in, d_out in ((12, 20), (16, 12)):
        a, b = generator.normal(size=(8, d_in, 2)), generator.normal(size=(8, 2, d_out))
        kernels.append((a + generator.normal(size=(d_in, 2)), b))
    weights = generator.random(8)
    return kernels, weights / weights.sum()


def test_wide_enough_every_way_is_exact(sent):
    """Eight clients of rank two need 12 columns at most, where the kernels have no more."""
    kernels, weights = sent
    generator = np.random.default_rng(1)
    for (a, b), ideal in zip(kernels, tree.truth(kernels, weights).ideal, strict=True):
        for fan_out in (2, 3, 8):
            np.testing.assert_allclose(tree.by_tree(a, b, weights, fan_out, 6), ideal, atol=1e-12)
        np.testing.assert_allclose(tree.in_two_passes(a, b, weights, 6, generator), ideal)
        np.testing.assert_allclose(tree.by_sketches(a, b, weights, 12, generator), ideal, atol=1e-9)


def test_a_tree_of_one_node_fits_as_the_library_does(sent):
    kernels, weights = sent
    found = tree.errors(kernels, weights, seed=0)
    assert set(found["flora_na"]) == {2, 8} and found["means"] < 1e-12
    stacked = {str(i): Factors(*pair) for i, pair in enumerate(kernels)}
    fitted = aggregation.flora_na(stacked, jnp.asarray(weights)).adapters
    products = [np.asarray(fitted[path].a @ fitted[path].b) for path in stacked]
    alone = tree.distance(products, tree.truth(kernels, weights).ideal)
    assert found["flora_na"][8] == pytest.approx(alone, rel=1e-3)
    assert alone < found["fedit"] and alone <= found["flora_na"][2] * 1.001


def test_errors_fall_with_the_width_and_the_library_finds_the_best(sent):
    found = tree.errors(*sent, seed=0)
    assert found["library"] < 1e-5 and 0 < found["flat"] < found["fedit"]
    for name, widths in found["ways"].items():
        # Where all of them are below one node, both are but rounding.
        assert widths[8]["best"] < max(widths[1]["best"], 1e-14), name
        # The best there is cannot be beaten.
        assert all(each["excess"] > -1e-9 for each in widths.values())


def test_the_points_of_the_plots():
    points = clients.points()
    assert len(set(points)) == len(points)
    assert all(cohort <= number for number, cohort in points)
    assert clients.point_of("fedit,100,16") == ("fedit", 100, 16)
    config = clients.configuration("fedit", 100, 16)
    assert config.method == "fedit" and config.data.partition_options.to_dict() == {
        "num_clients": 100
    }


def test_the_pages(sent):
    environment = benchmark.environment()
    point = dict.fromkeys(
        ("round_s", "round_cpu_s", "evaluate_cpu_s", "start_cpu_s", "peak_bytes", "data_bytes"), 1
    )
    point |= {"states_bytes": 1, "checkpoint_bytes": 1, "method": "fedit"}
    points = [{**point, "num_clients": n, "cohort_size": k} for n, k in clients.points()]
    results = {"environment": environment, "points": points}
    assert "1,000,000" in clients.page(results) and len(clients.draw(results).axes) == 4
    ways = {"flops": 2e6, "collectives": {"all-reduce": [3, 5000]}, "in_loops": 0}
    of_mesh = {"fedit": dict.fromkeys(("one", "library", "compiler"), ways)}
    page = mesh.page({"environment": environment, "methods": of_mesh})
    assert "3 all-reduce" in page and "| fedit" in page
    rows = {"fedit": {"compiler": ways, "drjax": None}}
    for version, words in (("0.2.1", "no words for it"), (None, "not installed")):
        page = engines.page({"environment": environment, "drjax": version, "rows": rows})
        assert "3 all-reduce" in page and words in page
    errors = tree.errors(*sent, seed=0)
    results = {"environment": environment, "methods": {"flexlora": {"0": {"4": errors}}}}
    assert "round 5, 1 seeds" in tree.page(results) and len(tree.draw(results).axes) == 1


@pytest.mark.parametrize("table", ["mesh_table", "engines_table"])
def test_what_four_cpus_count_says_so_beside_a_gpu(table, monkeypatch):
    written = []
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="H200")])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(benchmark, "worker", lambda *_, **environment: {})
    monkeypatch.setattr(benchmark, "write", lambda name, results, page: written.append(results))
    for module in (mesh, engines):
        monkeypatch.setattr(module, "page", lambda results: "")
    getattr(benchmark, table)()
    facts = written[0]["environment"]
    assert (facts["device"], facts["platform"]) == ("cpu", "cpu")


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs a subcommand with these flags, whose results and images go to a new directory."""
    monkeypatch.setattr(benchmark.signal, "signal", lambda *_: None)

    def run(name, worker=None, **given):
        if worker is not None:
            monkeypatch.setattr(benchmark, "worker", worker)
        for directory in {"output", "folder" if name == "streaming" else "output"} - set(given):
            given[directory] = str(tmp_path / directory)
        with flagsaver.as_parsed(**given):
            benchmark.main(["benchmark", name])

    return run


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("streaming", {}, "--cohort=64 .* --clients=10"),
        (
            "streaming",
            {"clients": "3", "cohort": "2", "images": "40"},
            "--clients=3 times --images=40 is 120 images; 259 are needed",
        ),
        ("clients", {"output": __file__}, f"--output: cannot write in {__file__}: it is no direct"),
        (
            "endurance",
            {"rounds": "20"},
            "endurance does not read --rounds; it reads --endured, --only, --output",
        ),
        ("growth", {"only": "fedit"}, "growth does not read --only; it reads --output, --repeats"),
        ("aggregation", {"only": "nosuch"}, "unknown rows"),
    ],
)
def test_a_mistake_is_found_before_any_work(name, given, message, command, tmp_path):
    with pytest.raises(benchmark.app.UsageError, match=message):
        command(name, worker=lambda *_: pytest.fail("it works"), **given)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("stopped", "status"),
    [
        (benchmark.Stopped(130), "130"),
        (
            RuntimeError("memory:1,128,chunked failed"),
            "error: memory:1,128,chunked failed\nfinished rows are in",
        ),
    ],
)
def test_what_stops_a_table_leaves_its_rows_beside_the_last_one(stopped, status, command, tmp_path):
    def worker(task):
        if task.endswith(",chunked"):
            raise stopped
        return {"working_bytes": 2**30}

    table = tmp_path / "output" / "memory_cpu.json"
    rows = table.with_suffix(".partial.json")
    command("memory", worker, only="whole")
    finished = table.read_text(), table.with_suffix(".md").read_text()
    assert "1.07" in finished[1] and not rows.exists()
    with pytest.raises(SystemExit) as ended:
        command("memory", worker, only="whole,chunked")
    assert str(ended.value.code).startswith(status)
    assert finished == (table.read_text(), table.with_suffix(".md").read_text())
    assert json.loads(rows.read_text())["rounds"][0]["whole"] == 2**30


@pytest.mark.usefixtures("digits")
def test_rounds_endure():
    """So few say nothing of the process's memory."""
    name = "fedsa_lora:bfloat16"
    row = endurance.measure(name, 20)
    assert set(endurance.faults(row)) <= {"more memory"} and name in endurance.names()
    page = endurance.page(
        {"environment": benchmark.environment(), "rounds": 20, "rows": {name: row}}
    )
    assert "| fedsa_lora | bfloat16" in page


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"finite": False}, "not finite"),
        ({"excluded": 1}, "not finite"),
        ({"programs": 2}, "compiled again"),
        ({"memory_late": {"resident": 100, "arrays": 11, "array_bytes": 10}}, "more arrays"),
        ({"memory_late": {"resident": 103, "arrays": 10, "array_bytes": 10}}, "more memory"),
    ],
)
def test_what_does_not_endure_is_named(change, fault):
    held = {"resident": 100, "arrays": 10, "array_bytes": 10}
    row = {"finite": True, "excluded": 0, "programs": 1, "memory_early": held, "memory_late": held}
    assert endurance.faults(row) == [] and endurance.faults({**row, **change}) == [fault]
