"""Trees of qwix and of gemma, in their shapes."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedlora_jax.interop import trees


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


QWIX = {
    "mlp": {"kernel": normal(6, 8), "kernel_lora_a": normal(6, 2), "kernel_lora_b": normal(2, 8)},
    "attention": {
        "q": {"w": normal(6, 2, 4), "w_lora_a": normal(6, 2), "w_lora_b": normal(2, 2, 4)},
        "out": {"w": normal(2, 4, 6), "w_lora_a": normal(2, 4, 2), "w_lora_b": normal(2, 6)},
    },
    "norm": {"scale": normal(6)},
}
GEMMA = {
    "layer_0": {
        "attn": {
            "q_einsum": {"w": normal(2, 6, 4), "lora": {"a": normal(6, 2), "b": normal(2, 2, 4)}},
            "attn_vec_einsum": {"lora": {"a": normal(2, 4, 3), "b": normal(3, 6)}},
        },
        "mlp": {"linear": {"lora": {"a": normal(8, 2), "b": normal(2, 6)}}},
    }
}


def test_qwix_paths_and_products():
    adapters = trees.from_qwix(QWIX)
    assert sorted(adapters) == ["attention/out/w", "attention/q/w", "mlp"]
    x = normal(3, 6)
    theirs = jnp.einsum("bd,dr,rnh->bnh", x, *(QWIX["attention"]["q"][f"w_lora_{s}"] for s in "ab"))
    q = adapters["attention/q/w"]
    np.testing.assert_allclose((x @ q.a @ q.b).reshape(3, 2, 4), theirs, rtol=1e-5)
    heads = normal(3, 2, 4)
    out = QWIX["attention"]["out"]
    theirs = jnp.einsum("bnh,nhr,rd->bd", heads, out["w_lora_a"], out["w_lora_b"])
    o = adapters["attention/out/w"]
    np.testing.assert_allclose(heads.reshape(3, 8) @ o.a @ o.b, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    "read, write, tree",
    [(trees.from_qwix, trees.to_qwix, QWIX), (trees.from_gemma, trees.to_gemma, GEMMA)],
)
def test_round_trip_and_another_rank(read, write, tree):
    adapters = read(tree)
    jax.tree.map(np.testing.assert_array_equal, write(adapters, tree), tree)
    wider = {
        path: type(f)(jnp.pad(f.a, [(0, 0), (0, 1)]), jnp.pad(f.b, [(0, 1), (0, 0)]))
        for path, f in adapters.items()
    }
    again = read(write(wider, tree))
    jax.tree.map(np.testing.assert_array_equal, again, wider)


def in_nnx():
    """As `nnx.state` of a model gives it."""
    layer = nnx.Dict(kernel_lora_a=nnx.LoRAParam(normal(6, 2)))
    layer.kernel_lora_b = nnx.LoRAParam(normal(2, 8))
    return nnx.state(nnx.List([layer]))


@pytest.mark.parametrize(
    "tree, paths",
    [
        ({0: QWIX["mlp"], 1: QWIX["mlp"]}, ["0", "1"]),
        ({"layers": [QWIX["mlp"]], "other": (QWIX["mlp"],)}, ["layers/0", "other/0"]),
        ({"net/layer_0": QWIX["mlp"], "dropout": {}, "nothing": None}, ["net/layer_0"]),
        (flax.core.freeze({"layer": QWIX["mlp"]}), ["layer"]),
        (in_nnx(), ["0"]),
    ],
)
def test_any_tree(tree, paths):
    adapters = trees.from_qwix(tree)
    assert list(adapters) == paths
    again = trees.to_qwix({path: type(f)(2 * f.a, f.b) for path, f in adapters.items()}, tree)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for path, factors in trees.from_qwix(again).items():
        np.testing.assert_array_equal(factors.a, 2 * adapters[path].a)


def test_errors():
    with pytest.raises(ValueError, match="no adapters in the tree"):
        trees.from_gemma(QWIX)
    with pytest.raises(ValueError, match=r"x: a \[..., r\] and b \[r, ...\] expected"):
        trees.from_gemma({"x": {"lora": {"a": normal(3, 2)}}})
    adapters = trees.from_gemma(GEMMA)
    adapters.pop("layer_0/mlp/linear")
    with pytest.raises(ValueError, match="one side only: layer_0/mlp/linear"):
        trees.to_gemma(adapters, GEMMA)
