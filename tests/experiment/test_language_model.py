"""A decoder federated from files to numbers: text, rounds, metrics, and going on after a kill."""

import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import jsonl as jsonl_config
from fedlora_jax import experiment
from fedlora_jax.experiment import finished

pytest.importorskip("gguf", reason="needs the extra `gguf`")
pytest.importorskip("tokenizers", reason="needs the extra `text`")

from tests.models import test_gguf as files

DOMAINS = ("letters", "numbers")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A configuration of a tiny Llama in a GGUF file, and of four clients' examples."""
    directory = tmp_path_factory.mktemp("language")
    patch = pytest.MonkeyPatch()
    patch.setenv("FEDLORA_DATA_DIR", str(directory / "data"))
    files.write_random(directory / "model.gguf")
    lines = [
        {
            "prompt": "abc"[i % 3] * (1 + i % 4),
            "response": ("xyz", "123")[i % 2][: 1 + i % 3] * 2 + str(i % 7),
            "client": f"client {i % 4}",
            "domain": DOMAINS[i % 2],
        }
        for i in range(80)
    ]
    (directory / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = jsonl_config.get_config(f"file={directory / 'examples.jsonl'}")
    config.data.update(
        tokenizer=str(directory / "model.gguf"),
        end_token="<|end|>",
        template="{prompt}={response}",
        length=24,
    )
    config.data.held_out.update(validation=0.0, test=0.3)
    config.model.name = "pretrained"
    config.pretrained.source = str(directory / "model.gguf")
    config.rounds = 3
    config.clients_per_round = 3
    # Each adapted kernel makes every one of many programs larger.
    config.lora.update(rank=2, targets=("attention/value", "mlp/down"))
    config.local.update(steps=3, batch_size=5, learning_rate=3e-2)
    yield config
    patch.undo()


# By what changes the configuration, for all that runs of it have in common.
PROGRAMS = {}


def run(config, workdir, rounds=3, **changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({**changes, "rounds": rounds})
    setting = experiment.prepare(config)
    changes.pop("pretrained.source", None)
    if str(changes) not in PROGRAMS:
        PROGRAMS[str(changes)] = experiment.compile_program(config, setting)
    rows = experiment.run(config, setting, PROGRAMS[str(changes)], workdir)
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory):
    return run(base, tmp_path_factory.mktemp("unbroken"))


def test_it_learns_every_domain(base, unbroken):
    untouched = experiment.judge_untouched(base, experiment.prepare(base))
    last = unbroken[-1]
    for domain in DOMAINS:
        assert last["domain_nll"][domain] < untouched["domain_nll"][domain] - 0.1
    assert last["perplexity"] == pytest.approx(np.exp(last["nll"]))
    assert len(last["client_nll"]) == 4 and 0 < last["token_accuracy"] < 1
    assert not any("ccuracy" in name and "token" not in name for name in last)


def test_a_run_that_goes_on_ends_with_the_same_bits(base, unbroken, tmp_path):
    assert run(base, tmp_path, rounds=2) == unbroken[:2]
    assert run(base, tmp_path, rounds=3) == unbroken


def test_blocks_in_a_loop_learn_the_same(base, tmp_path):
    files.write_random(tmp_path / "model.gguf", depth=2)
    deeper = {
        "pretrained.source": str(tmp_path / "model.gguf"),
        "local.steps": 2,
        "rounds": 1,
    }
    [expected] = run(base, tmp_path / "plain", **deeper)
    [looped] = run(base, tmp_path / "loop", **deeper, **{"model.loop": True})
    for name in ("nll", "loss"):
        assert looped[name] == pytest.approx(expected[name], rel=1e-3)
    some = {"model.loop": True, "lora.targets": ("block_0/mlp",)}
    with pytest.raises(
        ValueError, match="config.model.loop.* adapters are of 1 blocks, the parameters of 2"
    ):
        run(base, tmp_path / "part", **{**deeper, **some})


def test_a_checkpoint_is_without_what_no_round_changes_of_the_pretrained_model(base, tmp_path):
    """Of all its linear layers, which this configuration adapts."""
    every = jsonl_config.get_config().lora.targets
    run(base, tmp_path, method="flora", rounds=1, **{"lora.targets": every})
    checkpoint = ocp.StandardCheckpointer().metadata(tmp_path / "checkpoints/1/default")
    for path, array in ocp.tree.to_flat_dict(checkpoint.item_metadata.tree["backbone"]).items():
        merged = path[-1] == "kernel" and path[0] != "head"
        assert (array.shape != ()) == merged
    found = finished.restore(tmp_path).state.server.backbone
    pretrained = experiment.prepare(base).params
    np.testing.assert_array_equal(
        found["embedding"]["embedding"], pretrained["embedding"]["embedding"]
    )


def test_a_run_goes_on_with_the_pretrained_model_that_it_began_with_alone(base, unbroken, tmp_path):
    copied = tmp_path / "model.gguf"
    copied.write_bytes(Path(base.pretrained.source).read_bytes())
    changes = {"pretrained.source": str(copied)}
    assert run(base, tmp_path, **changes, rounds=1) == unbroken[:1]
    files.write_random(copied, seed=1)
    with pytest.raises(ValueError, match="backbone/.* is not what the run in .* began with"):
        run(base, tmp_path, **changes, rounds=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"clients_per_chunk": "3"},
        {"evaluation_batch_size": 3},
        {"data.length": 31},  # Padding moves nothing.
        {"model.options": {"remat": True}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_same_numbers_however_it_is_computed(base, unbroken, tmp_path, changes):
    found = run(base, tmp_path, **changes)
    for name in ("nll", "client_nll", "loss", "client_loss", "token_accuracy"):
        mine, theirs = ([row[name] for row in rows] for rows in (found, unbroken))
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, err_msg=name)


def test_bfloat16_learns_as_much(base, unbroken, tmp_path):
    found = run(base, tmp_path, **{"precision.compute": "bfloat16"})
    assert found[-1]["nll"] == pytest.approx(unbroken[-1]["nll"], rel=0.02)


def test_personal_models_are_judged_on_their_own_text(base, tmp_path):
    rounds = run(base, tmp_path, method="local", rounds=1)
    assert len(rounds[0]["client_nll"]) == 4
    assert set(rounds[0]["domain_nll"]) == set(DOMAINS)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"metrics": ("nl",)}, "unknown metric of a causal_lm task 'nl'. Did you mean 'nll'"),
        ({"metrics": ("accuracy",)}, "metric of a causal_lm task 'accuracy'"),
        ({"task": "causal"}, "unknown task 'causal'. Did you mean 'causal_lm'"),
        ({"data.template": "{promt}={response}"}, "no field 'promt'. Did you mean 'prompt'"),
        ({"data.partition": "dirichlet"}, "'dirichlet' needs labels, which .* does not have"),
    ],
)
def test_what_does_not_fit_is_named_before_any_work(base, tmp_path, changes, problem):
    config = base.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    if config.data.partition == "dirichlet":
        config.data.partition_options = {"num_clients": 2, "alpha": 0.5}
    with pytest.raises(ValueError, match=problem):
        experiment.check(config)
        setting = experiment.prepare(config)
        experiment.run(config, setting, experiment.compile_program(config, setting), tmp_path)
    assert not list(tmp_path.iterdir())
