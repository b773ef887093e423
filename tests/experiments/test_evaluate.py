"""`experiments.evaluate`: a tiny Llama that knows its answers by heart, and finished runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from experiments.shared import judging, targets
from experiments.shared.judging import Asking, Record
from experiments.shared.targets import Adapter
from fedlora_jax import experiment, lora
from fedlora_jax.experiment import records
from fedlora_jax.interop import peft
from fedlora_jax.methods import Trainable
from fedlora_jax.models.llama import Llama
from fedlora_jax.models.pretrained import naming
from fedlora_jax.models.pretrained.files import write_safetensors
from fedlora_jax.scoring import benchmarks
from fedlora_jax.scoring.completions import Sampling

tokenizers = pytest.importorskip("tokenizers")

MODEL = Llama(vocab_size=258, width=32, depth=1, num_heads=2, num_kv_heads=2, mlp_dim=64)
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
END = "<|end|>"

FUNCTIONS = [
    {
        "task_id": name,
        "prompt": f'def {name}():\n    """ {name} """\n',
        "entry_point": name,
        "test": f"def check(candidate):\n    assert candidate() == {value}\n",
    }
    for name, value in (("two", 2), ("six", 6), ("ten", 10))
]
# What the model learns by heart: the second is wrong, the third goes on for ever.
WRITTEN = ["\n    return 2\n\ndef", "\n    return 7\n#", "\n    return '" + "x" * 100]
QUESTION = {"question": "2+2?", "answer": "so it is\n#### 4"}


def tokenizer():
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([END, "<|user|>", *letters])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([END, "<|user|>"])
    return made


def learn(texts):
    """Parameters of `MODEL` that have these texts, lists of token ids, by heart."""
    length = max(map(len, texts))
    rows = jnp.array([text + [0] * (length - len(text)) for text in texts])
    mask = jnp.array([[1.0] * len(text) + [0.0] * (length - len(text)) for text in texts])
    params = jax.jit(MODEL.init)(jax.random.key(0), rows[:1])["params"]
    optimizer = optax.adam(1e-2)

    def loss(params):
        logits = lora.apply(MODEL, params, {}, rows[:, :-1], scale=1.0)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
        return jnp.sum(nll * mask[:, 1:]) / jnp.sum(mask[:, 1:])

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=200)[0][0]

    return train(params)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The model, its tokenizer and the problems, as files."""
    directory = tmp_path_factory.mktemp("model")
    encoder = tokenizer()
    asked = [row["prompt"].rstrip() + text for row, text in zip(FUNCTIONS, WRITTEN, strict=True)]
    plain = f"Question: {QUESTION['question']}\nAnswer: 4{END}"
    chat = f"<|user|>{QUESTION['question']}{END}It is 4.{END}"
    params = learn([encoder.encode(text).ids for text in [*asked, plain, chat]])
    (form,) = naming.formats(MODEL)
    weights = {}
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        value = np.asarray(value).T if path.endswith("kernel") else np.asarray(value)
        weights[naming.parameter(form, path).theirs] = value
    write_safetensors(directory / "model.safetensors", weights)
    config = {
        "model_type": "llama",
        "vocab_size": MODEL.vocab_size,
        "hidden_size": MODEL.width,
        "num_hidden_layers": MODEL.depth,
        "num_attention_heads": MODEL.num_heads,
        "num_key_value_heads": MODEL.num_kv_heads,
        "intermediate_size": MODEL.mlp_dim,
        "rms_norm_eps": MODEL.norm_epsilon,
        "rope_theta": MODEL.rope_base,
        "max_position_embeddings": 256,
        "eos_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    encoder.save(str(directory / "tokenizer.json"))
    for name, rows in (("functions", FUNCTIONS), ("questions", [QUESTION])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text)
    return directory


@pytest.fixture(scope="module")
def target(directory):
    return targets.of_model(str(directory), "float32", Adapter())


ASKING = Asking(Sampling(80), rows=2, allow_code_execution=True)


def score(target, directory, out, asking=ASKING, name="humaneval", file="functions"):
    benchmark = benchmarks.get(name, str(directory / f"{file}.jsonl"), asking.chat)
    settings = {**target.name, **asking.settings()}
    return judging.score(name, benchmark, target, asking, Record(out), settings)


def lines(out):
    rows = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    return {row["problem"]: row for row in rows}


def test_what_it_knows_it_is_given_credit_for(target, directory, tmp_path):
    found = score(target, directory, tmp_path)
    assert found["pass@1"] == pytest.approx(1 / 3)
    assert {k: found[k] for k in ("problems", "samples", "cut_off")} == {
        "problems": 3,
        "samples": 1,
        "cut_off": 1,
    }
    rows = lines(tmp_path)
    assert rows["two"] == {
        "task": "humaneval",
        "problem": "two",
        "sample": 0,
        "prompt": FUNCTIONS[0]["prompt"].rstrip(),
        "completion": "\n    return 2\n",
        "ended": True,
        "passed": True,
        "reason": "",
        "kernel": rows["two"]["kernel"],
    }
    assert rows["six"]["completion"] == "\n    return 7" and not rows["six"]["passed"]
    assert rows["ten"]["completion"] == WRITTEN[2][:80] and "SyntaxError" in rows["ten"]["reason"]


@pytest.mark.parametrize("chat", [False, True])
def test_numbers(target, directory, tmp_path, chat):
    asking = ASKING._replace(chat=chat, allow_code_execution=False)
    found = score(target, directory, tmp_path, asking, "gsm8k", "questions")
    assert found == {"exact_match@1": 1.0, "problems": 1, "samples": 1, "cut_off": 0}
    assert lines(tmp_path)["0"]["completion"] == ("It is 4." if chat else " 4")


def test_nothing_is_written_twice_and_nothing_is_lost(target, directory, tmp_path):
    whole = score(target, directory, tmp_path)
    path = tmp_path / "generations.jsonl"
    before = path.read_text()
    kept, cut = before.splitlines(keepends=True)[0], before.splitlines()[1]
    marked = kept.replace('"reason": ""', '"reason": "kept"')
    path.write_text(marked + cut[:30])
    assert score(target, directory, tmp_path) == whole
    assert path.read_text().startswith(marked)
    assert sorted(lines(tmp_path)) == ["six", "ten", "two"]
    now = path.read_text()
    assert score(target, directory, tmp_path) == whole
    assert path.read_text() == now
    other = ASKING._replace(sampling=Sampling(9))
    with pytest.raises(ValueError, match=r"for humaneval \(max_new_tokens is 80 there, 9 here\)"):
        score(target, directory, tmp_path, other)


def test_samples(target, directory, tmp_path):
    asking = ASKING._replace(sampling=Sampling(20, temperature=0.3), samples=10, rows=16)
    found = score(target, directory, tmp_path, asking)
    assert found["samples"] == 10 and found["pass@1"] <= found["pass@10"]
    assert len((tmp_path / "generations.jsonl").read_text().splitlines()) == 30
    with pytest.raises(ValueError, match="give --temperature"):
        score(target, directory, tmp_path / "new", ASKING._replace(samples=2))


def test_adapters(target, directory, tmp_path):
    """From PEFT and from a run's own file; one that does nothing, and one that does."""
    fresh = lora.init(jax.random.key(3), target.params, targets="mlp/(up|down)", rank=2)
    changed = jax.tree.map(lambda x: x + 0.5, fresh)
    peft.save(tmp_path / "fresh", fresh, scale=2.0, model=MODEL)
    peft.save(tmp_path / "changed", changed, scale=2.0, model=MODEL)
    records.save_trainable(tmp_path / "changed.npz", Trainable(changed, {}))
    read = [
        targets.of_model(str(directory), "float32", adapter)
        for adapter in (
            Adapter(str(tmp_path / "fresh")),
            Adapter(str(tmp_path / "changed")),
            Adapter(str(tmp_path / "changed.npz"), scale=2.0),
        )
    ]
    jax.tree.map(np.testing.assert_array_equal, *(each.adapters for each in read[1:]))
    assert read[1].scale == read[2].scale == 2.0
    assert len({each.name["adapters"] for each in (target, *read)}) == 3
    texts = []
    for i, each in enumerate((target, *read[:2])):
        score(each, directory, tmp_path / str(i))
        texts.append({name: row["completion"] for name, row in lines(tmp_path / str(i)).items()})
    assert texts[0] == texts[1] != texts[2]


def test_adapters_that_do_not_fit(target, directory, tmp_path):
    source = str(directory)
    other = MODEL.clone(width=16)
    params = jax.eval_shape(other.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    adapters = lora.init(jax.random.key(0), params, targets="query", rank=1)
    peft.save(tmp_path / "narrow", adapters, scale=1.0, model=other)
    records.save_trainable(tmp_path / "narrow.npz", Trainable(adapters, {}))
    far = {"block_0/attention/quer": adapters["block_0/attention/query"]}
    records.save_trainable(tmp_path / "far.npz", Trainable(far, {}))
    np.savez(tmp_path / "arrays.npz", x=np.ones(3))
    for adapter, problem in (
        (
            Adapter(str(tmp_path / "narrow")),
            r"is for a kernel \[16, 16\], the layer has \[32, 32\]",
        ),
        (Adapter(str(tmp_path / "narrow.npz"), 1.0), "narrow.npz is for another model"),
        (Adapter(str(tmp_path / "narrow.npz")), "has no scale: give --scale"),
        (Adapter(str(tmp_path / "narrow"), 2.0), "--scale is for an adapters.npz"),
        (Adapter(str(tmp_path / "far.npz"), 1.0), "Did you mean 'block_0/attention/query'"),
        (Adapter(str(tmp_path / "arrays.npz"), 1.0), "holds no adapters"),
    ):
        with pytest.raises(ValueError, match=problem):
            targets.of_model(source, "float32", adapter)
    for missing in (tmp_path / "none", tmp_path / "none.npz"):
        with pytest.raises(FileNotFoundError):
            targets.of_model(
                source, "float32", Adapter(str(missing), 1.0 if missing.suffix else None)
            )


def test_mistakes(target, directory, tmp_path):
    with pytest.raises(ValueError, match="allow it by --allow_code_execution"):
        score(target, directory, tmp_path / "off", Asking(Sampling(80)))
    assert not lines(tmp_path / "off")
    with pytest.raises(ValueError, match="humaneval two has 26 tokens; .* room for 1 to 20"):
        score(target._replace(model=Bounded()), directory, tmp_path, ASKING)
    for size in (200, 257, 300):
        other = target._replace(model=MODEL.clone(vocab_size=size))
        with pytest.raises(ValueError, match=f"has 258 tokens, but the model .* of {size}"):
            score(other, directory, tmp_path)
    # As many as the tokenizer has, and a few more to be a round number.
    for size in (258, 280):
        judging.read_language(target._replace(model=MODEL.clone(vocab_size=size)))
    with pytest.raises(ValueError, match="choose a client's own by --client"):
        score(target._replace(model=None), directory, tmp_path)
    with pytest.raises(ValueError, match="--tokenizer must say"):
        score(target._replace(tokenizer=None), directory, tmp_path)
    # What was refused keeps no other texts out.
    assert not (tmp_path / "evaluation.json").exists()
    with pytest.raises(ValueError, match="unknown task 'humanevel'. Did you mean 'humaneval'"):
        judging.parse_tasks(["metrics", "humanevel"])
    with pytest.raises(ValueError, match="names text twice"):
        judging.parse_tasks(["text=a", "text=b"])
    with pytest.raises(ValueError, match="metrics are of the data .*, not of a file: --tasks=met"):
        judging.parse_tasks(["metrics=foo.txt"])
    assert judging.parse_tasks(["metrics", "mbpp=a=b"]) == {"metrics": None, "mbpp": "a=b"}


class Bounded(Llama):
    vocab_size: int = 258
    width: int = 32
    depth: int = 1
    num_heads: int = 2
    num_kv_heads: int = 2
    mlp_dim: int = 64
    context: int = 100


def test_command(program, directory, tmp_path):
    arguments = (
        f"--model={directory}",
        f"--tasks=humaneval={directory}/functions.jsonl,gsm8k={directory}/questions.jsonl",
        f"--out={tmp_path}",
        "--max_new_tokens=80",
    )
    code, _, err = program.run("evaluate", *arguments)
    assert code == 1 and "allow it by --allow_code_execution" in err
    assert "Traceback" not in err and not (tmp_path / "evaluation.json").exists()
    code, out, err = program.run("evaluate", *arguments, "--allow_code_execution")
    assert code == 0, err
    assert "\r" not in out + err
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["humaneval"]["pass@1"] == pytest.approx(1 / 3)
    assert found["gsm8k"]["exact_match@1"] == 1
    assert "experiments.evaluate --model=" in found["gsm8k"]["command"]
    assert "pass@1" in out and "0.3333" in out


def test_a_run_that_is_not_there_leaves_nothing(program, tmp_path):
    code, _, err = program.run("evaluate", f"--workdir={tmp_path / 'typo'}", "--tasks=metrics")
    assert code == 1 and "there is no run in" in err and "Traceback" not in err
    assert not (tmp_path / "typo").exists()


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """Finished runs of a method that merges, and of one without a model for all."""
    directory = tmp_path_factory.mktemp("runs")
    digits.update_from_flattened_dict({"rounds": 2, "lora.rank": 2})
    setting = experiment.prepare(digits)
    for method in ("fedex_lora", "local"):
        digits.method = method
        program = experiment.compile_program(digits, setting)
        experiment.run(digits, setting, program, directory / method)
    return directory, digits


@pytest.mark.parametrize("method", ["fedex_lora", "local"])
def test_metrics_of_a_run_are_those_of_its_last_round(runs, method):
    workdir = runs[0] / method
    target = targets.of_run(workdir, "test")
    last = records.read_metrics(workdir)[-1]
    found = target.measure()
    assert {"accuracy", "domain_cross_entropy", "client_accuracy"} < found.keys()
    assert found == {name: last[name] for name in found}
    assert target.name["rounds"] == 2
    if method == "fedex_lora":
        adapters, head = records.load_trainable(workdir / "adapters.npz")
        jax.tree.map(np.testing.assert_array_equal, target.adapters, adapters)
        jax.tree.map(np.testing.assert_array_equal, target.params["head"], head["head"])
        start = experiment.prepare(runs[1]).params["block_0"]["attention"]["query"]["kernel"]
        merged = target.params["block_0"]["attention"]["query"]["kernel"]
        assert not np.array_equal(start, merged)
        other = targets.of_run(workdir, "validation").measure()
        assert other["domain_cross_entropy"] != found["domain_cross_entropy"]
    else:
        assert target.model is None
        own = targets.of_run(workdir, "test", client=last["cohort"][0])
        assert own.name["adapters"] != target.name["adapters"]


def test_metrics_that_are_asked_for(runs):
    directory, config = runs
    target = targets.of_run(directory / "fedex_lora", "validation", metrics=["f1"])
    found = target.measure()
    assert 0 <= found["f1"] <= 1 and "client_f1" in found and "accuracy" not in found
    with pytest.raises(ValueError, match="unknown metric of a .* 'acuracy'. Did you mean 'acc"):
        targets.of_run(directory / "fedex_lora", "test", metrics=["acuracy"])
    with pytest.raises(ValueError, match="unknown metric of a classification task 'nll'"):
        targets.of_config(config, "test", Adapter(), ["nll"])


def test_no_numbers_replace_those_of_another_question(target, tmp_path):
    record = Record(tmp_path)
    asked = [("test", []), ("validation", []), ("validation", ["f1", "accuracy"]), ("test", [])]
    keys = []
    for place, (split, metrics) in enumerate(asked):
        target = target._replace(measure=lambda place=place: {"f1": place})
        keys.append(judging.measure(target, split, metrics, record))
    assert keys == ["metrics", "metrics validation", "metrics validation f1,accuracy", "metrics"]
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert {key: found[key]["f1"] for key in found} == {keys[1]: 1, keys[2]: 2, keys[0]: 3}
    assert found[keys[1]]["settings"] == {**target.name, "split": "validation"}
    assert "metrics validation f1,accuracy" in record.table(keys)


def test_metrics_are_of_the_whole_run():
    metrics = {"metrics": None}
    judging.check_metrics(metrics, ["f1"], None)
    judging.check_metrics({"text": "a"}, [], 3)
    with pytest.raises(ValueError, match="metrics are of all clients, .* without --client"):
        judging.check_metrics(metrics, [], 3)
    with pytest.raises(ValueError, match="--metrics chooses what --tasks=metrics measures"):
        judging.check_metrics({"text": "a"}, ["f1"], None)


def test_what_is_trained_is_scored_as_the_run_scored_it(digits, tmp_path):
    """From `adapters.npz` and the configuration, with the head that was trained."""
    config = digits.copy_and_resolve_references()
    config.update_from_flattened_dict({"rounds": 2, "lora.rank": 2, "method": "fedit"})
    config.local.learning_rate *= 10  # The head moves.
    setting = experiment.prepare(config)
    program = experiment.compile_program(config, setting)
    last = experiment.run(config, setting, program, tmp_path)[-1]
    source = str(tmp_path / "adapters.npz")
    found = targets.of_config(config, "test", Adapter(source)).measure()
    for name in ("domain_accuracy", "domain_cross_entropy"):
        assert found[name] == pytest.approx(last[name], rel=1e-6)
    adapters, head = records.load_trainable(tmp_path / "adapters.npz")
    wide = {"head": {**head["head"], "kernel": np.zeros((16, 11))}}
    for lacking, problem in (
        ({}, "has no head/bias, head/kernel: by config.lora.head these are trained"),
        ({"head": {"kernel": head["head"]["kernel"]}}, "has no head/bias: by config.lora.head"),
        (wide, r"is for another model: its 'head/kernel' is \[16, 11\], the model's \[16, 10\]"),
        ({"haed": head["head"]}, "unknown parameter in .* 'haed/bias'. Did you mean 'head/bias'"),
    ):
        records.save_trainable(tmp_path / "adapters.npz", Trainable(adapters, lacking))
        with pytest.raises(ValueError, match=problem):
            targets.of_config(config, "test", Adapter(source))


def test_what_was_merged_is_missed(runs):
    """By the file itself, which without it is worth little."""
    directory, config = runs
    path = directory / "fedex_lora/adapters.npz"
    adapters, _ = records.load_trainable(path)
    assert sorted(records.merged_layers(path)) == sorted(adapters)
    with pytest.raises(ValueError, match=r"is half of what was trained: .* by --workdir"):
        targets.of_config(config, "test", Adapter(str(path)))
    assert records.merged_layers(directory / "local/adapters.npz") == []


def test_adapter_of_a_configuration(runs, tmp_path):
    directory, config = runs
    path = tmp_path / "adapters.npz"
    records.save_trainable(path, records.load_trainable(directory / "fedex_lora/adapters.npz"))
    source = str(path)
    bare = targets.of_config(config, "test", Adapter())
    adapted = targets.of_config(config, "test", Adapter(source))
    assert float(adapted.scale) == config.lora.scale
    strong = targets.of_config(config, "test", Adapter(source, scale=1e4))
    assert strong.measure()["client_accuracy"] != bare.measure()["client_accuracy"]


def test_no_run(runs, tmp_path):
    directory, config = runs
    with pytest.raises(FileNotFoundError, match="there is no run in .*config.json"):
        targets.of_run(tmp_path, "test")
    (tmp_path / "config.json").write_text((directory / "local/config.json").read_text())
    with pytest.raises(FileNotFoundError, match="no round of this run is finished"):
        targets.of_run(tmp_path, "test")
    with pytest.raises(ValueError, match="unknown split 'tset'. Did you mean 'test'"):
        targets.of_run(directory / "local", "tset")
    with pytest.raises(ValueError, match="no client 30: they are 0 to 29"):
        targets.of_run(directory / "local", "test", client=30)
    with pytest.raises(ValueError, match="fedex_lora keeps no models of clients' own"):
        targets.of_run(directory / "fedex_lora", "test", client=0)
