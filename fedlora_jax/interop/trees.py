"""Adapter trees in the shapes that qwix and gemma give them, to ours and back.

Ours is a dict from module path to `Factors(a [d_in, r], b [r, d_out])`. Theirs are trees of
any nodes, such as nested dicts or the state of a model of NNX:

* qwix: `{'layer': {'kernel_lora_a': [..., r], 'kernel_lora_b': [r, ...]}}`, beside the frozen
  parameters or without them; its scale is `alpha / rank`.
* gemma: `{'layer': {'lora': {'a': [..., r], 'b': [r, ...]}}}`; it has no scale, that is 1.

Axes of heads, on either side, become one axis here. A kernel with batch axes (a matrix a head, as
in gemma's fused key and value) is no single low-rank matrix; it cannot be told by its shape and
must be left out.
"""

import math
import re
from typing import Any, TypeAlias

import jax
from jax.tree_util import GetAttrKey, keystr

from fedlora_jax.lora import Adapters
from fedlora_jax.lowrank import Factors

PyTree: TypeAlias = Any

# A pattern of the path of a leaf: what is adapted, then which factor it is.
_QWIX = re.compile(r"(?P<module>.*)_lora_(?P<side>[ab])")
_GEMMA = re.compile(r"(?P<module>.*)/lora/(?P<side>[ab])")


def from_qwix(tree: PyTree) -> Adapters:
    """The adapters in qwix's parameters; whatever else is in the tree is passed over.

    An adapter of the parameter `kernel` is called after its module, as in our trees; of any other
    parameter, after both: `attention/w`.

    Args:
      tree: Any tree of arrays, with `..._lora_a [..., r]` and `..._lora_b [r, ...]`.

    Raises:
      ValueError: If a factor has no partner, their ranks differ, or there are no adapters.
    """
    return {path.removesuffix("/kernel"): factors for path, factors in _read(tree, _QWIX).items()}


def to_qwix(adapters: Adapters, like: PyTree) -> PyTree:
    """The tree `like`, with its adapters replaced: the inverse of `from_qwix`.

    Args:
      adapters: As from `from_qwix`, of any ranks.
      like: A tree of qwix's parameters, for the names and the axes of heads.

    Raises:
      ValueError: If `adapters` and `like` do not have adapters of the same layers and dimensions.
    """
    names = {path.removesuffix("/kernel"): path for path in _read(like, _QWIX)}
    return _write({names.get(path, path): f for path, f in adapters.items()}, like, _QWIX)


def from_gemma(tree: PyTree) -> Adapters:
    """The adapters in gemma's parameters; whatever else is in the tree is passed over.

    Args:
      tree: Any tree of arrays, with `.../lora/a [..., r]` and `.../lora/b [r, ...]`.

    Raises:
      ValueError: If a factor has no partner, their ranks differ, or there are no adapters.
    """
    return _read(tree, _GEMMA)


def to_gemma(adapters: Adapters, like: PyTree) -> PyTree:
    """The tree `like`, with its adapters replaced: the inverse of `from_gemma`.

    Args:
      adapters: As from `from_gemma`, of any ranks. Multiply `b` by their scale first: gemma has
        none.
      like: A tree of gemma's parameters, for the names and the axes of heads.

    Raises:
      ValueError: If `adapters` and `like` do not have adapters of the same layers and dimensions.
    """
    return _write(adapters, like, _GEMMA)


def _read(tree: PyTree, pattern: re.Pattern[str]) -> Adapters:
    sides: dict[str, dict[str, jax.Array]] = {}
    for keys, leaf in jax.tree.leaves_with_path(tree):
        if match := pattern.fullmatch(_name(keys)):
            sides.setdefault(match["module"], {})[match["side"]] = leaf
    if not sides:
        raise ValueError(f"no adapters in the tree: no path matches {pattern.pattern!r}")
    for path, pair in sides.items():
        if len(pair) != 2 or pair["a"].shape[-1] != pair["b"].shape[0]:
            shapes = {side: list(x.shape) for side, x in pair.items()}
            raise ValueError(f"{path}: a [..., r] and b [r, ...] expected, got {shapes}")
    return {path: _flattened(pair["a"], pair["b"]) for path, pair in sides.items()}


def _flattened(a: jax.Array, b: jax.Array) -> Factors:
    rank = b.shape[0]
    return Factors(a.reshape(-1, rank), b.reshape(rank, -1))


def _write(adapters: Adapters, like: PyTree, pattern: re.Pattern[str]) -> PyTree:
    known = _read(like, pattern)
    if different := sorted(known.keys() ^ adapters.keys()):
        raise ValueError(f"layers adapted on one side only: {', '.join(different)}")

    def replaced(keys: tuple[Any, ...], leaf: Any) -> Any:
        name = _name(keys)
        if not (match := pattern.fullmatch(name)):
            return leaf
        factors = adapters[match["module"]]
        shape = (
            (*leaf.shape[:-1], factors.rank)
            if match["side"] == "a"
            else (factors.rank, *leaf.shape[1:])
        )
        value = getattr(factors, match["side"])
        if value.size != math.prod(shape):
            raise ValueError(f"{name}: cannot make {list(shape)} of {list(value.shape)}")
        return value.reshape(shape)

    return jax.tree.map_with_path(replaced, like)


def _name(keys: tuple[Any, ...]) -> str:
    """The path of a leaf; if it is in a variable of NNX or another box of Flax, that of the box."""
    boxed = keys[-1:] == (GetAttrKey("value"),)
    return keystr(keys[:-1] if boxed else keys, simple=True, separator="/")
