"""Adapters on Linen models, against the dense formula W + s a b."""

import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlora_jax import Factors, lora

SCALE = 1.7


class Net(nn.Module):
    """Dense, attention with head axes, and a convolution, one of them rematerialised."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3,), name="conv")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12, name="attention")(x)
        return nn.remat(nn.Dense)(5, name="head")(nn.gelu(nn.Dense(7, name="hidden")(x)))


@pytest.fixture(scope="module")
def setup():
    x = jax.random.normal(jax.random.key(0), (3, 4, 6))
    params = jax.jit(Net().init)(jax.random.key(1), x)["params"]
    adapters = lora.init(jax.random.key(2), params, targets=["attention", "hidden", "head"], rank=3)
    keys = iter(jax.random.split(jax.random.key(3), 20))
    adapters = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), adapters)
    return x, params, adapters


@jax.jit
def apply(params, adapters, x, offset=None):
    return lora.apply(Net(), params, adapters, x, scale=SCALE, offset=offset)


@jax.jit
def apply_plain(params, x):
    return Net().apply({"params": params}, x)


def test_apply_equals_merged_kernels(setup):
    x, params, adapters = setup
    assert set(adapters) == {
        "attention/query",
        "attention/key",
        "attention/value",
        "attention/out",
        "hidden",
        "head",
    }
    merged = lora.merge(params, adapters, scale=SCALE)
    np.testing.assert_allclose(
        apply(params, adapters, x),
        apply_plain(merged, x),
        rtol=2e-4,
        atol=2e-4,
    )
    out, kernel = adapters["attention/out"], params["attention"]["out"]["kernel"]
    dense = np.float64(SCALE) * np.float64(out.a) @ np.float64(out.b)
    np.testing.assert_allclose(
        merged["attention"]["out"]["kernel"], kernel + dense.reshape(kernel.shape), rtol=1e-5
    )
    np.testing.assert_array_equal(merged["conv"]["kernel"], params["conv"]["kernel"])


def test_variables_work_like_params(setup):
    x, params, adapters = setup
    np.testing.assert_array_equal(
        apply({"params": params}, adapters, x),
        apply(params, adapters, x),
    )
    merged = lora.merge({"params": params}, adapters, scale=SCALE)
    assert set(merged) == {"params"}


def test_offset_adds_to_the_adapters(setup):
    x, params, adapters = setup
    offset = {"hidden": Factors(*(2 * y for y in adapters["hidden"]))}
    both = lora.merge(lora.merge(params, adapters, scale=SCALE), offset, scale=SCALE)
    np.testing.assert_allclose(
        apply(params, adapters, x, offset),
        apply_plain(both, x),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("frozen", [(), ("hidden", "attention/out")], ids=["alone", "offset"])
def test_gradients_of_adapters_are_those_of_merged_kernels(setup, frozen):
    x, params, adapters = setup
    offset = {path: Factors(*(2 * y for y in adapters[path])) for path in frozen}

    def by_interception(adapters):
        outputs = lora.apply(Net(), params, adapters, x, scale=SCALE, offset=offset)
        return jnp.sum(outputs**2)

    def by_merging(adapters):
        merged = lora.merge(lora.merge(params, offset, scale=SCALE), adapters, scale=SCALE)
        return jnp.sum(Net().apply({"params": merged}, x) ** 2)

    expected = jax.jit(jax.grad(by_merging))(adapters)
    for path, factors in jax.jit(jax.grad(by_interception))(adapters).items():
        for got, want in zip(factors, expected[path], strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-3 * float(jnp.abs(want).max()))


def test_a_project_may_take_gradients_within_shard_map(setup):
    """Of a batch that is spread over devices, with adapters that are the same on all."""
    x, params, adapters = setup
    mesh = jax.sharding.Mesh(jax.devices()[:1], "batch")
    rows = jax.sharding.PartitionSpec("batch")
    everywhere = jax.sharding.PartitionSpec()

    def loss(adapters, x):
        return jnp.mean(lora.apply(Net(), params, adapters, x, scale=SCALE) ** 2)

    def over_devices(adapters, x):
        return jax.lax.pmean(loss(adapters, x), "batch")

    specs = {"mesh": mesh, "in_specs": (everywhere, rows), "out_specs": everywhere}
    within = jax.shard_map(jax.grad(over_devices), **specs)
    around = jax.grad(jax.shard_map(over_devices, **specs))
    expected = jax.jit(jax.grad(loss))(adapters, x)
    for gradients in (within, around):
        found = jax.jit(gradients)(adapters, x)
        jax.tree.map(lambda y, z: np.testing.assert_allclose(y, z, rtol=1e-4), found, expected)


def test_second_derivatives_are_those_of_merged_kernels():
    """In reverse mode, and in forward mode over it: the first are written by hand."""
    x, model = jax.random.normal(jax.random.key(0), (5, 3)), nn.Sequential([nn.Dense(4), nn.tanh])
    params = model.init(jax.random.key(1), x)["params"]
    a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(3, 2), (2, 4)]))
    adapters = {"layers_0": Factors(a, b)}

    def by_interception(adapters):
        return jnp.sum(lora.apply(model, params, adapters, x, scale=SCALE) ** 2)

    def by_merging(adapters):
        merged = lora.merge(params, adapters, scale=SCALE)
        return jnp.sum(model.apply({"params": merged}, x) ** 2)

    for outer in (jax.jacfwd, jax.jacrev):
        got, want = (
            jax.tree.leaves(jax.jit(outer(jax.grad(f)))(adapters))
            for f in (by_interception, by_merging)
        )
        for found, expected in zip(got, want, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_gradients_turn_no_array_of_all_tokens_round():
    """Their products have the rank in front: of others XLA first transposes the larger operand."""
    x, model = jnp.ones((64, 6)), nn.Sequential([nn.Dense(32)])
    params = model.init(jax.random.key(0), x)
    adapters = {"layers_0": Factors(jnp.ones((6, 2)), jnp.ones((2, 32)))}

    def loss(adapters):
        return jnp.sum(lora.apply(model, params, adapters, x, scale=SCALE) ** 2)

    program = str(jax.make_jaxpr(jax.grad(loss))(adapters))
    assert "f32[2,32] = dot_general" in program
    assert "f32[32,2] = dot_general" not in program
    if jax.default_backend() != "cpu":  # Elsewhere a library is called for them.
        return
    program = jax.jit(jax.grad(loss)).lower(adapters).compile().as_text()
    products = set(re.findall(r"= f32\[([\d,]*)\]\S* dot\(", program))
    assert {"2,6", "2,32"} <= products
    assert not products & {"6,2", "32,2"}


def test_clients_share_one_backbone(setup):
    """No intermediate of a vmapped apply holds a kernel with a client axis."""
    x, params, adapters = setup
    clients = 11
    stacked = jax.tree.map(lambda x: jnp.repeat(x[None], clients, 0), adapters)
    program = jax.make_jaxpr(
        jax.vmap(lambda mine: lora.apply(Net(), params, mine, x, scale=SCALE))
    )(stacked)
    kernels = {(clients, *shape) for shape in [(8, 7), (7, 5), (8, 2, 6), (8, 12)]}
    shapes = {v.aval.shape for e in program.jaxpr.eqns for v in e.outvars}
    assert not kernels & shapes


def test_init_is_that_of_lora(setup):
    _, params, _ = setup
    adapters = lora.init(jax.random.key(0), params, targets="hidden", rank=2)
    a, b = adapters["hidden"]
    assert a.shape == (8, 2) and b.shape == (2, 7) and not b.any()
    assert 0.5 * 8**-0.5 < jnp.abs(a).max() <= 8**-0.5
    more = lora.init(jax.random.key(0), params, targets=["hidden", "head"], rank=2)
    np.testing.assert_array_equal(more["hidden"].a, a)
    assert lora.count_parameters(adapters) == 2 * (8 + 7)


def test_head_is_split_off_and_joined(setup):
    _, params, _ = setup
    backbone, head = lora.split_head(params, "head")
    assert set(head) == {"head"} and "head" not in backbone
    joined = lora.join_head(backbone, head)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert lora.split_head(params, None)[1] == {}


class Scaled(nn.Dense):
    """Its call is two for an interceptor; what it does comes after its layer's own product."""

    def __call__(self, x):
        return nn.tanh(super().__call__(x))


class Split(nn.Module):
    """Query, key and value as one kernel of four axes; a layer that is called twice; subclasses."""

    @nn.compact
    def __call__(self, x):
        heads = nn.DenseGeneral((3, 2, 4), name="qkv")(x).mean(-3).reshape(*x.shape[:-1], 8)
        again = nn.remat(Scaled)(8, name="again")
        return Scaled(2, name="scaled")(again(again(heads)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.uint8, jnp.bool_])
def test_any_layer_and_input_is_as_with_merged_kernels(dtype):
    """Kernels of four axes, subclasses, layers called twice, and inputs that are not floating."""
    x, model = jax.random.bernoulli(jax.random.key(0), 0.5, (3, 6)).astype(dtype), Split()
    params = model.init(jax.random.key(1), x)["params"]
    adapters = lora.init(jax.random.key(2), params, targets=".*", rank=2)
    assert set(adapters) == {"qkv", "again", "scaled"}
    adapters = {path: Factors(a, b + 0.5) for path, (a, b) in adapters.items()}
    got = lora.apply(model, params, adapters, x, scale=SCALE)
    want = model.apply({"params": lora.merge(params, adapters, scale=SCALE)}, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert got.dtype == want.dtype
    assert jnp.abs(got - model.apply({"params": params}, x)).max() > 1e-2


def test_kernels_of_more_than_three_axes_are_taken_where_the_bias_tells_the_split():
    kernels = {
        "qkv": (6, 3, 2, 4),
        "conv": (3, 3, 6, 8),
        "bare": (6, 3, 2, 4),
        "local": (5, 5, 9, 8),
        "scanned": (3, 6, 8),
    }
    biases = {"qkv": (3, 2, 4), "conv": (8,), "local": (5, 5, 8), "scanned": (3, 8)}
    params = {path: {"kernel": jnp.zeros(shape)} for path, shape in kernels.items()}
    for path, shape in biases.items():
        params[path]["bias"] = jnp.zeros(shape)
    assert lora.kernel_shapes(params) == {"qkv": ((6,), (3, 2, 4))}


class Jitted(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="layer")(x)


class Blocks(nn.Module):
    """The second has the first one's shapes, of which Flax keeps one program."""

    @nn.compact
    def __call__(self, x):
        return Jitted(name="first")(x) + Jitted(name="second")(x)


def test_what_flax_has_compiled_keeps_no_adapters():
    x, model = jnp.ones((1, 3)), Blocks()
    params = {
        name: {"layer": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
        for name in ("first", "second")
    }

    def change(sizes, scale):
        adapters = {
            f"{name}/layer": Factors(jnp.full((3, 1), size), jnp.ones((1, 2)))
            for name, size in sizes.items()
        }
        return lora.apply(model, params, adapters, x, scale=scale)[0, 0] - 6

    for sizes, scale, expected in (
        ({"first": 1.0}, 1.0, 3),
        ({"first": 1.0, "second": 5.0}, 1.0, 18),
        ({"first": 2.0, "second": 5.0}, 1.0, 21),
        ({"first": 2.0, "second": 5.0}, 2.0, 42),
    ):
        assert change(sizes, scale) == expected
        assert model.apply({"params": params}, x)[0, 0] == 6
    gradient = jax.grad(lambda size: change({"second": size}, 1.0))
    np.testing.assert_array_equal(jax.vmap(gradient)(jnp.arange(2.0)), [3, 3])
    _, state = lora.apply(
        model,
        params,
        {"first/layer": Factors(jnp.ones((3, 1)), jnp.ones((1, 2)))},
        x,
        scale=1.0,
        mutable=True,
    )
    assert set(state) == {"params"}


TWICE = """
import flax.linen as nn, jax.numpy as jnp
from fedlora_jax import Factors, lora

class Layer(nn.Dense):
    def __call__(self, x):
        return super().__call__(x)

model, x = Layer(1, use_bias=False), jnp.ones((1, 1))
params = {"kernel": jnp.ones((1, 1))}
for size in (2.0, 3.0):
    adapters = {"": Factors(jnp.full((1, 1), size), jnp.ones((1, 1)))}
    print(float(lora.apply(model, params, adapters, x, scale=1.0)[0, 0]))
    try:
        lora.apply(model, params, {"nowhere": adapters[""]}, x, scale=1.0)
    except ValueError:
        print(float(model.apply({"params": params}, x)[0, 0]))
"""


def test_nothing_is_left_behind_under_python_without_assertions():
    """Flax takes interceptors off inside an `assert`, which `python -O` does not execute."""
    command = [sys.executable, "-O", "-c", TWICE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3.0", "1.0", "4.0", "1.0"]


def test_wide_kernels_keep_what_bfloat16_would_round_away(setup):
    x, params, adapters = setup
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    wide = lora.widen({"params": half}, ["hidden", "attention/out"])["params"]
    types = {path: kernel.dtype for path, kernel in lora.kernels(wide).items()}
    assert types.pop("hidden") == types.pop("attention/out") == jnp.float32
    assert set(types.values()) == {np.dtype(jnp.bfloat16)}
    assert wide["hidden"]["bias"].dtype == jnp.bfloat16
    small = {"hidden": Factors(1e-4 * adapters["hidden"].a, adapters["hidden"].b)}
    for _ in range(10):
        half, wide = (lora.merge(tree, small, scale=SCALE) for tree in (half, wide))
    before, total = params["hidden"]["kernel"], 10 * SCALE * small["hidden"].a @ small["hidden"].b
    error = wide["hidden"]["kernel"] - before.astype(jnp.bfloat16).astype(jnp.float32) - total
    assert jnp.abs(error).max() < 1e-3 * jnp.abs(total).max()
    lost = half["hidden"]["kernel"].astype(jnp.float32) - before - total
    assert jnp.abs(lost).max() > 0.1 * jnp.abs(total).max()


def test_factors_of_bfloat16_are_multiplied_in_float32(setup):
    _, params, adapters = setup
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"hidden": adapters["hidden"]})
    zero = {"hidden": {"kernel": jnp.zeros_like(params["hidden"]["kernel"])}}
    got = lora.merge(zero, half, scale=SCALE)["hidden"]["kernel"]
    a, b = (np.float64(x) for x in half["hidden"])
    np.testing.assert_allclose(got, SCALE * a @ b, rtol=1e-5, atol=1e-5)
    stored = lora.merge(jax.tree.map(lambda x: x.astype(jnp.bfloat16), zero), half, scale=SCALE)
    assert stored["hidden"]["kernel"].dtype == jnp.bfloat16


def test_float64_is_not_rounded_on_the_way():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = ((5, 6), (6, 4), (6, 2), (2, 4))
        x, kernel, a, b = (
            jax.random.normal(key, s, float) for key, s in zip(keys, shapes, strict=True)
        )
        model, adapters = nn.Dense(4, use_bias=False), {"": Factors(a, b)}
        got = lora.apply(model, {"kernel": kernel}, adapters, x, scale=0.1)
        merged = lora.merge({"kernel": kernel}, adapters, scale=0.1)["kernel"]
        x, kernel, a, b = map(np.asarray, (x, kernel, a, b))
        np.testing.assert_allclose(merged, kernel + 0.1 * a @ b, rtol=1e-13)
        np.testing.assert_allclose(got, x @ (kernel + 0.1 * a @ b), rtol=1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, a, x: lora.init(jax.random.key(0), p, targets="quary", rank=2), "quary.*Layers"),
        (lambda p, a, x: lora.init(jax.random.key(0), p, targets="head", rank=6), "1 to 5"),
        (lambda p, a, x: lora.init(jax.random.key(0), p, targets="head", rank=0), "at least 1"),
        (lambda p, a, x: lora.split_head(p, "haed"), "haed"),
        (
            lambda p, a, x: lora.apply(Net(), p, {"nowhere": a["head"]}, x, scale=1.0),
            "no layer was called.*nowhere",
        ),
        (
            lambda p, a, x: lora.apply(Net(), p, {"head": a["hidden"]}, x, scale=1.0),
            r"\[8, 7\], the layer has \[7, 5\]",
        ),
        (
            lambda p, a, x: lora.apply(Net(), p, a, x, scale=1.0, offset={"head": a["hidden"]}),
            r"\[8, 7\], the layer has \[7, 5\]",
        ),
        (lambda p, a, x: lora.apply(Net(), p, {"conv": a["head"]}, x, scale=1.0), "is a Conv"),
        (lambda p, a, x: lora.merge(p, {"nowhere": a["head"]}, scale=1.0), "no kernel at"),
        (
            lambda p, a, x: lora.init(
                jax.random.key(0),
                {"layer": {"kernel": nn.Partitioned(jnp.ones((2, 2)), ("x", "y"))}},
                targets="layer",
                rank=1,
            ),
            "layer/kernel.*nn.meta.unbox",
        ),
        (
            lambda p, a, x: lora.merge(p, {"head": a["hidden"]}, scale=1.0),
            r"the layer has \[7, 5\]",
        ),
    ],
)
def test_errors_say_what_is_wrong(setup, call, message):
    x, params, adapters = setup
    with pytest.raises(ValueError, match=message):
        call(params, adapters, x)
