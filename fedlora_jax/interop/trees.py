"""Adapter trees in the shapes that qwix and gemma give them, to ours and back.

Ours is a dict from module path to `Factors(a [d_in, r], b [r, d_out])`. Theirs are nested dicts:

* qwix: `{'layer': {'kernel_lora_a': [..., r], 'kernel_lora_b': [r, ...]}}`, beside the frozen
  parameters or without them; its scale is `alpha / rank`.
* gemma: `{'layer': {'lora': {'a': [..., r], 'b': [r, ...]}}}`; it has no scale, that is 1.

Axes of heads, on either side, become one axis here. A kernel with batch axes (a matrix a head, as
in gemma's fused key and value) is no single low-rank matrix; it cannot be told by its shape and
must be left out.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util

from fedlora_jax.lora import Adapters
from fedlora_jax.lowrank import Factors

# A pattern of the path of a leaf: what is adapted, then which factor it is.
_QWIX = re.compile(r"(?P<module>.*)_lora_(?P<side>[ab])")
_GEMMA = re.compile(r"(?P<module>.*)/lora/(?P<side>[ab])")


def from_qwix(tree: Mapping[str, Any]) -> Adapters:
    """The adapters in qwix's parameters; whatever else is in the tree is passed over.

    An adapter of the parameter `kernel` is called after its module, as in our trees; of any other
    parameter, after both: `attention/w`.

    Args:
      tree: Nested dicts of arrays, with `..._lora_a [..., r]` and `..._lora_b [r, ...]`.

    Raises:
      ValueError: If a factor has no partner, their ranks differ, or there are no adapters.
    """
    return {path.removesuffix("/kernel"): factors for path, factors in _read(tree, _QWIX).items()}


def to_qwix(adapters: Adapters, like: Mapping[str, Any]) -> dict[str, Any]:
    """The tree `like`, with its adapters replaced: the inverse of `from_qwix`.

    Args:
      adapters: As from `from_qwix`, of any ranks.
      like: A tree of qwix's parameters, for the names and the axes of heads.

    Raises:
      ValueError: If `adapters` and `like` do not have adapters of the same layers and dimensions.
    """
    names = {path.removesuffix("/kernel"): path for path in _read(like, _QWIX)}
    return _write({names.get(path, path): f for path, f in adapters.items()}, like, _QWIX)


def from_gemma(tree: Mapping[str, Any]) -> Adapters:
    """The adapters in gemma's parameters; whatever else is in the tree is passed over.

    Args:
      tree: Nested dicts of arrays, with `.../lora/a [..., r]` and `.../lora/b [r, ...]`.

    Raises:
      ValueError: If a factor has no partner, their ranks differ, or there are no adapters.
    """
    return _read(tree, _GEMMA)


def to_gemma(adapters: Adapters, like: Mapping[str, Any]) -> dict[str, Any]:
    """The tree `like`, with its adapters replaced: the inverse of `from_gemma`.

    Args:
      adapters: As from `from_gemma`, of any ranks. Multiply `b` by their scale first: gemma has
        none.
      like: A tree of gemma's parameters, for the names and the axes of heads.

    Raises:
      ValueError: If `adapters` and `like` do not have adapters of the same layers and dimensions.
    """
    return _write(adapters, like, _GEMMA)


def _read(tree: Mapping[str, Any], pattern: re.Pattern[str]) -> Adapters:
    sides: dict[str, dict[str, jax.Array]] = {}
    for path, leaf in _flat(tree).items():
        if match := pattern.fullmatch(path):
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


def _write(adapters: Adapters, like: Mapping[str, Any], pattern: re.Pattern[str]) -> dict[str, Any]:
    known = _read(like, pattern)
    if different := sorted(known.keys() ^ adapters.keys()):
        raise ValueError(f"layers adapted on one side only: {', '.join(different)}")
    flat = _flat(like)
    for path, leaf in flat.items():
        if not (match := pattern.fullmatch(path)):
            continue
        factors = adapters[match["module"]]
        shape = (
            (*leaf.shape[:-1], factors.rank)
            if match["side"] == "a"
            else (factors.rank, *leaf.shape[1:])
        )
        value = getattr(factors, match["side"])
        if value.size != math.prod(shape):
            raise ValueError(f"{path}: cannot make {list(shape)} of {list(value.shape)}")
        flat[path] = value.reshape(shape)
    return traverse_util.unflatten_dict(flat, sep="/")


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")
