"""LoRA adapters on Linen models, which do not know of them.

An adapter tree here is a dict from module path (`'block_0/attention/query'`) to `Factors`. `apply`
intercepts the call of each adapted `nn.Dense` or `nn.DenseGeneral` and adds `scale * (x a) b` to
what it returns: no merged weight is built, so that under `vmap` a thousand clients share one
backbone. Kernels with head axes are flattened to `[d_in, d_out]` at the point of use.

References:
  Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022, arXiv:2106.09685.
"""

import contextlib
import difflib
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core.scope import in_filter, subtract_filters
from jax.typing import DTypeLike

from fedlora_jax import _batching, blocks, bounds, lowrank
from fedlora_jax.lowrank import Factors

Params: TypeAlias = Mapping[str, Any]
Adapters: TypeAlias = dict[str, Factors]

# Where a block in a loop finds its own adapters, and where every adapted layer has a mark.
_COLLECTION, _TERMS, _MARK = "adapters", "terms", "mark"


@jax.tree_util.register_static
class _Mark:
    """A variable without arrays, equal to itself alone.

    Flax keeps what `nn.jit` compiled by the structure of the variables, and knows nothing of the
    adapters in it. With a mark an adapted layer is traced in each `apply`, and by it alone.
    """


if not __debug__ and not hasattr(nn.module, "_global_interceptor_stack"):
    raise ImportError(
        "fedlora_jax cannot run under `python -O` with this version of Flax: there an interceptor, "
        "once set, would stay (docs/upstream/flax_intercept_methods.md)"
    )


class KernelShape(NamedTuple):
    """A Dense kernel seen as a matrix: the shapes of its input axes and of its output axes."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def d_in(self) -> int:
        """Number of rows of the matrix."""
        return math.prod(self.inputs)

    @property
    def d_out(self) -> int:
        """Number of columns of the matrix."""
        return math.prod(self.outputs)


def kernel_shapes(params: Params) -> dict[str, KernelShape]:
    """Every kernel of a model that can take an adapter, by module path.

    A kernel with more than two axes belongs to an `nn.DenseGeneral`; the shape of its bias says
    which axes are outputs. Without a bias the first axis is taken as the only input, except in a
    module called `out`, where the last axis is taken as the only output (`nn.MultiHeadAttention`).
    With more than three axes it is taken only if its bias has two or more, as that of queries, keys
    and values in one: else it could be that of a convolution.

    Args:
      params: The parameters of the model, or variables with a collection `params`.

    Raises:
      ValueError: If the parameters have metadata of Flax around them.
    """
    shapes = {}
    flat = _flat(params)
    for path, kernel in flat.items():
        if path[-1] != "kernel" or kernel.ndim < 2:
            continue
        bias = flat.get((*path[:-1], "bias"))
        if bias is not None:
            split = kernel.ndim - bias.ndim
        else:
            split = kernel.ndim - 1 if len(path) > 1 and path[-2] == "out" else 1
        shape = KernelShape(kernel.shape[:split], kernel.shape[split:])
        if bias is not None and bias.shape != shape.outputs:
            continue  # Stacked, as under nn.scan.
        if kernel.ndim < 4 or (bias is not None and bias.ndim > 1):
            shapes["/".join(path[:-1])] = shape
    return shapes


def kernels(params: Params) -> dict[str, jax.Array]:
    """Every kernel that can take an adapter as a matrix `[d_in, d_out]`, by module path."""
    flat = _flat(params)
    return {
        path: flat[(*path.split("/"), "kernel") if path else ("kernel",)].reshape(
            shape.d_in, shape.d_out
        )
        for path, shape in kernel_shapes(params).items()
    }


def compile_patterns(patterns: str | Sequence[str]) -> dict[str, re.Pattern[str]]:
    """Target patterns as regular expressions.

    Raises:
      ValueError: If one is no regular expression, or there is none.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError("there is no target pattern: name layers to adapt, 'attention'")
    found = {}
    for pattern in patterns:
        try:
            found[pattern] = re.compile(pattern)
        except (re.error, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(
                f"target pattern {pattern!r} is no regular expression: {error}"
            ) from error
    return found


def select(paths: Iterable[str], patterns: str | Sequence[str]) -> list[str]:
    """The paths in which one of the regular expressions is found (`re.search`).

    Raises:
      ValueError: If a pattern is found in none (it lists the paths, the nearest one first), is no
        regular expression, or there is none.
    """
    paths = list(paths)
    chosen: set[str] = set()
    for pattern, compiled in compile_patterns(patterns).items():
        found = [path for path in paths if compiled.search(path)]
        if not found:
            nearest = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.3)
            hint = f" The nearest is {nearest[0]!r}." if nearest else ""
            raise ValueError(
                f"target pattern {pattern!r} matches no layer.{hint} Layers: {', '.join(paths)}"
            )
        chosen.update(found)
    return [path for path in paths if path in chosen]


def init(
    key: jax.Array,
    params: Params,
    *,
    targets: str | Sequence[str],
    rank: int,
    dtype: DTypeLike = jnp.float32,
) -> Adapters:
    r"""Fresh adapters: `a ~ U(-1/sqrt(d_in), 1/sqrt(d_in))`, `b = 0`, as PEFT has it.

    The values of a kernel depend on the key and its path, not on which others are adapted.

    Args:
      key: A random key.
      params: The parameters of the model.
      targets: Regular expressions, searched for in the module paths.
      rank: The rank r, the same for all layers.
      dtype: Storage type, of floating point.

    Returns:
      A dict from module path to `Factors(a [d_in, r], b [r, d_out])`.

    Raises:
      ValueError: If a pattern matches no layer, the type is not of floating point, the rank is not
        in 1 .. min(d_in, d_out) of a layer that is matched, or the parameters have metadata of Flax
        around them (`nn.meta.unbox` takes it off).

    Examples:
      >>> import flax.linen as nn, jax
      >>> params = nn.Dense(5).init(jax.random.key(0), jax.numpy.ones((1, 3)))
      >>> adapters = init(jax.random.key(1), {'params': {'layer': params['params']}},
      ...                 targets='layer', rank=2)
      >>> adapters['layer'].a.shape, adapters['layer'].b.shape
      ((3, 2), (2, 5))
    """
    bounds.check("adapters", rank=rank)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"adapters must be of a floating type, not {jnp.dtype(dtype).name}")
    shapes = kernel_shapes(params)
    like = {}
    for path in select(shapes, targets):
        d_in, d_out = shapes[path].d_in, shapes[path].d_out
        if rank > min(d_in, d_out):
            raise ValueError(
                f"rank {rank} is impossible for layer {path!r} [{d_in}, {d_out}]: "
                f"expected 1 to {min(d_in, d_out)}"
            )
        like[path] = Factors(jnp.zeros((d_in, rank), dtype), jnp.zeros((rank, d_out), dtype))
    return fresh(key, like)


def fresh(key: jax.Array, like: Adapters) -> Adapters:
    """New adapters, as `init` makes them, of the paths, shapes and types of `like`."""

    def new(path: str, factors: Factors) -> Factors:
        bound = factors.a.shape[-2] ** -0.5
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(path_key, factors.a.shape, factors.a.dtype, -bound, bound)
        return Factors(a, jnp.zeros_like(factors.b))

    return {path: new(path, factors) for path, factors in like.items()}


def apply(
    model: nn.Module,
    params: Params,
    adapters: Adapters,
    *args: Any,
    scale: float | jax.Array,
    offset: Adapters | None = None,
    **kwargs: Any,
) -> Any:
    """Applies a model whose kernels W of adapted layers are `W + scale * (a b + offset)`.

    An adapted layer computes and returns what types it does without adapters: factors are cast to
    the type of its inputs, or of its outputs if the inputs are whole numbers or booleans, and their
    gradients come back in the factors' own. In a subclass of `nn.Dense` that calls its `__call__`
    the change is added there, before what the subclass does with it. These are written by
    hand, for speed: there are derivatives of any order in reverse mode, and forward mode over it,
    as of `jax.jvp(jax.grad(f), ...)` or `jax.hessian(f)`; `jax.jvp(f, ...)` alone JAX refuses.

    A layer's kernel must be the parameter itself. Where it is made of it, as under `nn.WeightNorm`,
    the change is added to what it is made into; that of `merge` would be normalised with the rest.

    Args:
      model: Any Linen module.
      params: Its parameters, or variables with a collection `params`; frozen as far as this
        function goes, and shared under a `vmap` that maps the adapters alone. With those of
        `blocks.stack` it loops over its blocks, and the adapters may be stacked or not.
      adapters: From module path to `Factors`.
      *args: Inputs of the model.
      scale: The factor s (alpha / r, or alpha / sqrt(r), in PEFT's terms).
      offset: More adapters of any rank under the same scale, for example a frozen offset that is
        a client's own.
      **kwargs: For `model.apply`: `rngs`, `mutable`, `method`, or arguments of the model.

    Returns:
      What `model.apply` returns.

    Raises:
      ValueError: If an adapter belongs to a layer that is not called, is not an `nn.Dense` or
        `nn.DenseGeneral` over trailing axes, or has other dimensions; or if blocks are looped over
        and their adapters are not alike.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from fedlora_jax import Factors, lora
      >>> model = nn.Sequential([nn.Dense(2)])
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> adapters = {'layers_0': Factors(jnp.ones((3, 1)), jnp.ones((1, 2)))}
      >>> change = (lora.apply(model, params, adapters, jnp.ones((1, 3)), scale=2.)
      ...           - model.apply(params, jnp.ones((1, 3))))
      >>> change.round(4)
      Array([[6., 6.]], dtype=float32)
    """
    trees = [adapters] if offset is None else [adapters, offset]
    variables = dict(params) if "params" in params else {"params": params}
    looped = blocks.is_stacked(variables["params"])
    if looped:
        trees = [t if blocks.is_stacked(t) else blocks.stack_adapters(t) for t in trees]
        for tree in trees:
            blocks.check_depth(variables["params"], tree)
    terms = {path: _at(path, trees) for path in sorted({path for tree in trees for path in tree})}
    of_layers: dict[tuple[str, ...], Any] = {}
    for path, found in terms.items():
        layer = tuple(path.split("/")) if path else ()
        of_layers[*layer, _MARK] = _Mark()
        if looped:  # As variables, for Linen to take apart in its loop.
            of_layers[*layer, _TERMS] = found
    variables[_COLLECTION] = traverse_util.unflatten_dict(of_layers)
    if in_filter(kwargs.get("mutable", False), _COLLECTION):
        kwargs["mutable"] = subtract_filters(kwargs["mutable"], _COLLECTION)
    changed: Counter[str] = Counter()

    def intercept(
        run: Any,
        inputs: tuple[Any, ...],
        options: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        if context.method_name != "__call__":
            return run(*inputs, **options)
        path = "/".join(context.module.path)
        before = changed[path]
        outputs = run(*inputs, **options)
        found: tuple[Factors, ...] | None = terms.get(path)
        if path.startswith(blocks.LOOPED):
            found = context.module.get_variable(_COLLECTION, _TERMS)
        if not found or changed[path] > before:  # Within a subclass's call is that of its parent.
            return outputs
        changed[path] += 1
        x = inputs[0] if inputs else options["inputs"]
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            x = x.astype(outputs.dtype)
        change = _low_rank(x, found, scale, _shape_of(context.module, path, x), path)
        return (outputs + change).astype(outputs.dtype)

    with _intercepting(intercept):
        result = model.apply(variables, *args, **kwargs)
    unused = terms.keys() - changed.keys()
    if unused:
        layers = ", ".join(kernel_shapes(params))
        raise ValueError(
            f"no layer was called at the path of the adapters {sorted(unused)}. Layers: {layers}"
        )
    return result


def _at(path: str, trees: Sequence[Adapters]) -> tuple[Factors, ...]:
    return tuple(tree[path] for tree in trees if path in tree)


@contextlib.contextmanager
def _intercepting(interceptor: Callable[..., Any]) -> Iterator[None]:
    """`nn.intercept_methods`, also under `python -O`.

    Flax takes an interceptor off its stack inside an `assert`, which is then never executed.
    """
    try:
        with nn.intercept_methods(interceptor):
            yield
    finally:
        if not __debug__:
            stack = nn.module._global_interceptor_stack
            if next(iter(stack), None) is interceptor:
                stack.pop()


def _shape_of(module: nn.Module, path: str, x: jax.Array) -> KernelShape:
    if isinstance(module, nn.Dense):
        return KernelShape((x.shape[-1],), (module.features,))
    if isinstance(module, nn.DenseGeneral):
        axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
        trailing = sorted(axis % x.ndim for axis in axes) == list(range(x.ndim - len(axes), x.ndim))
        if trailing and not module.batch_dims:
            features = module.features
            outputs = (features,) if isinstance(features, int) else tuple(features)
            return KernelShape(x.shape[x.ndim - len(axes) :], outputs)
    raise ValueError(
        f"layer {path!r} is a {type(module).__name__}; adapters go on nn.Dense, and on "
        "nn.DenseGeneral over trailing axes"
    )


def _low_rank(
    x: jax.Array,
    terms: Sequence[Factors],
    scale: float | jax.Array,
    shape: KernelShape,
    path: str,
) -> jax.Array:
    """`x` times the scaled sum of the terms, which is one product of low rank."""
    for term in terms:
        found = (term.a.shape[0], term.b.shape[-1])
        if found != (shape.d_in, shape.d_out):
            raise ValueError(
                f"the adapter of {path!r} is for a kernel {list(found)}, the layer has "
                f"[{shape.d_in}, {shape.d_out}]. Layers stacked by nn.scan or nn.vmap cannot be "
                "adapted"
            )
    factors = lowrank.concatenate(terms)
    # Scaled while it is small: not the change, nor in the backward pass what comes back to it.
    a = lowrank.wide(factors.a)
    a = jnp.asarray(scale, a.dtype) * a
    flat = x.reshape(-1, shape.d_in)
    operands = flat, a.astype(x.dtype), factors.b.astype(x.dtype)
    change = _product(*(_batching.varying_as(each, *operands) for each in operands))
    return change.reshape(*x.shape[: x.ndim - len(shape.inputs)], *shape.outputs)


@jax.custom_vjp
def _product(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`(x a) b`, `[n, d_in] @ [d_in, r] @ [r, d_out]`, with gradients as they are written here.

    Those of the factors are products over all rows with the rank in front: of others XLA on a CPU
    first transposes the larger operand, which takes several times as long. JAX's own for b is such
    another one. For a it is of the form here, but XLA takes the transpose into the product, unless
    a barrier stands between them.
    """
    return (x @ a) @ b


_Operands: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _product_forward(x: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, _Operands]:
    low = x @ a
    return low @ b, (x, a, b, low)


def _product_backward(
    operands: _Operands, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, a, b, low = operands
    of_low = gradient @ b.T
    of_a = jax.lax.optimization_barrier(of_low.T @ x).T
    return of_low @ a.T, of_a, low.T @ gradient


_product.defvjp(_product_forward, _product_backward)


def merge(params: Params, adapters: Adapters, *, scale: float | jax.Array) -> dict[str, Any]:
    """The parameters with `kernel + scale * a b` in place of each adapted kernel.

    Product and sum are taken in float32, or wider if kernel or factors are, and stored in the type
    of the kernel: to merge again and again, or little, `widen` the kernels first.

    Args:
      params: The parameters of the model, or variables with a collection `params`.
      adapters: From module path to `Factors(a [d_in, r], b [r, d_out])`, of any rank.
      scale: The factor s.

    Returns:
      New parameters of the structure of `params`.

    Raises:
      ValueError: If there is no kernel at a path, or it has other dimensions.
    """
    shapes = kernel_shapes(params)

    def merged(path: str, kernel: jax.Array) -> jax.Array:
        wide, factors = lowrank.wide((kernel, adapters[path]))
        change = scale * lowrank.matmul(*factors).reshape(kernel.shape)
        return (wide + change).astype(kernel.dtype)

    for path, factors in adapters.items():
        if path not in shapes:
            raise ValueError(f"no kernel at {path!r} to merge into. Layers: {', '.join(shapes)}")
        found = (factors.a.shape[0], factors.b.shape[-1])
        if found != (shapes[path].d_in, shapes[path].d_out):
            raise ValueError(
                f"the adapter of {path!r} is for a kernel {list(found)}, the layer has "
                f"[{shapes[path].d_in}, {shapes[path].d_out}]"
            )
    return map_kernels(params, adapters, merged)


def widen(params: Params, paths: Iterable[str]) -> dict[str, Any]:
    """The parameters with the kernels at `paths` in float32, or wider where they are.

    What is added to a kernel of bfloat16 is lost where it is smaller than half a unit in the
    kernel's last place, 0.2 to 0.4% of an entry: changes are merged into wide kernels.

    Args:
      params: The parameters of the model, or variables with a collection `params`.
      paths: Of modules with a kernel.
    """
    return map_kernels(params, paths, lambda _, kernel: lowrank.wide(kernel))


def map_kernels(
    params: Params, paths: Iterable[str], function: Callable[[str, jax.Array], jax.Array]
) -> dict[str, Any]:
    """The parameters with `function(path, kernel)` in place of the kernels at `paths`."""
    flat = dict(_flat(params))
    for path in paths:
        key = (*path.split("/"), "kernel") if path else ("kernel",)
        flat[key] = function(path, flat[key])
    changed = traverse_util.unflatten_dict(flat)
    return {**params, "params": changed} if "params" in params else changed


def count_parameters(tree: Any) -> int:
    """The number of scalars in a tree of arrays, or of anything else with a shape."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def split_head(params: Params, pattern: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts parameters into the frozen backbone and the head that is trained with the adapters.

    Args:
      params: The parameters of the model (not the variables).
      pattern: A regular expression searched for in the module paths, PEFT's `modules_to_save`; None
        for no head.

    Returns:
      `(backbone, head)`; `join_head` puts them together again.

    Raises:
      ValueError: If the pattern matches no module.
    """
    flat = _flat(params)
    chosen: set[str] = set()
    if pattern is not None:
        chosen = set(select(dict.fromkeys("/".join(path[:-1]) for path in flat), pattern))
    parts: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})
    for path, value in flat.items():
        parts["/".join(path[:-1]) in chosen][path] = value
    return traverse_util.unflatten_dict(parts[0]), traverse_util.unflatten_dict(parts[1])


def join_head(backbone: Params, head: Params) -> dict[str, Any]:
    """The parameters that `split_head` parted."""
    return traverse_util.unflatten_dict({**_flat(backbone), **_flat(head)})


def _flat(params: Params) -> dict[tuple[str, ...], jax.Array]:
    flat = traverse_util.flatten_dict(params["params"] if "params" in params else params)
    for path, value in flat.items():
        if isinstance(value, nn.meta.AxisMetadata):
            raise ValueError(
                f"parameter {'/'.join(path)} is a {type(value).__name__}, not an array: take off "
                "Flax's metadata by `nn.meta.unbox(params)`"
            )
    return flat
