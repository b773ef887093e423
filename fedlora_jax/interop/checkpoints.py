"""A server's step on adapter checkpoints that were trained elsewhere, without their backbone."""

import collections
import inspect
import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax import aggregation, lowrank
from fedlora_jax.aggregation import Aggregated
from fedlora_jax.foreign import read_object
from fedlora_jax.interop import peft
from fedlora_jax.interop.peft import Checkpoint
from fedlora_jax.lora import Adapters
from fedlora_jax.lowrank import Factors
from fedlora_jax.models import pretrained
from fedlora_jax.models.pretrained import naming
from fedlora_jax.models.pretrained.files import (
    PathLike,
    StoredTensor,
    Tensors,
    files_of,
    open_tensors,
    write_safetensors,
)
from fedlora_jax.names import lookup

# Types that are numbers as they are: those of one byte are multiplied by something when used.
_FLOATS = {np.dtype(kind) for kind in (np.float64, np.float32, np.float16, jnp.bfloat16)}
# Saved modules may hold counters and positions, too.
_NUMBERS = _FLOATS | {np.dtype(kind) for kind in (np.int64, np.int32)}

# What decoders call their table of embeddings, and the head that in some is one with it.
_TABLES = tuple(
    f"{name}.weight" for name in ("model.embed_tokens", "embed_tokens", "transformer.wte", "wte")
)
_HEAD = "lm_head.weight"

# Types of models whose layers are transformers' `Conv1D`, `[d_in, d_out]`, but for the head.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")

# How many layers an error lists.
_LISTED = 4


class Combined(NamedTuple):
    """What the server makes of its clients' checkpoints.

    Attributes:
      checkpoint: The new global adapters. If the method leaves a residual to be merged into the
        backbone, they hold it too, exactly, at a larger rank.
      error: Relative distance of the update from the weighted mean of the clients' updates.
      layer_errors: The same for each layer.
      spectra: Singular values of each layer's update, without the scale, descending.
    """

    checkpoint: Checkpoint
    error: float
    layer_errors: dict[str, float]
    spectra: dict[str, np.ndarray]


def combine(
    sources: Sequence[PathLike],
    weights: Sequence[float],
    method: str,
    options: Mapping[str, Any] | None = None,
    *,
    rescale: bool = False,
) -> Combined:
    """Aggregates adapter checkpoints of PEFT.

    Parameters trained as a whole (`modules_to_save`) are averaged with the same weights.

    Args:
      sources: One checkpoint a client, all for the same backbone and layers; ranks may differ.
      weights: One a client, e.g. its number of examples; of a client of weight 0 nothing counts.
      method: Name of an aggregation function that needs no more than adapters and weights.
      options: Its hyperparameters.
      rescale: Accept clients of different scales, such as one alpha for all ranks, and fold their
        ratios into the factors, so that products stay what they were.

    Raises:
      ValueError: If checkpoints do not belong together (it names the difference), something in one
        of a weight above 0 is not finite, the method or an option is unknown, or the method needs
        what checkpoints do not have, such as one `a` for all (`ffa_lora`, `fedsvd`, `rolora`).
    """
    function = _function(method, options or {})
    if len(sources) != len(weights):
        raise ValueError(f"{len(sources)} checkpoints, but {len(weights)} weights")
    clients = [peft.load(source) for source in sources]
    for source, client in zip(sources, clients, strict=True):
        _check_alike((sources[0], clients[0]), (source, client), rescale)
    scale = clients[0].scale
    trees = [_at_scale(client, scale) for client in clients]
    stacked, shares = aggregation.stack(trees), jnp.asarray(weights, jnp.float32)
    aggregated = _aggregated(function, stacked, shares, options or {})
    adapters = _whole(aggregated, method)
    layer_errors = aggregation.error(stacked, shares, aggregated, per_kernel=True)
    layer_errors = {name: float(layer_errors[name]) for name in adapters}
    # Not even NaN of a client of weight 0 counts.
    present = [client for client, weight in enumerate(weights) if weight > 0]
    weights, trees = [weights[k] for k in present], [trees[k] for k in present]
    for k in present:
        _check_finite(sources[k], clients[k].saved)
    saved = _mean([clients[k].saved for k in present], weights)
    return Combined(
        Checkpoint(adapters, scale, saved, clients[0].config),
        _total(layer_errors, trees, weights),
        layer_errors,
        {name: singular_values(factors) for name, factors in adapters.items()},
    )


def _aggregated(
    function: Any, stacked: Adapters, weights: jax.Array, options: Mapping[str, Any]
) -> Aggregated:
    """The function's result; clients that it would leave aside in part are refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", aggregation.UnequalFactors)
        try:
            return function(stacked, weights, **options)
        except aggregation.UnequalFactors as error:
            raise ValueError(
                f"{error}. Clients are numbered from 0, in the order of the adapters. Another "
                "method, such as fedit or flexlora, takes both factors of each"
            ) from None


def check_out(out: PathLike, sources: Sequence[PathLike]) -> None:
    """Checks that a result will not take the place of what it is made from.

    Args:
      out: Directory for the result.
      sources: Files, directories, or names on the hub.

    Raises:
      ValueError: If `out` is one of them, or the directory of a file among them.
    """
    for source in sources:
        path = Path(source)
        if not path.exists() or not Path(out).exists():
            continue
        directory = path.parent if path.is_file() else path
        if os.path.samefile(directory, out):
            raise ValueError(f"the result would overwrite {source}: choose another directory")


def singular_values(factors: Factors) -> np.ndarray:
    """All singular values of a product, descending, from float64 Gram blocks of r x r."""
    a, b = np.asarray(factors.a, np.float64), np.asarray(factors.b, np.float64)
    squares, vectors = np.linalg.eigh(a.T @ a)
    root = vectors * np.sqrt(np.maximum(squares, 0))
    return np.sqrt(np.maximum(np.linalg.eigvalsh(root.T @ (b @ b.T) @ root), 0))[::-1]


def _total(
    layer_errors: Mapping[str, float], trees: Sequence[Adapters], weights: Sequence[float]
) -> float:
    """The relative distance over all layers, from those of the layers, as `aggregation.error`."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    sizes = {}
    for name in layer_errors:
        terms = [
            lowrank.scaled(tree[name], share) for share, tree in zip(shares, trees, strict=True)
        ]
        sizes[name] = float(np.linalg.norm(singular_values(lowrank.concatenate(terms))))
    distance = np.linalg.norm([error * (sizes[n] or 1) for n, error in layer_errors.items()])
    return float(distance / (np.linalg.norm(list(sizes.values())) or 1))


def _function(method: str, options: Mapping[str, Any]) -> Any:
    function = aggregation.get(method)
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    for name in options:
        lookup(known, name, f"option of {method}")
    missing = [n for n, p in known.items() if p.default is p.empty and n not in options]
    if missing:
        raise ValueError(
            f"{method} needs {', '.join(missing)}: a state between rounds, which adapter "
            "checkpoints do not have"
        )
    return function


def _check_alike(
    first: tuple[PathLike, Checkpoint], other: tuple[PathLike, Checkpoint], rescale: bool
) -> None:
    """Raises ValueError unless two checkpoints are adapters of the same layers of one backbone."""
    (first_name, one), (other_name, two) = first, other

    def differ(what: str, of_one: Any, of_two: Any, hint: str = "") -> None:
        raise ValueError(
            f"the adapters do not belong together: {what} is {of_one} in {first_name}, "
            f"{of_two} in {other_name}{hint}"
        )

    for key in ("base_model_name_or_path", "fan_in_fan_out"):
        mine, theirs = one.config.get(key), two.config.get(key)
        if mine != theirs and None not in (mine, theirs):
            differ(key, repr(mine), repr(theirs))
    for what, mine, theirs in (
        ("the set of adapted layers", one.adapters, two.adapters),
        ("the set of saved parameters", one.saved, two.saved),
    ):
        if mine.keys() != theirs.keys():
            differ(what, _only(mine, theirs), _only(theirs, mine))
    for name, factors in one.adapters.items():
        mine, theirs = _dimensions(factors), _dimensions(two.adapters[name])
        if mine != theirs:
            differ(f"[d_in, d_out] of {name}", mine, theirs)
    for name, value in one.saved.items():
        if value.shape != two.saved[name].shape:
            differ(f"the shape of {name}", list(value.shape), list(two.saved[name].shape))
    if not rescale and not np.isclose(one.scale, two.scale):
        hint = "; one scale for all is alpha in proportion to r (or to its root under rsLoRA)"
        differ("the scale", _scale_of(one), _scale_of(two), hint)


def _only(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    extra = [name for name in mine if name not in theirs]
    if not extra:
        return "less"
    more = f" and {len(extra) - _LISTED} more" if len(extra) > _LISTED else ""
    return f"more by {', '.join(extra[:_LISTED])}{more}"


def _dimensions(factors: Factors) -> list[int]:
    return [factors.a.shape[0], factors.b.shape[1]]


def _scale_of(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    root = ", rsLoRA" if config.get("use_rslora") else ""
    return f"{checkpoint.scale:g} (alpha {config['lora_alpha']}, r {config['r']}{root})"


def _at_scale(client: Checkpoint, scale: float) -> Adapters:
    """The client's adapters, their `b` such that the products are right under `scale`."""
    if client.scale == scale:
        return client.adapters
    ratio = client.scale / scale
    return {name: lowrank.scaled(factors, ratio) for name, factors in client.adapters.items()}


def _whole(aggregated: Aggregated, method: str) -> Adapters:
    """Adapters and residual in one tree."""
    if any(x.ndim != 2 for x in jax.tree.leaves(aggregated)):
        raise ValueError(f"{method} leaves each client with adapters of its own: nothing to write")
    trees = [tree for tree in aggregated if tree is not None]
    return {name: lowrank.concatenate([tree[name] for tree in trees]) for name in trees[0]}


def _check_finite(source: PathLike, saved: Mapping[str, jax.Array]) -> None:
    for name, value in saved.items():
        if not np.all(np.isfinite(np.asarray(value))):
            raise ValueError(
                f"saved parameter {name} of {source} is not finite. Give the client weight 0 to "
                "leave it out"
            )


def _mean(trees: Sequence[dict[str, jax.Array]], weights: Sequence[float]) -> dict[str, jax.Array]:
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    return {
        name: sum(share * tree[name] for share, tree in zip(shares, trees, strict=True))
        for name in trees[0]
    }


def merge(base: PathLike, checkpoint: Checkpoint, out: PathLike) -> None:
    """Writes a backbone with the adapters merged in, tensor by tensor, in the files it came in.

    Works on any safetensors checkpoint whose names are those of the adapters, or others that
    `naming` knows for the same layers; types, shards, their index, and of a directory configuration
    and tokenizer, stay as they are. Saved parameters that the backbone lacks are added to the last
    shard, in the type that most of its floats have. Embeddings and head that are one table
    (`tie_word_embeddings`) become two where the adapter has one of them alone, or both unlike: PEFT
    trains each for itself.

    Args:
      base: The backbone: a file, the index of its shards, a directory, or a name on the hub.
      checkpoint: Adapters with torch's names.
      out: A directory, made if it is not there.

    Raises:
      ValueError: If the backbone has no such layer, it has other dimensions or is quantised, is in
        files of another kind, lies in `out`, or is no directory although its configuration has to
        change. Nothing is written then.
    """
    source, out = pretrained.locate(base), Path(out)
    check_out(out, [source])
    files = files_of(source)
    if files[0].suffix != ".safetensors":
        raise ValueError(f"{files[0]}: only .safetensors files can be merged into")
    tensors = open_tensors(source)
    config = _config_of(source)
    new = _saved(tensors, checkpoint.saved)
    new |= _merged_layers(tensors | new, checkpoint, config.get("model_type"))
    untied = _untied_head(tensors, new, config)
    if untied and not source.is_dir():
        raise ValueError(
            f"{source}: the adapter makes two tables of tied embeddings; give the directory of the "
            "backbone, for tie_word_embeddings in its config.json becomes false"
        )
    new |= untied
    added = {name: value for name, value in new.items() if name not in tensors}
    out.mkdir(parents=True, exist_ok=True)
    for path in files:
        content = {name: new.get(name, tensor) for name, tensor in open_tensors(path).items()}
        write_safetensors(out / path.name, content | (added if path == files[-1] else {}))
    _copy_the_rest(source, out, dict.fromkeys(added, files[-1].name))
    if untied:
        config["tie_word_embeddings"] = False
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _config_of(source: Path) -> dict[str, Any]:
    """The configuration in, or beside, the backbone; empty if there is none."""
    path = (source if source.is_dir() else source.parent) / "config.json"
    return read_object(path, "a configuration of a model") if path.is_file() else {}


def _merged_layers(tensors: Tensors, checkpoint: Checkpoint, model_type: str | None) -> Tensors:
    """The adapted layers under the backbone's names."""
    merged: Tensors = {}
    for module, factors in checkpoint.adapters.items():
        name = _name_in(tensors, f"{module}.weight")
        if name is None:
            raise ValueError(f"the backbone has no layer {module!r} to merge the adapter into")
        _check_type(name, tensors[name], _FLOATS)
        if model_type in _CONV1D:
            # PEFT's setting is that of the last layer alone. What is square is no head.
            transposed = list(tensors[name].shape) != _dimensions(factors)
        else:
            transposed = not checkpoint.config.get("fan_in_fan_out")
        merged[name] = _merged(tensors[name], module, factors, checkpoint.scale, transposed)
    return merged


def _untied_head(tensors: Tensors, new: Tensors, config: Mapping[str, Any]) -> Tensors:
    """The head of a backbone that has one table for it and embeddings, and is to have two."""
    table = next((name for name in _TABLES if name in tensors), None)
    if not config.get("tie_word_embeddings", table is not None and _HEAD not in tensors):
        return {}
    if table not in new:
        return {_HEAD: new[_HEAD]} if _HEAD in new else {}
    if _HEAD not in new:
        return {_HEAD: tensors[table]}
    alike = np.array_equal(new[_HEAD].read(), new[table].read())
    return {} if alike else {_HEAD: new[_HEAD]}


def _saved(tensors: Tensors, saved: Mapping[str, Any]) -> Tensors:
    """Parameters trained as a whole under the backbone's names and in its types.

    New ones keep their names, and have the type that most of the backbone's floats have.
    """
    usual = _usual_type(tensors)
    result: Tensors = {}
    for theirs, value in saved.items():
        name = _name_in(tensors, theirs)
        if name is None:
            result[theirs] = _stored(np.asarray(value).astype(usual))
            continue
        _check_type(name, tensors[name], _NUMBERS)
        kind = tensors[name].dtype
        value = np.asarray(value)
        result[name] = _stored((value if kind in _FLOATS else np.rint(value)).astype(kind))
    return result


def _stored(value: np.ndarray) -> StoredTensor:
    def read_into(out: np.ndarray, first: int) -> None:
        out[...] = value[first : first + len(out)] if value.shape else value

    return StoredTensor(value.shape, value.dtype, read_into)


def _usual_type(tensors: Tensors) -> np.dtype:
    entries: collections.Counter[np.dtype] = collections.Counter()
    for tensor in tensors.values():
        if tensor.dtype in _FLOATS:
            entries[tensor.dtype] += math.prod(tensor.shape)
    return entries.most_common(1)[0][0]


def _name_in(tensors: Tensors, name: str) -> str | None:
    """What the backbone calls that parameter; None if it has none."""
    module, dot, leaf = name.rpartition(".")
    leaves = [leaf, *(old for old, new in naming.OLD_LEAVES.items() if new == leaf)]
    modules = [module, *naming.aliases(module)]
    names = (f"{module}{dot}{leaf}" for module in modules for leaf in leaves)
    return next((name for name in names if name in tensors), None)


def _check_type(name: str, tensor: StoredTensor, kinds: set[np.dtype]) -> None:
    if tensor.dtype not in kinds:
        expected = ", ".join(sorted(kind.name for kind in kinds))
        raise ValueError(
            f"the backbone's {name} is of {tensor.dtype.name}, expected one of {expected}: nothing "
            "can be merged into quantised weights"
        )


def _merged(
    tensor: StoredTensor, name: str, factors: Factors, scale: float, transposed: bool
) -> StoredTensor:
    """The tensor `W + scale * a b`, computed when it is read; in torch's order if `transposed`."""
    wanted = _dimensions(factors)[::-1] if transposed else _dimensions(factors)
    if list(tensor.shape) != wanted:
        raise ValueError(
            f"{name}: the adapter is for a weight {wanted}, the backbone has {list(tensor.shape)}"
        )

    def read_into(out: np.ndarray, first: int) -> None:
        weight = tensor.read(np.float32)
        a, b = np.asarray(factors.a, np.float32), np.asarray(factors.b, np.float32)
        weight += scale * (b.T @ a.T if transposed else a @ b)
        out[...] = weight[first : first + len(out)]

    return StoredTensor(tensor.shape, tensor.dtype, read_into)


def _copy_the_rest(source: Path, out: Path, added: Mapping[str, str]) -> None:
    """Configuration, tokenizer, and the index; `added` is from new parameters to their shard."""
    for path in source.iterdir() if source.is_dir() else [source]:
        if path.suffix in (".json", ".txt", ".model", ".jinja") and path.is_file():
            shutil.copy(path, out / path.name)
    for path in out.glob("*.safetensors.index.json"):
        index = read_object(path, "an index of shards")
        index["weight_map"] |= added
        path.write_text(json.dumps(index, indent=2))
