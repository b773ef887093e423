"""Aggregating and merging adapter checkpoints."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax import Factors, aggregation, lowrank
from fedlora_jax.interop import checkpoints, peft
from fedlora_jax.models.pretrained.files import open_tensors, write_safetensors

LAYERS = {"model.layers.0.q_proj": (6, 5), "model.layers.1.q_proj": (6, 5), "model.down": (7, 6)}


def client(path, seed, rank=2, scale=1.5, layers=LAYERS, head=None, **config):
    rng = np.random.default_rng(seed)
    adapters = {
        name: Factors(
            jnp.asarray(rng.normal(size=(d_in, rank)), jnp.float32),
            jnp.asarray(rng.normal(size=(rank, d_out)), jnp.float32),
        )
        for name, (d_in, d_out) in layers.items()
    }
    head = head or {"classifier.weight": np.full((2, 6), seed, np.float32)}
    config = {"base_model_name_or_path": "somebody/model"} | config
    peft.save(path, adapters, scale=scale, head=head, config=config)
    return adapters


@pytest.fixture
def two(tmp_path):
    sources = [tmp_path / "one", tmp_path / "two"]
    return sources, [client(source, seed) for seed, source in enumerate(sources)]


def product(factors):
    return np.asarray(factors.a @ factors.b)


def test_combine_is_the_aggregation_function(two):
    sources, trees = two
    combined = checkpoints.combine(sources, [1, 3], "lora_fair", {"regularization": 0.1})
    stacked, weights = aggregation.stack(trees), jnp.array([1.0, 3.0])
    expected = aggregation.lora_fair(stacked, weights, regularization=0.1)
    for name, factors in combined.checkpoint.adapters.items():
        np.testing.assert_allclose(product(factors), product(expected.adapters[name]), rtol=1e-4)
        dense = np.linalg.svd(product(factors), compute_uv=False)[:2]
        np.testing.assert_allclose(combined.spectra[name], dense, rtol=1e-4)
    error = aggregation.error(stacked, weights, expected)
    np.testing.assert_allclose(combined.error, error, rtol=1e-4)
    np.testing.assert_allclose(combined.checkpoint.saved["classifier.weight"], 0.75)


def test_a_residual_is_part_of_the_adapters(two, monkeypatch):
    def all_of_it(stacked, weights):
        sums = {n: lowrank.weighted_sum(f, weights / weights.sum()) for n, f in stacked.items()}
        return aggregation.Aggregated(adapters=None, residual=sums)

    monkeypatch.setitem(aggregation.REGISTRY, "all_of_it", all_of_it)
    sources, trees = two
    combined = checkpoints.combine(sources, [1, 1], "all_of_it")
    for name, factors in combined.checkpoint.adapters.items():
        expected = (product(trees[0][name]) + product(trees[1][name])) / 2
        np.testing.assert_allclose(product(factors), expected, rtol=1e-4, atol=1e-5)
    assert combined.error < 1e-6


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(base_model_name_or_path="else"), "base_model_name_or_path is 'somebody/model' in"),
        (
            dict(layers={"model.down": (7, 6)}),
            r"layers is more by model.layers.0.q_proj, .*less in",
        ),
        (dict(layers=LAYERS | {"model.down": (7, 9)}), r"of model.down is \[7, 6\] in .* \[7, 9\]"),
        (dict(scale=3.0), r"scale is 1.5 \(alpha 3, r 2\) in .* 3 \(alpha 6, r 2\) in .*alpha in"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out is False"),
        (dict(head={"score.weight": np.ones((2, 6))}), "saved parameters is more by classifier"),
        (
            dict(head={"classifier.weight": np.ones((3, 6))}),
            r"shape of classifier.weight is \[2, 6",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(change, message, tmp_path):
    sources = [tmp_path / "one", tmp_path / "two"]
    client(sources[0], 0, fan_in_fan_out=False)
    client(sources[1], 1, **change)
    with pytest.raises(ValueError, match=message):
        checkpoints.combine(sources, [1, 1], "fedit")


def test_rescale_keeps_the_products(tmp_path):
    sources = [tmp_path / "one", tmp_path / "two"]
    trees = [client(sources[0], 0, rank=2, scale=2.0), client(sources[1], 1, rank=4, scale=1.0)]
    with pytest.raises(ValueError, match=r"2 \(alpha 4, r 2\).*1 \(alpha 4, r 4\)"):
        checkpoints.combine(sources, [1, 1], "fedit")
    combined = checkpoints.combine(sources, [0, 1], "fedit", rescale=True)
    assert combined.checkpoint.scale == 2.0
    for name, factors in combined.checkpoint.adapters.items():
        np.testing.assert_allclose(2.0 * product(factors), product(trees[1][name]), rtol=1e-4)


@pytest.mark.parametrize("part", ["lora_A", "classifier"])
def test_who_has_weight_0_does_not_count(two, part):
    sources, trees = two
    file = sources[1] / peft.WEIGHTS_FILE
    values = {name: tensor.read() for name, tensor in open_tensors(file).items()}
    write_safetensors(file, {n: np.nan * v if part in n else v for n, v in values.items()})
    combined = checkpoints.combine(sources, [2, 0], "flora")
    np.testing.assert_array_equal(combined.checkpoint.saved["classifier.weight"], np.zeros((2, 6)))
    for name, factors in combined.checkpoint.adapters.items():
        np.testing.assert_allclose(product(factors), product(trees[0][name]), rtol=1e-4, atol=1e-5)
    assert combined.error < 1e-6
    place = "classifier.weight of .*two is not finite" if part == "classifier" else "client 1"
    with pytest.raises(ValueError, match=place):
        checkpoints.combine(sources, [2, 1], "flora")


def test_methods_and_options(two, monkeypatch):
    sources, _ = two

    def needy(stacked, weights, *, reference):
        """Needs a state."""

    monkeypatch.setitem(aggregation.REGISTRY, "needy", needy)
    with pytest.raises(ValueError, match="needy needs reference: a state between rounds"):
        checkpoints.combine(sources, [1, 1], "needy")
    with pytest.raises(ValueError, match="fedsa_lora leaves each client with adapters of its own"):
        checkpoints.combine(sources, [1, 1], "fedsa_lora")
    with pytest.raises(ValueError, match="option of lora_fair 'step'. Did you mean 'steps'"):
        checkpoints.combine(sources, [1, 1], "lora_fair", {"step": 3})
    with pytest.raises(ValueError, match="2 checkpoints, but 1 weights"):
        checkpoints.combine(sources, [1], "fedit")


@pytest.mark.parametrize("transposed", [True, False])
def test_merge(two, tmp_path, transposed):
    sources, _ = two
    checkpoint = checkpoints.combine(sources, [1, 1], "fedit").checkpoint
    if not transposed:
        checkpoint = checkpoint._replace(config={"fan_in_fan_out": True})
    base = tmp_path / "base"
    base.mkdir()
    rng = np.random.default_rng(0)
    kernels = {name: rng.normal(size=shape).astype(np.float32) for name, shape in LAYERS.items()}
    tensors = {
        f"{n}.weight": np.ascontiguousarray(k.T if transposed else k) for n, k in kernels.items()
    }
    tensors["norm.weight"] = np.ones(3, np.float32)
    names = sorted(tensors)
    shards = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, part in shards.items():
        write_safetensors(base / file, {name: tensors[name] for name in part})
    index = {name: file for file, part in shards.items() for name in part}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (base / "config.json").write_text("{}")

    out = tmp_path / "merged"
    checkpoints.merge(base, checkpoint, out)
    merged = {name: tensor.read() for name, tensor in open_tensors(out).items()}
    assert merged.keys() == tensors.keys() | {"classifier.weight"}
    assert (out / "config.json").exists()
    np.testing.assert_array_equal(merged["norm.weight"], tensors["norm.weight"])
    for name, kernel in kernels.items():
        expected = kernel + 1.5 * product(checkpoint.adapters[name])
        found = merged[f"{name}.weight"].T if transposed else merged[f"{name}.weight"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    checkpoints.merge(base / "model.safetensors.index.json", checkpoint, tmp_path / "again")
    again = open_tensors(tmp_path / "again")
    assert again.keys() == merged.keys()
    np.testing.assert_array_equal(again["model.down.weight"].read(), merged["model.down.weight"])


def test_merge_into_another_backbone(two, tmp_path):
    sources, _ = two
    checkpoint = checkpoints.combine(sources, [1, 1], "fedit").checkpoint
    write_safetensors(tmp_path / "x.safetensors", {"else.weight": np.ones((2, 2))})
    with pytest.raises(ValueError, match="no layer 'model.down'"):
        checkpoints.merge(tmp_path / "x.safetensors", checkpoint, tmp_path / "out")
    wrong = {f"{name}.weight": np.ones((2, 2)) for name in LAYERS}
    write_safetensors(tmp_path / "x.safetensors", wrong)
    with pytest.raises(ValueError, match=r"for a weight \[6, 7\], the backbone has \[2, 2\]"):
        checkpoints.merge(tmp_path / "x.safetensors", checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    "saved, stored, expected",
    [
        ("pooler.dense", "bert.pooler.dense", "bert.pooler.dense"),
        ("classifier", "head", "head"),
        (
            "vit.layers.1.layernorm_before",
            "vit.encoder.layer.1.layernorm_before",
            "vit.encoder.layer.1.layernorm_before",
        ),
        # New layers: RoBERTa's head does not replace its pooler, nor a classifier `lm_head`.
        ("classifier.dense", "pooler.dense", "classifier.dense"),
        ("classifier", "lm_head", "classifier"),
    ],
)
def test_merge_finds_saved_modules_as_it_finds_layers(tmp_path, saved, stored, expected):
    head = {f"{saved}.weight": np.full((6, 6), 2.0), f"{saved}.bias": np.ones(6)}
    client(tmp_path / "one", 0, head=head)
    checkpoint = checkpoints.combine([tmp_path / "one"], [1], "fedit").checkpoint
    base = {f"{n}.weight": np.zeros((d_out, d_in)) for n, (d_in, d_out) in LAYERS.items()}
    base |= {f"{stored}.weight": np.zeros((6, 6)), f"{stored}.bias": np.zeros(6)}
    write_safetensors(tmp_path / "base.safetensors", base)
    checkpoints.merge(tmp_path / "base.safetensors", checkpoint, tmp_path / "out")
    merged = {name: tensor.read() for name, tensor in open_tensors(tmp_path / "out").items()}
    wanted = base | {f"{expected}.{name.rpartition('.')[2]}": v for name, v in head.items()}
    assert merged.keys() == wanted.keys()
    for name in wanted.keys() - {f"{layer}.weight" for layer in LAYERS}:
        np.testing.assert_array_equal(merged[name], wanted[name])


def test_merge_finds_a_norm_by_the_names_of_old_leaves(tmp_path):
    client(tmp_path / "one", 0, head={"bert.embeddings.LayerNorm.weight": np.full(6, 2.0)})
    base = {f"{n}.weight": np.zeros((d_out, d_in)) for n, (d_in, d_out) in LAYERS.items()}
    base["embeddings.LayerNorm.gamma"] = np.ones(6)
    write_safetensors(tmp_path / "base.safetensors", base)
    checkpoints.merge(tmp_path / "base.safetensors", peft.load(tmp_path / "one"), tmp_path / "out")
    merged = open_tensors(tmp_path / "out")
    assert merged.keys() == base.keys()
    np.testing.assert_array_equal(merged["embeddings.LayerNorm.gamma"].read(), np.full(6, 2.0))


TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied_base(path, **config):
    path.mkdir()
    tensors = {f"{n}.weight": np.zeros((d_out, d_in)) for n, (d_in, d_out) in LAYERS.items()}
    write_safetensors(path / "model.safetensors", tensors | {TABLE: np.zeros((4, 6))})
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {}])
@pytest.mark.parametrize(
    "saved, tables, tied",
    [
        ({TABLE: 1.0}, {TABLE: 1.0, HEAD: 0.0}, False),
        ({HEAD: 2.0}, {TABLE: 0.0, HEAD: 2.0}, False),
        ({TABLE: 1.0, HEAD: 2.0}, {TABLE: 1.0, HEAD: 2.0}, False),
        ({TABLE: 1.0, HEAD: 1.0}, {TABLE: 1.0, HEAD: 1.0}, True),
    ],
)
def test_merge_unties_embeddings_that_the_adapter_unties(tmp_path, config, saved, tables, tied):
    """As PEFT's merge does: it trains a saved table apart from the other."""
    base = tied_base(tmp_path / "base", **config)
    client(tmp_path / "one", 0, head={name: np.full((4, 6), x) for name, x in saved.items()})
    checkpoint = peft.load(tmp_path / "one")
    checkpoints.merge(base, checkpoint, tmp_path / "out")
    merged = open_tensors(tmp_path / "out")
    assert {name: merged[name].read()[0, 0] for name in (TABLE, HEAD)} == tables
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == (config if tied else config | {"tie_word_embeddings": False})
    if not tied:
        with pytest.raises(ValueError, match="give the directory.*tie_word_embeddings"):
            checkpoints.merge(base / "model.safetensors", checkpoint, tmp_path / "file")
        assert not (tmp_path / "file").exists()


def test_merge_into_the_base_layer_that_peft_saved(tmp_path):
    """PEFT saves an adapted head itself, too; that of a backbone of tied embeddings is new."""
    client(tmp_path / "one", 0, layers={"lm_head": (6, 4)}, head={HEAD: np.ones((4, 6))})
    checkpoint = peft.load(tmp_path / "one")
    checkpoints.merge(tied_base(tmp_path / "base"), checkpoint, tmp_path / "out")
    merged = open_tensors(tmp_path / "out")
    expected = 1 + 1.5 * product(checkpoint.adapters["lm_head"]).T
    np.testing.assert_allclose(merged[HEAD].read(), expected, rtol=1e-5)
    np.testing.assert_array_equal(merged[TABLE].read(), np.zeros((4, 6)))


def test_merge_into_conv1d_and_linear_layers(tmp_path):
    """PEFT's `fan_in_fan_out` is that of the last layer adapted."""
    layers = {
        "transformer.h.0.attn.c_proj": (6, 6),
        "transformer.h.0.c_fc": (6, 8),
        "lm_head": (6, 4),
    }
    client(tmp_path / "one", 0, layers=layers, fan_in_fan_out=False)
    checkpoint = peft.load(tmp_path / "one")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    shapes = layers | {"lm_head": (4, 6)}
    tensors = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    write_safetensors(base / "model.safetensors", tensors)
    checkpoints.merge(base, checkpoint, tmp_path / "out")
    merged = open_tensors(tmp_path / "out")
    for name, factors in checkpoint.adapters.items():
        expected = 1.5 * product(factors)
        expected = expected.T if name == "lm_head" else expected
        np.testing.assert_allclose(merged[f"{name}.weight"].read(), expected, rtol=1e-5)


def test_merge_keeps_types_and_copies_the_chat_template(two, tmp_path):
    checkpoint = checkpoints.combine(two[0], [1, 1], "fedit").checkpoint
    saved = {name: jnp.full((2, 6), 0.1) for name in ("norm.weight", "new.weight")}
    saved["norm.counter"] = jnp.array(2.6)
    base = tmp_path / "base"
    base.mkdir()
    tensors = {f"{n}.weight": np.zeros((d_out, d_in)) for n, (d_in, d_out) in LAYERS.items()}
    tensors = {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}
    tensors |= {"norm.weight": np.zeros((2, 6), np.float16), "norm.counter": np.array(0)}
    write_safetensors(base / "model.safetensors", tensors)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    checkpoints.merge(base, checkpoint._replace(saved=saved), tmp_path / "out")
    merged = open_tensors(tmp_path / "out")
    kept = {name: tensor.dtype for name, tensor in merged.items()}
    assert kept == {name: v.dtype for name, v in tensors.items()} | {"new.weight": jnp.bfloat16}
    np.testing.assert_allclose(merged["norm.weight"].read(), 0.1, rtol=1e-3)
    assert merged["norm.counter"].read() == 3
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("dtype", [np.int8, jnp.float8_e4m3fn])
def test_merge_refuses_quantised_layers(two, tmp_path, dtype):
    checkpoint = checkpoints.combine(two[0], [1, 1], "fedit").checkpoint
    tensors = {f"{n}.weight": np.zeros((d_out, d_in)) for n, (d_in, d_out) in LAYERS.items()}
    tensors["classifier.weight"] = np.zeros((2, 6))
    for name in ("model.down.weight", "classifier.weight"):
        write_safetensors(tmp_path / "x.safetensors", tensors | {name: tensors[name].astype(dtype)})
        with pytest.raises(ValueError, match=f"{name} is of {np.dtype(dtype).name}.*quantised"):
            checkpoints.merge(tmp_path / "x.safetensors", checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x.npz", "x.gguf"])
def test_merge_refuses_files_of_other_kinds(two, tmp_path, name):
    checkpoint = checkpoints.combine(two[0], [1, 1], "fedit").checkpoint
    with (tmp_path / name).open("wb") as file:
        np.savez(file, **{f"{n}.weight": np.zeros((o, i)) for n, (i, o) in LAYERS.items()})
    with pytest.raises(ValueError, match=f"{name}: only .safetensors files can be merged into"):
        checkpoints.merge(tmp_path / name, checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["ffa_lora", "rolora", "fedsvd"])
def test_methods_with_a_common_factor_refuse_clients_that_have_none(two, method):
    sources, trees = two
    message = f"{method} takes one 'a' for all clients, but that of client 1 is another in 'model"
    with pytest.raises(ValueError, match=message):
        checkpoints.combine(sources, [1, 1], method)
    checkpoints.combine(sources, [1, 0], method)
    peft.save(
        sources[1],
        {n: trees[0][n]._replace(b=2 * f.b) for n, f in trees[1].items()},
        scale=1.5,
        head={"classifier.weight": np.ones((2, 6), np.float32)},
    )
    assert checkpoints.combine(sources, [1, 1], method).error < 1e-5


def test_a_result_does_not_take_the_place_of_what_it_is_made_from(tmp_path, two):
    sources, _ = two
    merged = checkpoints.combine(sources, [1, 1], "fedit").checkpoint
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "link").symlink_to(base)
    weights = {f"{name}.weight": np.zeros((d_out, d_in)) for name, (d_in, d_out) in LAYERS.items()}
    write_safetensors(base / "model.safetensors", weights)
    before = (base / "model.safetensors").read_bytes()
    for out in (base, tmp_path / "link", base / "x" / ".."):
        for source in (base, base / "model.safetensors"):
            (base / "x").mkdir(exist_ok=True)
            with pytest.raises(ValueError, match="would overwrite .*base.*another directory"):
                checkpoints.merge(source, merged, out)
    assert (base / "model.safetensors").read_bytes() == before
    checkpoints.check_out(tmp_path / "new", [base, "owner/name"])
