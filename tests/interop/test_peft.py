"""Adapter checkpoints without PEFT itself (tests/parity has that)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax import Factors, lora
from fedlora_jax.interop import peft
from fedlora_jax.models import Bert, Llama, ViT
from fedlora_jax.models.pretrained.files import open_tensors, write_safetensors

LLAMA = Llama(vocab_size=20, width=16, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=24)
LAYER = "model.layers.0.self_attn.q_proj"


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def factors(d_in, rank, d_out):
    return Factors(jnp.asarray(normal(d_in, rank)), jnp.asarray(normal(rank, d_out)))


def write(directory, tensors, **config):
    directory.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6} | config
    (directory / peft.CONFIG_FILE).write_text(json.dumps(settings))
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    write_safetensors(directory / peft.WEIGHTS_FILE, named)
    return directory


def pair(name, d_in=16, rank=2, d_out=16):
    return {
        f"{name}.lora_A.weight": normal(rank, d_in),
        f"{name}.lora_B.weight": normal(d_out, rank),
    }


def product(factors):
    return np.asarray(factors.a @ factors.b)


def test_layout_and_scale(tmp_path):
    tensors = pair(LAYER)
    checkpoint = peft.load(write(tmp_path, tensors), LLAMA)
    assert list(checkpoint.adapters) == ["block_0/attention/query"] and checkpoint.scale == 3.0
    expected = (tensors[f"{LAYER}.lora_B.weight"] @ tensors[f"{LAYER}.lora_A.weight"]).T
    np.testing.assert_allclose(product(checkpoint.adapters["block_0/attention/query"]), expected)
    assert list(peft.load(tmp_path).adapters) == [LAYER]


def test_patterns_are_folded_into_b(tmp_path):
    tensors = pair(LAYER) | pair("model.layers.1.self_attn.q_proj", rank=4)
    checkpoint = peft.load(
        write(
            tmp_path,
            tensors,
            rank_pattern={"layers.1.self_attn.q_proj": 4},
            alpha_pattern={r"model\.layers\.1\..*": 2},
        )
    )
    assert checkpoint.scale == 3.0
    one, two = checkpoint.adapters.values()
    np.testing.assert_array_equal(one.b, tensors[f"{LAYER}.lora_B.weight"].T)
    second = tensors["model.layers.1.self_attn.q_proj.lora_B.weight"].T
    np.testing.assert_allclose(two.b * 3.0, second * 0.5, rtol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_round_trip_of_unequal_ranks(rslora, tmp_path):
    adapters = {
        "block_0/attention/query": factors(16, 3, 16),
        "block_1/attention/query": factors(16, 2, 16),
        "block_1/mlp/down": factors(24, 2, 16),
    }
    peft.save(tmp_path, adapters, scale=1.3, model=LLAMA, config={"use_rslora": rslora})
    config = peft.read_config(tmp_path)
    assert config["r"] == 2 and len(config["rank_pattern"]) == 1
    again = peft.load(tmp_path, LLAMA)
    for path, before in adapters.items():
        after = again.adapters[path]
        np.testing.assert_allclose(
            again.scale * product(after), 1.3 * product(before), rtol=1e-5, atol=1e-5
        )
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    rank_3 = peft.module_scale(config, name.removeprefix("base_model.model."), 3)
    assert rank_3 == pytest.approx(1.3)


def test_the_head(tmp_path):
    model = ViT(num_classes=3, patch_size=8, width=16, depth=1, num_heads=2)
    adapters = {"block_0/attention/query": factors(16, 2, 16)}
    head = {"head": {"kernel": normal(16, 3), "bias": normal(3)}}
    peft.save(tmp_path, adapters, scale=1.0, model=model, head=head)
    assert peft.read_config(tmp_path)["modules_to_save"] == ["classifier"]
    assert open_tensors(tmp_path)["base_model.model.classifier.weight"].shape == (3, 16)
    jax.tree.map(np.testing.assert_array_equal, peft.load(tmp_path, model).saved, head)


def test_the_embeddings_of_a_vit(tmp_path):
    """The kernel of a convolution has its own order of axes, and some parameters have no module."""
    model = ViT(num_classes=3, patch_size=8, width=16, depth=1, num_heads=2)
    kernel, tokens = normal(16, 3, 8, 8), normal(1, 1, 16)
    tensors = {
        "vit.embeddings.cls_token": tokens,
        "vit.embeddings.patch_embeddings.projection.weight": kernel,
    }
    query = pair("vit.layers.0.attention.q_proj")
    saved = peft.load(write(tmp_path, query | tensors), model).saved
    np.testing.assert_array_equal(saved["class_token"], tokens)
    ours = saved["patch_embedding"]["kernel"]
    np.testing.assert_array_equal(ours, np.einsum("oihw->hwio", kernel))
    adapters = {"block_0/attention/query": factors(16, 2, 16)}
    with pytest.raises(ValueError, match="class_token.*no module of its own"):
        peft.save(tmp_path, adapters, scale=1.0, model=model, head=saved)
    saved.pop("class_token")
    peft.save(tmp_path, adapters, scale=1.0, model=model, head=saved)
    name = "base_model.model.vit.embeddings.patch_embeddings.projection.weight"
    np.testing.assert_array_equal(open_tensors(tmp_path)[name].read(), kernel)
    fused = pair("blocks.0.attn.proj") | {"blocks.0.attn.qkv.weight": normal(48, 16)}
    with pytest.raises(ValueError, match=r"'blocks.0.attn.qkv.weight' \[48, 16\] cannot be read"):
        peft.load(write(tmp_path, fused), model)


@pytest.mark.parametrize("names", [None, "transformers 5 ViTForImageClassification"])
def test_the_norms_of_a_vit(names, tmp_path):
    model = ViT(num_classes=3, patch_size=8, width=16, depth=1, num_heads=2)
    adapters = {"block_0/attention/query": factors(16, 2, 16)}
    norm = {"scale": normal(16), "bias": normal(16)}
    head = {"norm": norm, "block_0": {"norm1": norm, "norm2": norm}}
    peft.save(tmp_path, adapters, scale=1.0, model=model, head=head, names=names)
    jax.tree.map(np.testing.assert_array_equal, peft.load(tmp_path, model).saved, head)
    # Modules within a block are named one by one: a block as a whole has adapted layers, too.
    saved = {name.removeprefix("base_model.model.") for name in open_tensors(tmp_path)}
    modules = {name.rpartition(".")[0] for name in saved if "lora_" not in name}
    assert set(peft.read_config(tmp_path)["modules_to_save"]) == modules


def test_saved_embeddings_and_norms(tmp_path):
    adapters = {"block_0/attention/query": factors(16, 2, 16)}
    saved = {
        "embedding": {"embedding": normal(20, 16)},
        "head": {"kernel": normal(16, 20)},
        "norm": {"scale": normal(16)},
    }
    peft.save(tmp_path, adapters, scale=1.0, model=LLAMA, head=saved)
    names = ["lm_head", "model.embed_tokens", "model.norm"]
    assert peft.read_config(tmp_path)["modules_to_save"] == names
    assert open_tensors(tmp_path)["base_model.model.lm_head.weight"].shape == (20, 16)
    jax.tree.map(np.testing.assert_array_equal, peft.load(tmp_path, LLAMA).saved, saved)


def test_one_table_for_embeddings_and_logits(tmp_path):
    """PEFT trains one of the two uses alone, or both as two tables, unless both are saved alike."""
    model, path = LLAMA.clone(tied=True), "base_model.model."
    saved = {"embedding": {"embedding": normal(20, 16)}}
    adapters = {"block_0/attention/query": factors(16, 2, 16)}
    peft.save(tmp_path, adapters, scale=1.0, model=model, head=saved)
    assert peft.read_config(tmp_path)["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    jax.tree.map(np.testing.assert_array_equal, peft.load(tmp_path, model).saved, saved)
    written = {name: tensor.read() for name, tensor in open_tensors(tmp_path).items()}
    head, table = f"{path}lm_head.weight", f"{path}model.embed_tokens.weight"
    np.testing.assert_array_equal(written[head], written[table])
    for change in ({head: -written[head]}, {head: None}, {table: None}):
        tensors = {name: value for name, value in (written | change).items() if value is not None}
        write_safetensors(tmp_path / peft.WEIGHTS_FILE, tensors)
        with pytest.raises(ValueError, match="one table for both.*checkpoints.merge"):
            peft.load(tmp_path, model)
        peft.load(tmp_path, LLAMA)


def test_the_base_layer_that_peft_saves_with_an_adapted_head(tmp_path):
    tensors = pair("lm_head", d_out=20) | {"lm_head.base_layer.weight": normal(20, 16)}
    bare = peft.load(write(tmp_path, tensors))
    peft.save(tmp_path, bare.adapters, scale=3.0, head=bare.saved, config=bare.config)
    ours = peft.load(tmp_path, LLAMA)
    assert ours.adapters.keys() == {"head"}
    np.testing.assert_array_equal(ours.saved["head"]["kernel"], normal(20, 16).T)
    for arguments in ({}, {"model": LLAMA}):
        checkpoint = ours if arguments else bare
        peft.save(tmp_path, checkpoint.adapters, scale=3.0, head=checkpoint.saved, **arguments)
        assert open_tensors(tmp_path).keys() == {f"base_model.model.{name}" for name in tensors}
        assert peft.read_config(tmp_path)["modules_to_save"] is None


def test_modules_of_a_classification_head(tmp_path):
    model = Bert(vocab_size=9, width=16, depth=1, num_heads=2, num_classes=3, variant="roberta")
    adapters = {"block_0/attention/query": factors(16, 2, 16)}
    dense = {"kernel": normal(16, 16), "bias": normal(16)}
    out = {"kernel": normal(16, 3), "bias": normal(3)}
    for head, modules in (
        ({"head": out}, ["classifier.out_proj"]),
        ({"head": out, "pooler": dense}, ["classifier"]),
    ):
        peft.save(tmp_path, adapters, scale=1.0, model=model, head=head)
        assert peft.read_config(tmp_path)["modules_to_save"] == modules


def test_a_fused_layer_is_split(tmp_path):
    """timm's qkv: the three share `a`, and the checkpoint cannot be written back as one."""
    model = ViT(num_classes=3, patch_size=8, width=16, depth=1, num_heads=2)
    tensors = pair("blocks.0.attn.qkv", d_out=48)
    checkpoint = peft.load(write(tmp_path, tensors), model)
    names = [f"block_0/attention/{name}" for name in ("query", "key", "value")]
    assert list(checkpoint.adapters) == names
    whole = np.concatenate([product(checkpoint.adapters[name]) for name in names], axis=1)
    expected = (
        tensors["blocks.0.attn.qkv.lora_B.weight"] @ tensors["blocks.0.attn.qkv.lora_A.weight"]
    )
    np.testing.assert_allclose(whole, expected.T, rtol=1e-5)
    with pytest.raises(ValueError, match="part of a larger layer in timm"):
        peft.save(
            tmp_path, checkpoint.adapters, scale=1.0, model=model, names="timm VisionTransformer"
        )


def test_bfloat16_stays_bfloat16(tmp_path):
    adapters = {LAYER: jax.tree.map(lambda x: x.astype(jnp.bfloat16), factors(16, 2, 16))}
    peft.save(tmp_path, adapters, scale=1.0)
    assert {x.dtype for x in open_tensors(tmp_path).values()} == {np.dtype(jnp.bfloat16)}
    loaded = peft.load(tmp_path, dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, loaded.adapters, adapters)


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        peft.load(tmp_path)
    for tensors, config, message in (
        (pair(LAYER), {"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        (pair(LAYER), {"use_dora": True}, "use_dora is set"),
        (pair(LAYER), {"bias": "lora_only"}, "bias is 'lora_only'.*only plain LoRA, with 'none'"),
        (pair(LAYER), {"alora_invocation_tokens": [5]}, "alora_invocation_tokens is set"),
        (pair(LAYER), {"layer_replication": [[0, 1], [0, 1]]}, "layer_replication is set"),
        (pair(LAYER), {"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight"),
        (
            pair(LAYER),
            {"init_lora_weights": "loftq"},
            "init_lora_weights is 'loftq'.*not of its own$",
        ),
        ({f"{LAYER}.lora_A.weight": normal(2, 16)}, {}, r"lora_A \[r, d_in\] and lora_B"),
        ({"model.embed_tokens.lora_embedding_A": normal(2, 16)}, {}, "only plain LoRA on linear"),
        ({"x.lora_A.weight": normal(2, 3, 4, 4)}, {}, "only linear layers"),
        (pair("transformer.h.0.attn.c_attn"), {}, "another model: Llama .* has no transformer"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.load(write(tmp_path, tensors, **config), LLAMA)
    with pytest.raises(ValueError, match="'head' has no name|no name"):
        peft.save(tmp_path, {"nowhere": factors(2, 1, 2)}, scale=1.0, model=LLAMA)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_adapters_are_read_however_they_began_on_untouched_weights(start, tmp_path):
    checkpoint = peft.load(write(tmp_path, pair(LAYER), init_lora_weights=start))
    assert checkpoint.scale == 3.0
    # Some ways to begin are only for some ranks, and what is written has others.
    peft.save(tmp_path, checkpoint.adapters, scale=3.0, config=checkpoint.config)
    assert peft.read_config(tmp_path)["init_lora_weights"] is True


def test_loaded_adapters_run(tmp_path):
    tokens = jnp.arange(6).reshape(2, 3)
    params = jax.jit(LLAMA.init)(jax.random.key(0), tokens)["params"]
    checkpoint = peft.load(write(tmp_path, pair(LAYER)), LLAMA)
    output = lora.apply(LLAMA, params, checkpoint.adapters, tokens, scale=checkpoint.scale)
    merged = LLAMA.apply(
        {"params": lora.merge(params, checkpoint.adapters, scale=checkpoint.scale)}, tokens
    )
    np.testing.assert_allclose(output, merged, rtol=1e-3, atol=1e-4)
