"""Reading weights: all ways in, all ways to fail, and how much memory it takes."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from fedlora_jax.models import Bert, Llama, RopeScaling, ViT, pretrained
from fedlora_jax.models.pretrained import naming
from fedlora_jax.models.pretrained.files import find_file, open_tensors, write_safetensors

VIT = ViT(num_classes=3, patch_size=8, width=16, depth=2, num_heads=2)
IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
LLAMA = Llama(vocab_size=20, width=16, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=24)
TOKENS = jax.ShapeDtypeStruct((1, 2), jnp.int32)


def initialised(model, example):
    return jax.jit(lambda key: model.init(key, jnp.zeros(example.shape, example.dtype)))(
        jax.random.key(0)
    )["params"]


def as_torch(model, params):
    """The parameters under the first torch names of the model."""
    form = naming.formats(model)[0]
    tensors = {}
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        value = np.asarray(value)
        if path.endswith("/kernel"):
            value = value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0))
        tensors[naming.parameter(form, path).theirs] = value
    return tensors


@pytest.fixture(scope="module")
def vit():
    params = initialised(VIT, IMAGES)
    return params, as_torch(VIT, params)


def equal(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


def test_one_file_a_directory_and_shards(vit, tmp_path):
    params, tensors = vit
    write_safetensors(tmp_path / "weights.safetensors", tensors)
    equal(pretrained.load(VIT, tmp_path / "weights.safetensors", IMAGES), params)
    equal(pretrained.load(VIT, tmp_path, IMAGES), params)

    shards = tmp_path / "sharded"
    shards.mkdir()
    names = list(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        write_safetensors(shards / file, {name: tensors[name] for name in part})
    index = {name: file for file, part in parts.items() for name in part}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    equal(pretrained.load(VIT, shards, IMAGES), params)


def test_a_bare_encoder_needs_no_prefix(tmp_path):
    model = Bert(vocab_size=20, width=16, depth=1, num_heads=2, num_positions=8)
    params = initialised(model, TOKENS)
    tensors = {name.removeprefix("bert."): x for name, x in as_torch(model, params).items()}
    tensors["embeddings.position_ids"] = np.arange(8)[None]
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new_end, old_end in old.items():
        tensors = {name.replace(new_end, old_end): x for name, x in tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    equal(pretrained.load(model, tmp_path, TOKENS), params)


def test_a_head_beside_tied_embeddings_is_the_same(tmp_path):
    """Or is the one table that is stored."""
    model = LLAMA.clone(tied=True)
    params = initialised(model, TOKENS)
    table = params["embedding"]["embedding"]
    for head, same in ((table, True), (-table, False)):
        tensors = as_torch(model, params) | {"lm_head.weight": np.asarray(head)}
        write_safetensors(tmp_path / "model.safetensors", tensors)
        if same:
            equal(pretrained.load(model, tmp_path, TOKENS), params)
            continue
        with pytest.raises(ValueError, match="lm_head.weight is not .*embed_tokens.*tied=False"):
            pretrained.load(model, tmp_path, TOKENS)
        del tensors["model.embed_tokens.weight"]
        write_safetensors(tmp_path / "model.safetensors", tensors)
        read = pretrained.load(model, tmp_path, TOKENS)
        equal(read, {**params, "embedding": {"embedding": -table}})


def test_a_model_of_images_that_are_not_square(vit, tmp_path):
    """Its positions are no square grid either, even where their number is a square."""
    write_safetensors(tmp_path / "model.safetensors", vit[1])
    (tmp_path / "config.json").write_text(json.dumps(VIT_CONFIG | {"image_size": [16, 64]}))
    for options in ({}, {"image_size": 32}):
        with pytest.raises(ValueError, match="16 x 64 pixels, not square: `load` takes"):
            pretrained.from_pretrained(tmp_path, **options)
    oblong = jax.ShapeDtypeStruct((1, 16, 64, 3), jnp.float32)
    equal(pretrained.load(VIT, tmp_path, oblong), vit[0])
    (tmp_path / "config.json").write_text(json.dumps(VIT_CONFIG | {"image_size": [32, 32]}))
    equal(pretrained.from_pretrained(tmp_path)[1], vit[0])


def test_storage_types(vit, tmp_path):
    params, tensors = vit
    halves = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    write_safetensors(tmp_path / "half.safetensors", halves)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    equal(pretrained.load(VIT, tmp_path, IMAGES, dtype=jnp.bfloat16), rounded)
    wide = pretrained.load(VIT, tmp_path, IMAGES)
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float32)}
    equal(wide, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))


def test_a_new_head(vit, tmp_path):
    params, tensors = vit
    write_safetensors(tmp_path / "model.safetensors", tensors)
    model = VIT.clone(num_classes=7)
    with pytest.raises(ValueError, match=r"of another shape \(2\)(.|\n)*head/kernel: \[16, 7\]"):
        pretrained.load(model, tmp_path, IMAGES)
    with pytest.raises(ValueError, match="random key"):
        pretrained.load(model, tmp_path, IMAGES, new="^head$")
    key = jax.random.key(3)
    loaded = pretrained.load(model, tmp_path, IMAGES, new="^head$", key=key)
    assert loaded["head"]["kernel"].shape == (16, 7)
    assert np.std(loaded["head"]["kernel"]) > 0
    equal({**loaded, "head": params["head"]}, params)


def test_on_the_host(vit, tmp_path):
    """The same numbers: as they are stored, of other sides of the images, and new ones."""
    write_safetensors(tmp_path / "model.safetensors", vit[1])
    options = {"new": "^head$", "key": jax.random.key(3), "dtype": jnp.bfloat16}
    larger = jax.ShapeDtypeStruct((1, 48, 48, 3), jnp.float32)
    there = pretrained.load(VIT, tmp_path, larger, **options, on_host=True)
    assert {type(x) for x in jax.tree.leaves(there)} == {np.ndarray}
    equal(there, pretrained.load(VIT, tmp_path, larger, **options))


def test_one_error_lists_everything(vit, tmp_path):
    _, tensors = vit
    tensors = dict(tensors)
    tensors["vit.layer_norm.weight"] = tensors.pop("vit.layernorm.weight")
    tensors["classifier.bias"] = np.zeros(5, np.float32)
    tensors["decoder.weight"] = np.zeros((2, 2), np.float32)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError) as info:
        pretrained.load(VIT, tmp_path, IMAGES)
    message = str(info.value)
    assert "read as Hugging Face ViTForImageClassification" in message
    assert (
        "norm/scale: no 'vit.layernorm.weight'; the nearest is 'vit.layer_norm.weight'" in message
    )
    assert "head/bias: [3] wanted, 'classifier.bias' is [5]" in message
    assert "'decoder.weight'" in message and "left over (2)" in message


def test_another_depth_is_not_ignored(tmp_path, vit):
    _, tensors = vit
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"left over \(16\)(.|\n)*and 8 more"):
        pretrained.load(VIT.clone(depth=1), tmp_path, IMAGES)
    with pytest.raises(ValueError, match=r"missing \(16\)"):
        pretrained.load(VIT.clone(depth=3), tmp_path, IMAGES)


def test_positions_are_interpolated_to_other_images(vit, tmp_path):
    params, tensors = vit
    write_safetensors(tmp_path / "model.safetensors", tensors)
    larger = jax.ShapeDtypeStruct((1, 48, 48, 3), jnp.float32)
    loaded = pretrained.load(VIT, tmp_path, larger)
    table = loaded["position_embedding"]
    assert table.shape == (1, 37, 16)
    equal(table[:, 0], params["position_embedding"][:, 0])
    equal({**loaded, "position_embedding": 0}, {**params, "position_embedding": 0})


def test_interpolation_keeps_a_plane():
    x, y = np.meshgrid(np.arange(8.0), np.arange(8.0), indexing="ij")
    table = np.concatenate([[[9.0, 9.0]], np.stack([x, y], -1).reshape(64, 2)])[None]
    resized = pretrained.resize_positions(table, (1, 257, 2))
    grid = np.asarray(resized[0, 1:]).reshape(16, 16, 2)
    # Pixel centres: position p of sixteen is at (p + 0.5) / 2 - 0.5 of eight. Borders are flat.
    expected = (np.arange(16) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(grid[4:12, 5, 0], expected[4:12], atol=1e-4)
    np.testing.assert_allclose(grid[5, 4:12, 1], expected[4:12], atol=1e-4)
    with pytest.raises(ValueError, match="both must be squares"):
        pretrained.resize_positions(table, (1, 38, 2))


LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_CONFIG = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA_3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
BERT_CONFIG = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 8,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
VIT_CONFIG = {
    "model_type": "vit",
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "image_size": 32,
    "id2label": {"0": "a", "1": "b", "2": "c"},
}


def test_models_from_configurations():
    config = LLAMA_CONFIG
    model = pretrained.model_from_config(config, remat=True)
    assert model.num_kv_heads == 4 and model.tied and model.remat
    assert model.context == 512
    assert model.rope_base == 500000.0 and model.rope_scaling.original_context == 8192
    for change, problem in (
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "biases"),
        ({"rope_scaling": {"type": "yarn"}}, "'yarn'"),
        ({"model_type": "mamba"}, "'mamba' is none of bert"),
    ):
        with pytest.raises(ValueError, match=problem):
            pretrained.model_from_config(config | change)
    with pytest.raises(ValueError, match="roberta as a decoder"):
        pretrained.model_from_config({"model_type": "roberta", "is_decoder": True})
    timm = pretrained.model_from_config(
        {"architecture": "vit_base_patch16_224", "num_classes": 4}, dtype=jnp.bfloat16
    )
    assert (timm.width, timm.num_classes, timm.layer_norm_epsilon) == (768, 4, 1e-6)
    with pytest.raises(ValueError, match="'resnet50'"):
        pretrained.model_from_config({"architecture": "resnet50"})


@pytest.mark.parametrize(
    ("config", "change", "fields"),
    [
        # The older entry of the two is the one that somebody added.
        (
            LLAMA_CONFIG,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            {"rope_base": 500000.0, "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192)},
        ),
        (
            LLAMA_CONFIG,
            {"rope_scaling": None, "rope_parameters": {"rope_theta": 5.0}},
            {"rope_base": 5.0, "rope_scaling": None},
        ),
        (
            LLAMA_CONFIG,
            {"original_max_position_embeddings": 16},
            {"rope_scaling": RopeScaling(32.0, 1.0, 4.0, 16)},
        ),
        (LLAMA_CONFIG, {"rope_scaling": {"type": "linear", "factor": 1.0}}, {"rope_scaling": None}),
        (LLAMA_CONFIG, {"hidden_act": "swish"}, {}),
        (BERT_CONFIG, {"hidden_act": "gelu_python"}, {}),
        (BERT_CONFIG, {"model_type": "xlm-roberta", "pad_token_id": 1}, {"variant": "roberta"}),
        (BERT_CONFIG, {"model_type": "camembert", "pad_token_id": 1}, {"variant": "roberta"}),
        (
            BERT_CONFIG,
            {"architectures": ["BertForTokenClassification"], "num_labels": 5},
            {"pooling": "none", "num_classes": 5},
        ),
        (
            BERT_CONFIG,
            {"architectures": ["BertForSequenceClassification"], "id2label": None},
            {"pooling": "first", "num_classes": 2},
        ),
        (VIT_CONFIG, {"id2label": None, "num_labels": 7}, {"num_classes": 7}),
    ],
)
def test_entries_of_configurations(config, change, fields):
    model = pretrained.model_from_config(config | change)
    assert {name: getattr(model, name) for name in fields} == fields


TIMM_VIT = {"architecture": "vit_small_patch16_224", "global_pool": "token"}
TIMM_MIXER = {"architecture": "mixer_b16_224", "global_pool": "avg"}


@pytest.mark.parametrize(
    ("config", "change", "problem"),
    [
        (
            LLAMA_CONFIG,
            {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"type": "linear"}},
            "rope scaling 'linear'",
        ),
        (LLAMA_CONFIG, {"is_causal": False}, "attends in both directions"),
        (LLAMA_CONFIG, {"quantization_config": {"quant_method": "bitnet"}}, "'bitnet'"),
        (LLAMA_CONFIG, {"rms_norm_eps": None}, "a llama lacks 'rms_norm_eps'"),
        (LLAMA_CONFIG, {"rms_norm_eps": "1e-5"}, "norm_epsilon must be a finite number"),
        (LLAMA_CONFIG, {"rms_norm_eps": -1.0}, "norm_epsilon must be at least 0"),
        (LLAMA_CONFIG, {"rope_scaling": LLAMA_3 | {"factor": "8"}}, "factor must be a finite"),
        (LLAMA_CONFIG, {"rope_theta": 0}, "rope_base must be above 0"),
        (LLAMA_CONFIG, {"max_position_embeddings": "512"}, "context must be a whole number"),
        (BERT_CONFIG, {"pad_token_id": None}, "pad_token must be a whole number.*got None"),
        (BERT_CONFIG, {"pad_token_id": "<pad>"}, "pad_token must be a whole number"),
        (BERT_CONFIG, {"type_vocab_size": 0}, "num_token_types must be at least 1"),
        (VIT_CONFIG, {"layer_norm_eps": -1e-6}, "layer_norm_epsilon must be at least 0"),
        (TIMM_VIT, {"global_pool": "avg"}, "global_pool='avg'; ours is 'token'"),
        (TIMM_MIXER, {"global_pool": "token"}, "global_pool='token'; ours is 'avg'"),
        (TIMM_VIT, {"model_args": {"num_heads": 12, "img_size": 384}}, "model_args num_heads;"),
    ],
)
def test_configurations_that_are_refused(config, change, problem):
    pretrained.model_from_config(config)
    with pytest.raises(ValueError, match=problem):
        pretrained.model_from_config(config | change)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file or directory nor the name"):
        pretrained.locate(tmp_path / "nothing")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="holds pytorch_model.bin(.|\n)*save_file"):
        find_file(tmp_path)
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"x": np.ones((4, 4), np.float32), "y": np.float32(2)})
    assert open_tensors(file)["y"].read() == 2
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pytest.raises(ValueError, match="'x' does not fit|'y' does not fit"):
        open_tensors(file)
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="not a safetensors file"):
        open_tensors(file)


def test_a_hub_name_without_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[hub\]'"):
        pretrained.locate("somebody/something")


def test_a_hub_name_is_downloaded(monkeypatch, tmp_path):
    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            assert name == "somebody/something" and "*.safetensors" in allow_patterns
            return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert pretrained.locate("somebody/something") == tmp_path


def test_a_release_with_a_layer_before_the_head(tmp_path):
    """ImageNet-21k's original ViTs: their head is of no use without it."""
    params = initialised(VIT, IMAGES)
    form = next(f for f in naming.formats(VIT) if not f.torch)
    arrays = {
        "opt/target/" + naming.parameter(form, path).theirs: np.asarray(value)
        for path, value in traverse_util.flatten_dict(params, sep="/").items()
    }
    np.savez(tmp_path / "vit.npz", **arrays)
    equal(pretrained.load(VIT, tmp_path / "vit.npz", IMAGES), params)
    arrays |= {"pre_logits/kernel": np.ones((16, 16)), "pre_logits/bias": np.ones(16)}
    np.savez(tmp_path / "vit.npz", **arrays)
    with pytest.raises(ValueError, match=r"left over \(2\)(.|\n)*pre_logits/kernel"):
        pretrained.load(VIT, tmp_path / "vit.npz", IMAGES)
    key = jax.random.key(0)
    loaded = pretrained.load(VIT, tmp_path / "vit.npz", IMAGES, new="^head$", key=key)
    equal({**loaded, "head": 0}, {**params, "head": 0})


MEASURE = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from fedlora_jax import lora
    from fedlora_jax.models import Llama, pretrained

    def status(field):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    jnp.zeros(3).block_until_ready()
    for dtype in ("bfloat16", "float32"):
        before = status("VmRSS")
        params = pretrained.load(MODEL, sys.argv[1], tokens, dtype=dtype)
        jax.block_until_ready(params)
        size = lora.count_parameters(params) * jnp.dtype(dtype).itemsize
        print((status("VmHWM") - before) / size)
        del params
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_memory_peak(tmp_path):
    """Below 1.3 times the parameters, of which the embedding is half; first half as wide."""
    sizes = dict(vocab_size=40_000, width=384, depth=8, num_heads=4, num_kv_heads=4, mlp_dim=1536)
    model = Llama(**sizes, tied=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    form = naming.formats(model)[0]
    tensors = {}
    for path, x in traverse_util.flatten_dict(shapes, sep="/").items():
        shape = x.shape[::-1] if path.endswith("kernel") else x.shape
        tensors[naming.parameter(form, path).theirs] = np.ones(shape, np.float32)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    script = textwrap.dedent(MEASURE).replace("MODEL", repr(f"Llama(**{sizes}, tied=True)")[1:-1])
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert max(map(float, result.stdout.split())) < 1.3
