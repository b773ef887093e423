"""Adapter checkpoints, both ways, with the real PEFT."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft as original_peft
import pytest
import torch
import transformers

from fedlora_jax import Factors, lora
from fedlora_jax.interop import checkpoints, peft
from fedlora_jax.models import lora_targets, pretrained
from tests.parity import originals

TOLERANCE = 1e-4

MODELS = {
    "vit": (originals.vit, originals.images(), None),
    "bert": (originals.bert, originals.texts(0), 0),
    "roberta": (originals.roberta, originals.texts(1), 1),
    "llama": (originals.llama, originals.texts(0), None),
    "llama_tied": (functools.partial(originals.llama, tied=True), originals.texts(0), None),
}
# Which modules are trained as a whole where we write.
HEADS = {
    "vit": "^(norm|head)$",
    "bert": "^(block_1/norm2|head)$",
    "roberta": "^(pooler|head)$",
    "llama": "^block_0/norm1$",
    "llama_tied": "^embedding$",
}
IMPORTS = {
    "rank_pattern": dict(
        target_modules=["query", "value"],
        rank_pattern={"layer.0.attention.self.query": 5, "value": 2},
        alpha_pattern={r"encoder\.layer\.\d+\.attention\.self\.value": 7},
    ),
    "rslora": dict(target_modules=["query", "key"], use_rslora=True, rank_pattern={"key": 6}),
    "modules_to_save": dict(target_modules=["query"], modules_to_save=["classifier"]),
}


def distance(x, y) -> float:
    x, y = np.asarray(x), np.asarray(y)
    return float(np.abs(x - y).max() / np.abs(y).max())


@functools.cache
def backbone(name, directory):
    original = MODELS[name][0]()
    originals.save(original, directory)
    return pretrained.from_pretrained(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def apply(model, params, adapters, inputs, scale):
    return jax.jit(lambda a: lora.apply(model, params, a, inputs, scale=scale))(adapters)


@pytest.mark.parametrize("name", IMPORTS)
def test_reads_what_peft_writes(name, directory, tmp_path):
    model, params = backbone("roberta", directory / "roberta")
    inputs = originals.texts(1)
    torch.manual_seed(2)
    config = original_peft.LoraConfig(r=3, lora_alpha=4, init_lora_weights=False, **IMPORTS[name])
    wrapped = original_peft.get_peft_model(originals.roberta(), config)
    if name == "modules_to_save":
        originals.randomised(wrapped.base_model.model.classifier, seed=3)
    wrapped.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = originals.forward(wrapped, inputs, 1)

    checkpoint = peft.load(tmp_path, model)
    backbone_params, head = lora.split_head(params, "^(pooler|head)$")
    if checkpoint.saved:
        assert jax.tree.map(jnp.shape, checkpoint.saved) == jax.tree.map(jnp.shape, head)
        params = lora.join_head(backbone_params, checkpoint.saved)
    output = apply(model, params, checkpoint.adapters, inputs, checkpoint.scale)
    assert distance(output, expected) < TOLERANCE


def test_fan_in_fan_out(tmp_path):
    """GPT-2 stores kernels as we do; its adapters have PEFT's layout all the same."""
    torch.manual_seed(0)
    sizes = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=20)
    config = original_peft.LoraConfig(
        r=3, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    original = transformers.GPT2LMHeadModel(sizes).eval()
    state = {name: value.clone() for name, value in original.state_dict().items()}
    wrapped = original_peft.get_peft_model(original, config).eval()
    wrapped.save_pretrained(tmp_path / "first")
    checkpoint = peft.load(tmp_path / "first")
    ((name, factors),) = checkpoint.adapters.items()
    layer = wrapped.base_model.model.get_submodule(name)
    change = layer.get_delta_weight("default").detach()
    assert distance(checkpoint.scale * factors.a @ factors.b, change) < 1e-6

    peft.save(tmp_path / "second", checkpoint.adapters, scale=2.5, config=checkpoint.config)
    again = transformers.GPT2LMHeadModel(sizes)
    again.load_state_dict(state)
    again = original_peft.PeftModel.from_pretrained(again, tmp_path / "second").eval()
    layer = again.base_model.model.get_submodule(name)
    expected = change * 2.5 / checkpoint.scale
    assert distance(layer.get_delta_weight("default").detach(), expected) < 1e-6


def random_adapters(params, targets, ranks, seed=5):
    rng = np.random.default_rng(seed)
    shapes = lora.kernel_shapes(params)
    adapters = {}
    for i, path in enumerate(lora.select(shapes, targets)):
        rank = ranks[i % len(ranks)]
        a = rng.normal(size=(shapes[path].d_in, rank)) * 0.3
        b = rng.normal(size=(rank, shapes[path].d_out)) * 0.3
        adapters[path] = Factors(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    return adapters


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_what_we_write(name, rslora, directory, tmp_path):
    model, params = backbone(name, directory / name)
    make, inputs, pad = MODELS[name]
    adapters = random_adapters(params, lora_targets(model), ranks=(3, 2))
    backbone_params, head = lora.split_head(params, HEADS[name])
    head = jax.tree.map(lambda x: x + 0.1, head)
    params = lora.join_head(backbone_params, head)
    names = "transformers 5 ViTForImageClassification" if name == "vit" else None
    peft.save(
        tmp_path,
        adapters,
        scale=0.7,
        model=model,
        head=head,
        config={"use_rslora": rslora, "base_model_name_or_path": "somebody/model"},
        names=names,
    )
    wrapped = original_peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    with torch.no_grad():
        expected = originals.forward(wrapped, inputs, pad)
    output = apply(model, params, adapters, inputs, 0.7)
    assert distance(output, expected) < TOLERANCE

    again = peft.load(tmp_path, model)
    output = apply(model, params, again.adapters, inputs, again.scale)
    assert distance(output, expected) < TOLERANCE
    assert again.config["base_model_name_or_path"] == "somebody/model"


def test_a_bare_tree_round_trips_through_peft(directory, tmp_path):
    model, params = backbone("llama", directory / "llama")
    original = originals.llama()
    config = original_peft.LoraConfig(
        r=3, lora_alpha=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"]
    )
    wrapped = original_peft.get_peft_model(original, config)
    wrapped.save_pretrained(tmp_path / "first")
    bare = peft.load(tmp_path / "first")
    assert "model.layers.0.self_attn.q_proj" in bare.adapters
    peft.save(tmp_path / "second", bare.adapters, scale=bare.scale, config=bare.config)

    inputs = originals.texts(0)
    reloaded = original_peft.PeftModel.from_pretrained(originals.llama(), tmp_path / "second")
    with torch.no_grad():
        expected = originals.forward(wrapped.eval(), inputs)
        assert distance(originals.forward(reloaded.eval(), inputs), expected) < 1e-6
    ours = peft.load(tmp_path / "second", model)
    assert distance(apply(model, params, ours.adapters, inputs, ours.scale), expected) < TOLERANCE


@pytest.mark.parametrize(
    "name, targets, saved",
    [
        ("llama", ["q_proj", "lm_head"], None),
        ("llama_tied", ["q_proj"], ["embed_tokens"]),
        ("llama_tied", ["q_proj"], ["lm_head"]),
        # Of the ViT, transformers 5 names modules otherwise than the files do.
        ("vit", ["q_proj", "v_proj"], ["layernorm_before", "layernorm"]),
    ],
)
def test_transformers_loads_a_merged_backbone(name, targets, saved, tmp_path):
    make, inputs, pad = MODELS[name]
    make().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    for seed in range(2):
        torch.manual_seed(seed)
        config = original_peft.LoraConfig(
            r=3,
            lora_alpha=4,
            init_lora_weights=False,
            target_modules=targets,
            modules_to_save=saved,
        )
        wrapped = original_peft.get_peft_model(make(), config).eval()
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, wrapped.parameters()):
                parameter.add_(0.1 * torch.randn_like(parameter))
        wrapped.save_pretrained(tmp_path / f"client_{seed}")
    sources = [tmp_path / "client_0", tmp_path / "client_1"]
    combined = checkpoints.combine(sources, [0, 1], "fedit")
    assert combined.error < 1e-6
    checkpoints.merge(tmp_path / "base", combined.checkpoint, tmp_path / "merged")
    merged = type(make()).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = originals.forward(wrapped, inputs, pad)
        assert distance(originals.forward(merged, inputs, pad), expected) < TOLERANCE
    model, params = pretrained.from_pretrained(tmp_path / "merged")
    assert distance(jax.jit(model.apply)({"params": params}, inputs), expected) < TOLERANCE
