import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from scipy import special

from fedlora_jax import models
from fedlora_jax.models import vit


def _vit(**overrides):
    return models.get("vit_digits", **{"width": 16, "depth": 2, "num_heads": 2} | overrides)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (3, 16, 16, 1))


@pytest.fixture(scope="module")
def params(images):
    params = jax.jit(_vit().init)(jax.random.key(1), images)["params"]
    # Away from zeros and ones, so that no part can be left out unnoticed.
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.map(jnp.add, params, structure.unflatten(noise))


def test_parameter_paths_and_shapes(params):
    dense = {
        "attention/query": (16, 16),
        "attention/key": (16, 16),
        "attention/value": (16, 16),
        "attention/out": (16, 16),
        "mlp/fc1": (16, 64),
        "mlp/fc2": (64, 16),
    }
    expected = {
        "patch_embedding/kernel": (4, 4, 1, 16),
        "patch_embedding/bias": (16,),
        "class_token": (1, 1, 16),
        "position_embedding": (1, 17, 16),
        "norm/scale": (16,),
        "norm/bias": (16,),
        "head/kernel": (16, 10),
        "head/bias": (10,),
    }
    for i in range(2):
        for path, shape in dense.items():
            expected[f"block_{i}/{path}/kernel"] = shape
            expected[f"block_{i}/{path}/bias"] = shape[1:]
        for norm in ("norm1", "norm2"):
            expected |= {f"block_{i}/{norm}/scale": (16,), f"block_{i}/{norm}/bias": (16,)}
    found = {path: x.shape for path, x in traverse_util.flatten_dict(params, sep="/").items()}
    assert found == expected


def test_equals_a_float64_oracle(params, images):
    logits = jax.jit(_vit().apply)({"params": params}, images)
    as_float64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    oracle = _oracle(as_float64, np.asarray(images, np.float64), num_heads=2)
    np.testing.assert_allclose(logits, oracle, rtol=1e-4, atol=1e-5)


def _oracle(params, images, num_heads):
    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def norm(p, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True)) * p["scale"] + p["bias"]

    def attention(p, x):
        q, k, v = (
            dense(p[name], x).reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2)
            for name in ("query", "key", "value")
        )
        weights = special.softmax(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]), axis=-1)
        return dense(p["out"], (weights @ v).swapaxes(1, 2).reshape(x.shape))

    def mlp(p, x):
        hidden = dense(p["fc1"], x)
        return dense(p["fc2"], hidden * special.ndtr(hidden))

    kernel = params["patch_embedding"]["kernel"]
    size, width = kernel.shape[0], kernel.shape[-1]
    batch, side = len(images), images.shape[1] // size
    patches = images.reshape(batch, side, size, side, size, -1).swapaxes(2, 3)
    x = patches.reshape(batch, side**2, -1) @ kernel.reshape(-1, width)
    x = x + params["patch_embedding"]["bias"]
    class_tokens = np.repeat(params["class_token"], batch, axis=0)
    x = np.concatenate([class_tokens, x], axis=1) + params["position_embedding"]
    for i in range(2):
        block = params[f"block_{i}"]
        x = x + attention(block["attention"], norm(block["norm1"], x))
        x = x + mlp(block["mlp"], norm(block["norm2"], x))
    return dense(params["head"], norm(params["norm"], x[:, 0]))


def test_bfloat16_computes_low_and_stores_high(params, images):
    model = _vit(dtype=jnp.bfloat16)
    initial = jax.eval_shape(model.init, jax.random.key(1), images)["params"]
    assert {x.dtype for x in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    logits = jax.jit(model.apply)({"params": params}, images)
    full = jax.jit(_vit().apply)({"params": params}, images)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - full).max() < 0.1


def test_remat_changes_neither_values_nor_gradients_nor_paths(params, images):
    paths = []

    def watch(next_function, args, kwargs, context):
        paths.append("/".join(context.module.path))
        return next_function(*args, **kwargs)

    def gradients(model):
        def loss(params):
            with nn.intercept_methods(watch):
                return jnp.sum(model.apply({"params": params}, images) ** 2)

        paths.clear()
        result = jax.jit(jax.value_and_grad(loss))(params)
        return result, set(paths)

    (plain, plain_paths), (remat, remat_paths) = gradients(_vit()), gradients(_vit(remat=True))
    assert plain_paths == remat_paths and "block_1/attention/query" in plain_paths
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), plain, remat)


@pytest.mark.parametrize(
    ("overrides", "shape", "message"),
    [
        ({}, (16, 16, 1), r"must be \[B, H, W, C\]"),
        ({}, (1, 16, 18, 1), "patches of 4 pixels do not tile images of 16 x 18"),
        ({"num_heads": 3}, (1, 16, 16, 1), "3 heads do not divide a width of 16"),
    ],
)
def test_impossible_shapes_are_refused(overrides, shape, message):
    with pytest.raises(ValueError, match=message):
        _vit(**overrides).init(jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize(
    ("name", "millions"), [("vit_s16", 22.05), ("vit_b16", 86.57), ("vit_l16", 304.33)]
)
def test_known_sizes(name, millions):
    """Parameter counts of the released ImageNet-1k models at 224 pixels."""
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(models.get(name).init, jax.random.key(0), image)
    assert sum(x.size for x in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=0.01)


def test_registry():
    assert models.get("vit_b16", num_classes=7).num_classes == 7
    assert "vit_digits" in models.names()
    with pytest.raises(ValueError, match="Did you mean 'vit_b16'"):
        models.get("vit-b16")


@pytest.mark.parametrize("dtype, size", [("float32", 1), ("float32", 8), ("bfloat16", 1)])
def test_attention_and_gelu_are_those_of_jax(dtype, size):
    """Also of scores whose exponentials overflow; with gradients."""
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.normal(size=(2, 9, 3, 8)) * size, dtype) for _ in range(4))
    pairs = {
        "attention": (vit.attention, jax.nn.dot_product_attention, (q, k, v)),
        "gelu": (vit.gelu, lambda x: jax.nn.gelu(x, approximate=False), (q,)),
    }
    tolerance = 1e-4 if dtype == "float32" else 0.05
    for name, (ours, theirs, inputs) in pairs.items():
        value, pull = jax.vjp(ours, *inputs)
        wanted, wanted_pull = jax.vjp(theirs, *inputs)
        for mine, other in zip((value, *pull(g)), (wanted, *wanted_pull(g)), strict=True):
            assert mine.dtype == other.dtype == dtype
            distance = np.abs(np.asarray(mine - other, np.float32)).max()
            assert distance <= tolerance * np.abs(np.asarray(other, np.float32)).max(), name
