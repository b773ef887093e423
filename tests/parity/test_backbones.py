"""Our backbones against the torch originals: logits, LoRA gradients, generated tokens."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft as original_peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora_jax import lora
from fedlora_jax.interop import peft
from fedlora_jax.models import Bert, Mixer, ViT, pretrained
from fedlora_jax.models.generate import generate
from tests.parity import originals

TOLERANCE = 1e-4

# Name: the original, the modules to adapt, the inputs, the padding token.
CASES = {
    "vit": (originals.vit, ["q_proj", "v_proj", "fc2"], originals.images(), None),
    "bert": (originals.bert, ["query", "value"], originals.texts(0), 0),
    "roberta": (originals.roberta, ["query", "dense"], originals.texts(1), 1),
    "llama": (originals.llama, "all-linear", originals.texts(0), None),
    "llama_tied": (
        lambda: originals.llama(tied=True, rope=originals.LLAMA_3),
        ["q_proj", "k_proj", "down_proj"],
        originals.texts(0),
        None,
    ),
}
TIMM = {
    "mixer": (originals.TimmMixer, Mixer, ["fc1", "fc2"]),
    "vit_timm": (originals.TimmViT, ViT, ["qkv", "attn.proj"]),
}


def ours(kind: type[nn.Module]) -> nn.Module:
    fields = dict(num_classes=5, patch_size=8, width=32, depth=2)
    return kind(**fields) if kind is Mixer else kind(**fields, num_heads=4, layer_norm_epsilon=1e-6)


def distance(x, y) -> float:
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape
    return float(np.abs(x - y).max() / np.abs(y).max())


def adapted(original, targets, directory):
    """The original with random adapters of PEFT's, saved as PEFT saves them."""
    torch.manual_seed(1)
    config = original_peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False
    )
    wrapped = original_peft.get_peft_model(original, config)
    wrapped.save_pretrained(directory)
    return wrapped.eval()


def compare_gradients(wrapped, model, params, checkpoint, inputs, pad) -> None:
    """Logits, and gradients of a loss by every factor, under the adapters."""
    logits = originals.forward(wrapped, inputs, pad)
    target = torch.linspace(-1, 1, logits.shape[-1])
    ((logits - target) ** 2).mean().backward()

    def loss(adapters):
        out = lora.apply(model, params, adapters, inputs, scale=checkpoint.scale)
        return jnp.mean((out - jnp.asarray(target.numpy())) ** 2), out

    gradients, output = jax.jit(jax.grad(loss, has_aux=True))(checkpoint.adapters)
    assert distance(output, logits.detach()) < TOLERANCE
    theirs = {}
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            theirs[name.replace(".default", "")] = parameter.grad
    expected = gradients_in_our_layout(theirs, model)
    assert expected.keys() == gradients.keys()
    for path, (a, b) in expected.items():
        assert distance(gradients[path].a, a) < TOLERANCE, path
        assert distance(gradients[path].b, b) < TOLERANCE, path


def gradients_in_our_layout(theirs, model):
    """Reads torch's gradients as if they were an adapter checkpoint."""
    sides = {}
    for name, value in theirs.items():
        module, _, side = (
            name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        )
        sides.setdefault(module, {})[side] = jnp.asarray(value.numpy()).T
    bare = {module: peft.Factors(pair["A"], pair["B"]) for module, pair in sides.items()}
    return peft._to_ours(peft._format(model, list(bare)), bare)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(name, tmp_path):
    make, targets, inputs, pad = CASES[name]
    original = make()
    originals.save(original, tmp_path / "model")
    model, params = pretrained.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = originals.forward(original, inputs, pad)
    assert distance(jax.jit(model.apply)({"params": params}, inputs), expected) < TOLERANCE

    wrapped = adapted(original, targets, tmp_path / "adapter")
    checkpoint = peft.load(tmp_path / "adapter", model)
    compare_gradients(wrapped, model, params, checkpoint, inputs, pad)


POOLER = {"bert.pooler.dense.weight": torch.eye(32), "bert.pooler.dense.bias": torch.zeros(32)}

# Name: the original, what is added to its files, the padding token.
EDITED = {
    "xlm_roberta": (lambda: originals.roberta("XLMRoberta"), {}, {}, 1),
    "camembert": (lambda: originals.roberta("Camembert"), {}, {}, 1),
    "token_classification": (lambda: originals.bert("BertForTokenClassification"), {}, POOLER, 0),
    "scaling_beside_parameters": (originals.llama, {"rope_scaling": originals.LLAMA_3}, {}, None),
    "original_context": (
        lambda: originals.llama(rope=originals.LLAMA_3),
        {"original_max_position_embeddings": 16},
        {},
        None,
    ),
}


@pytest.mark.parametrize("name", EDITED)
def test_logits_of_files_as_transformers_reads_them(name, tmp_path):
    make, entries, tensors, pad = EDITED[name]
    original = make()
    originals.save(original, tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text(json.dumps(originals.read_json(config) | entries))
    save_file(load_file(weights) | tensors, weights, {"format": "pt"})
    inputs = originals.texts(pad or 0)
    with torch.no_grad():
        expected = originals.forward(type(original).from_pretrained(tmp_path), inputs, pad)
    model, params = pretrained.from_pretrained(tmp_path)
    assert distance(jax.jit(model.apply)({"params": params}, inputs), expected) < TOLERANCE


@pytest.mark.parametrize("name", TIMM)
def test_timm_logits_and_gradients(name, tmp_path):
    make, kind, targets = TIMM[name]
    original = originals.randomised(make())
    originals.save(original, tmp_path)
    model, inputs = ours(kind), originals.images()
    params = pretrained.load(model, tmp_path, inputs)
    with torch.no_grad():
        expected = originals.forward(original, inputs)
    assert distance(jax.jit(model.apply)({"params": params}, inputs), expected) < TOLERANCE

    wrapped = adapted(original, targets, tmp_path / "adapter")
    checkpoint = peft.load(tmp_path / "adapter", model)
    if name == "mixer":
        compare_gradients(wrapped, model, params, checkpoint, inputs, None)
    else:  # Query, key and value share one `a` there, and have one each here.
        output = lora.apply(model, params, checkpoint.adapters, inputs, scale=checkpoint.scale)
        assert distance(output, originals.forward(wrapped, inputs).detach()) < TOLERANCE


@pytest.mark.parametrize("name", ["vit_s16", "mixer_s16"])
def test_timm_itself(name, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    full = {"vit_s16": "vit_small_patch16_224", "mixer_s16": "mixer_s16_224"}[name]
    original = originals.randomised(timm.create_model(full, pretrained=False, num_classes=5))
    originals.save(original, tmp_path)
    (tmp_path / "config.json").write_text(f'{{"architecture": "{full}", "num_classes": 5}}')
    model, params = pretrained.from_pretrained(tmp_path)
    inputs = originals.images(224)
    with torch.no_grad():
        expected = originals.forward(original, inputs)
    assert distance(jax.jit(model.apply)({"params": params}, inputs), expected) < TOLERANCE


@pytest.mark.parametrize("name", TIMM)
def test_original_releases(name, tmp_path):
    make, kind, _ = TIMM[name]
    original = originals.randomised(make())
    arrays = (
        originals.original_mixer_arrays(original)
        if kind is Mixer
        else originals.original_vit_arrays(original)
    )
    np.savez(tmp_path / "release.npz", **arrays)
    model, inputs = ours(kind), originals.images()
    params = pretrained.load(model, tmp_path / "release.npz", inputs)
    with torch.no_grad():
        expected = originals.forward(original, inputs)
    assert distance(jax.jit(model.apply)({"params": params}, inputs), expected) < TOLERANCE


def test_sentence_encoder(tmp_path):
    original = originals.bert("BertModel")
    originals.save(original, tmp_path)
    tokens = originals.texts(0)
    mask = tokens != 0
    with torch.no_grad():
        output = original(torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(int)))
    expected = {
        "first": output.pooler_output,
        "none": output.last_hidden_state,
        "mean": (output.last_hidden_state * torch.tensor(mask)[..., None]).sum(1)
        / torch.tensor(mask).sum(1, keepdim=True),
    }
    for pooling, value in expected.items():
        model, params = pretrained.from_pretrained(tmp_path, pooling=pooling)
        assert isinstance(model, Bert)
        assert distance(model.apply({"params": params}, tokens), value) < TOLERANCE


@pytest.mark.parametrize("rope", [None, originals.LLAMA_3])
def test_sharded_llama(rope, tmp_path):
    original = originals.llama(rope=rope)
    original.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model, params = pretrained.from_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 50, size=(2, 90))
    with torch.no_grad():
        expected = originals.forward(original, tokens)
    assert distance(model.apply({"params": params}, tokens), expected) < TOLERANCE


def test_generation_token_for_token(tmp_path):
    original = originals.llama(tied=True, rope=originals.LLAMA_3)
    originals.save(original, tmp_path)
    model, params = pretrained.from_pretrained(tmp_path)
    lengths = np.array([9, 4, 12])
    prompts = np.random.default_rng(3).integers(3, 50, size=(3, 12))
    new = 40
    output = generate(model, params, jnp.asarray(prompts), jnp.asarray(lengths), max_new_tokens=new)
    for row, length in enumerate(lengths):
        prompt = torch.tensor(prompts[row : row + 1, :length])
        expected = original.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
        )[0, length:]
        np.testing.assert_array_equal(output[row], expected.numpy())


def test_generation_with_adapters_stops_at_the_end_token(tmp_path):
    original = originals.llama()
    originals.save(original, tmp_path / "model")
    model, params = pretrained.from_pretrained(tmp_path / "model")
    wrapped = adapted(original, "all-linear", tmp_path / "adapter")
    checkpoint = peft.load(tmp_path / "adapter", model)
    prompt = np.random.default_rng(3).integers(3, 50, size=(1, 6))
    free = generate(
        model,
        params,
        jnp.asarray(prompt),
        jnp.array([6]),
        max_new_tokens=20,
        adapters=checkpoint.adapters,
        scale=checkpoint.scale,
    )[0]
    end = int(free[10])
    expected = wrapped.generate(
        input_ids=torch.tensor(prompt),
        attention_mask=torch.ones(1, 6),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )[0, 6:].numpy()
    output = generate(
        model,
        params,
        jnp.asarray(prompt),
        jnp.array([6]),
        max_new_tokens=20,
        adapters=checkpoint.adapters,
        scale=checkpoint.scale,
        end_token=end,
    )[0]
    np.testing.assert_array_equal(output[: len(expected)], expected)
    assert (np.asarray(output[len(expected) :]) == end).all()
