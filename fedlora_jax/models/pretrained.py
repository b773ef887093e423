"""Pretrained weights of others, read into our backbones.

    model, params = pretrained.from_pretrained("path/to/Llama-3.2-1B", dtype=jnp.bfloat16)

Sources are safetensors with the names of Hugging Face and timm, sharded or not, the `.npz` files of
the original ViT and Mixer releases, and GGUF files of Llama-architecture models (extra `gguf`): as
a file, a directory, or a name on the Hugging Face hub (extra `hub`). Tensors are read in pieces,
straight into the layout and type that are wanted: on CPU, memory peaks at the parameters
themselves.
"""

import difflib
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from fedlora_jax import lora
from fedlora_jax.models import pretrained_gguf, pretrained_names
from fedlora_jax.models.bert import Bert
from fedlora_jax.models.llama import Llama, RopeScaling
from fedlora_jax.models.mixer import Mixer
from fedlora_jax.models.pretrained_files import (
    PathLike,
    StoredTensor,
    Tensors,
    empty,
    find_file,
    is_gguf,
    open_tensors,
)
from fedlora_jax.models.pretrained_names import Format, Row
from fedlora_jax.models.vit import ViT

# How many problems of a kind an error lists.
_LISTED = 8


class _Reading(NamedTuple):
    """One parameter to be read: its shape with us, and where it is."""

    path: str
    shape: tuple[int, ...]
    row: Row
    tensor: StoredTensor
    torch: bool


def locate(source: PathLike) -> Path:
    """A local file or directory for `source`.

    Args:
      source: A path; `package:NAME/PATH`, what lies in an installed Python package; or
        `owner/name`, a model on the Hugging Face hub.

    Raises:
      FileNotFoundError: If it is none of these.
      ImportError: If it is the name of a model and `huggingface_hub` is not installed.
    """
    path = Path(source)
    if path.exists():
        return path
    if match := re.fullmatch(r"package:(\w+)/(.+)", os.fspath(source)):
        # Found, not imported: a package with a file may need others to be imported.
        spec = importlib.util.find_spec(match[1])
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"{source}: the Python package {match[1]} is not installed")
        return Path(spec.submodule_search_locations[0]) / match[2]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(source)):
        raise FileNotFoundError(
            f"{source} is neither a file or directory nor the name of a model (owner/name)"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"there is no file or directory {source}; to read it from the hub, "
            "pip install 'fedlora-jax[hub]'"
        ) from error
    patterns = ["*.safetensors", "*.safetensors.index.json", "*.npz", "*config.json", "token*"]
    return Path(huggingface_hub.snapshot_download(os.fspath(source), allow_patterns=patterns))


def from_pretrained(
    source: PathLike,
    *,
    image_size: int | None = None,
    new: str | None = None,
    key: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
    **overrides: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that `config.json`, or a GGUF file itself, describes, with its weights.

    Args:
      source: A directory, a `.gguf` file, or the name of a model on the hub.
      image_size: Side of the images that will come in; by default that of the pretraining.
        Position embeddings are interpolated.
      new: As for `load`.
      key: As for `load`.
      dtype: Storage type of the parameters.
      **overrides: Fields of the module to set differently, e.g. `num_classes=100` or `remat=True`.

    Returns:
      `(model, params)`.

    Raises:
      ValueError: On a configuration that is not one of our backbones, or as `load` does.
    """
    directory = locate(source)
    config = _read_config(directory)
    model = model_from_config(config, **overrides)
    if isinstance(model, ViT | Mixer):
        default = config.get("image_size") or config.get("pretrained_cfg", {}).get("input_size")
        side = image_size or (default[-1] if isinstance(default, list) else default) or 224
        example = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    else:
        example = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return model, load(model, directory, example, new=new, key=key, dtype=dtype)


def _read_config(source: Path) -> dict[str, Any]:
    file = source / "config.json"
    if file.exists() or not is_gguf(find_file(source)):
        return json.loads(file.read_text())
    return pretrained_gguf.read_config(find_file(source))


def load(
    model: nn.Module,
    source: PathLike,
    *inputs: Any,
    new: str | None = None,
    key: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Any]:
    """Reads pretrained parameters for a model.

    Args:
      model: One of our backbones.
      source: What `locate` and `open_tensors` take.
      *inputs: Inputs of the model, or their `jax.ShapeDtypeStruct`s: they fix the shapes of the
        parameters.
      new: A regular expression, searched for in module paths: these are initialised afresh and
        what the checkpoint has for them is ignored, e.g. `'^head$'` for another number of classes.
      key: A random key for them.
      dtype: Storage type of the parameters.

    Returns:
      Parameters as `model.init(...)['params']` would have them.

    Raises:
      ValueError: If tensors are missing, left over or of another shape; it lists them, with the
        nearest names.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    flat = {"/".join(path): x.shape for path, x in traverse_util.flatten_dict(shapes).items()}
    fresh = _matching(flat, new)
    tensors = open_tensors(locate(source))
    readings = _plan(model, {p: s for p, s in flat.items() if p not in fresh}, fresh, tensors)

    values = {reading.path: _read(reading, dtype) for reading in readings}
    if fresh:
        values |= _initialised(model, inputs, fresh, key, dtype)
    return traverse_util.unflatten_dict({tuple(path.split("/")): values[path] for path in flat})


def _matching(flat: Mapping[str, Any], new: str | None) -> set[str]:
    if new is None:
        return set()
    modules = dict.fromkeys(path.rpartition("/")[0] or path for path in flat)
    chosen = set(lora.select(modules, new))
    return {path for path in flat if (path.rpartition("/")[0] or path) in chosen}


def _initialised(
    model: nn.Module,
    inputs: tuple[Any, ...],
    fresh: set[str],
    key: jax.Array | None,
    dtype: DTypeLike,
) -> dict[str, jax.Array]:
    """The values of `model.init` for some parameters; the others are never computed."""
    if key is None:
        raise ValueError("new parameters need a random key")

    @jax.jit
    def init(key: jax.Array) -> dict[str, jax.Array]:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
        params = traverse_util.flatten_dict(model.init(key, *zeros)["params"], sep="/")
        return {path: params[path].astype(dtype) for path in fresh}

    return init(key)


def _plan(
    model: nn.Module,
    wanted: Mapping[str, tuple[int, ...]],
    fresh: set[str],
    tensors: Tensors,
) -> list[_Reading]:
    """Where each parameter is, after all of them have been checked."""
    tensors = {_modern(name): tensor for name, tensor in tensors.items()}
    form = _best_format(model, wanted, tensors)
    readings, missing, misshapen = [], [], []
    for path, shape in wanted.items():
        row = pretrained_names.parameter(form, path)
        if row is None or row.theirs not in tensors:
            missing.append((path, row))
            continue
        readings.append(_Reading(path, shape, row, tensors[row.theirs], form.torch))
        if not _fits(readings[-1]):
            misshapen.append(readings[-1])
    known = {reading.row.theirs for reading in readings}
    known |= {row.theirs for path in fresh if (row := pretrained_names.parameter(form, path))}
    ignored = [form.ignored, form.before_head if "head/kernel" in fresh else None]
    surplus = [
        name
        for name in tensors
        if name not in known and not any(re.search(p, name) for p in ignored if p)
    ]
    if missing or misshapen or surplus:
        raise ValueError(_complaint(form, missing, misshapen, surplus))
    return readings


def _modern(name: str) -> str:
    module, dot, leaf = name.rpartition(".")
    return module + dot + pretrained_names.OLD_LEAVES.get(leaf, leaf)


def _best_format(model: nn.Module, wanted: Mapping[str, Any], tensors: Tensors) -> Format:
    """The format, with or without its prefix, in which most of the names are found."""
    candidates = list(pretrained_names.formats(model))
    candidates += [pretrained_names.bare(form) for form in candidates if form.prefix]

    def found(form: Format) -> int:
        rows = [pretrained_names.parameter(form, path) for path in wanted]
        return sum(row is not None and row.theirs in tensors for row in rows)

    return max(candidates, key=found)


# From torch's order of the axes of a kernel to ours: Dense and Conv.
_KERNEL_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}


def _axes(reading: _Reading) -> tuple[int, ...]:
    rank = len(reading.tensor.shape)
    same = tuple(range(rank))
    is_kernel = reading.torch and reading.path.endswith("/kernel")
    return _KERNEL_AXES.get(rank, same) if is_kernel else same


def _rows(reading: _Reading) -> tuple[int, int]:
    """First and last row of the stored tensor that belong to the parameter."""
    count = reading.tensor.shape[0] if reading.tensor.shape else 1
    if reading.row.part is None:
        return 0, count
    index, parts = reading.row.part
    return index * count // parts, (index + 1) * count // parts


def _fits(reading: _Reading) -> bool:
    start, stop = _rows(reading)
    stored = (stop - start, *reading.tensor.shape[1:]) if reading.tensor.shape else ()
    if _is_resized(reading):
        return len(stored) == 3 and stored[-1] == reading.shape[-1] and _is_square(stored[1] - 1)
    if not reading.torch and len(stored) == len(reading.shape) + 1:
        # An attention kernel or bias with head axes: the same numbers in the same order.
        return math.prod(stored) == math.prod(reading.shape)
    return tuple(stored[axis] for axis in _axes(reading)) == reading.shape


def _is_resized(reading: _Reading) -> bool:
    """Whether it is a vision model's table of positions, for another number of patches."""
    is_table = reading.path == "position_embedding"
    return is_table and reading.tensor.shape != reading.shape


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _read(reading: _Reading, dtype: DTypeLike) -> jax.Array:
    """The value of one parameter, in our layout."""
    if _is_resized(reading):
        table = reading.tensor.read(np.float32)
        return resize_positions(table, reading.shape).astype(dtype)
    value = empty(reading.shape, dtype)
    start, stop = _rows(reading)
    stored = (stop - start, *reading.tensor.shape[1:])
    in_their_order = value.transpose(np.argsort(_axes(reading))) if reading.torch else value
    reading.tensor.read_into(in_their_order.reshape(stored), start)
    # Unlike `jnp.asarray`, this takes an aligned array over without a copy on CPU.
    return jax.device_put(value)


def resize_positions(table: jax.Array | np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """Interpolates learned positions of a square grid of patches to another one, bicubically.

    Args:
      table: `[1, 1 + n * n, width]`, the class token first.
      shape: `(1, 1 + m * m, width)`.

    Returns:
      An array of that shape; the class token is left as it is.

    Raises:
      ValueError: If the patches do not form a square, before or after.
    """
    before, after = table.shape[1] - 1, shape[1] - 1
    if not _is_square(before) or not _is_square(after):
        raise ValueError(f"cannot interpolate {before} positions to {after}: both must be squares")
    old, new = math.isqrt(before), math.isqrt(after)
    grid = jnp.asarray(table[:, 1:]).reshape(old, old, -1)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "bicubic")
    return jnp.concatenate([jnp.asarray(table[:, :1]), grid.reshape(1, after, -1)], axis=1)


def _complaint(
    form: Format,
    missing: list[tuple[str, Row | None]],
    misshapen: list[_Reading],
    surplus: list[str],
) -> str:
    def sought(path: str, row: Row | None) -> str:
        if row is None:
            return f"{path}: has no name in this format"
        near = difflib.get_close_matches(row.theirs, surplus, n=1)
        return f"{path}: no {row.theirs!r}" + (f"; the nearest is {near[0]!r}" if near else "")

    lines = [f"the checkpoint, read as {form.name}, does not fit the model"]
    lines += _listed("missing", missing, lambda problem: sought(*problem))
    lines += _listed(
        "of another shape",
        misshapen,
        lambda r: f"{r.path}: {list(r.shape)} wanted, {r.row.theirs!r} is {list(r.tensor.shape)}",
    )
    lines += _listed("left over", surplus, repr)
    lines.append("Name parameters that shall start afresh, such as another head, by `new`.")
    return "\n".join(lines)


def _listed(title: str, problems: list[Any], describe: Callable[[Any], str]) -> list[str]:
    if not problems:
        return []
    lines = [f"  {describe(problem)}" for problem in problems[:_LISTED]]
    more = len(problems) - _LISTED
    return [f"{title} ({len(problems)}):", *lines] + ([f"  and {more} more"] if more > 0 else [])


def model_from_config(config: Mapping[str, Any], **overrides: Any) -> nn.Module:
    """The backbone that a `config.json` of Hugging Face or timm describes.

    Args:
      config: Its content.
      **overrides: Fields of the module to set differently.

    Raises:
      ValueError: If there is no such backbone here, or it differs in a way that ours lacks.
    """
    if "architecture" in config:
        return _timm_model(config, overrides)
    kind = config.get("model_type")
    if kind not in _FROM_CONFIG:
        raise ValueError(f"model type {kind!r} is none of {', '.join(sorted(_FROM_CONFIG))}")
    activation, make = _FROM_CONFIG[kind]
    if config.get("hidden_act", activation) != activation:
        raise ValueError(f"{kind} with hidden_act={config['hidden_act']!r}; ours is {activation!r}")
    return make(config, overrides)


def _timm_model(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> nn.Module:
    from fedlora_jax import models

    architecture = config["architecture"]
    match = re.match(r"(vit|mixer)_(small|s|base|b|large|l)(_patch)?16(_|$)", architecture)
    if match is None:
        raise ValueError(f"timm architecture {architecture!r} is not one of our backbones")
    name = f"{match[1]}_{match[2][0]}16"
    fields = {"num_classes": config.get("num_classes", 1000)}
    if match[1] == "vit":
        fields["layer_norm_epsilon"] = 1e-6
    return models.get(name, **{**fields, **overrides})


def _num_labels(config: Mapping[str, Any]) -> int:
    return len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)


def _vit(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> ViT:
    if not config.get("qkv_bias", True):
        raise ValueError("vit without qkv_bias; ours has one")
    fields = {
        "num_classes": _num_labels(config),
        "patch_size": config["patch_size"],
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_dim": config["intermediate_size"],
        "layer_norm_epsilon": config["layer_norm_eps"],
    }
    return ViT(**{**fields, **overrides})


def _bert(config: Mapping[str, Any], overrides: Mapping[str, Any], variant: str) -> Bert:
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"{variant} with relative positions; ours are absolute")
    classifies = any("Classification" in name for name in config.get("architectures") or [])
    fields = {
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_classes": _num_labels(config) if classifies else None,
        "variant": variant,
        "pad_token": config["pad_token_id"],
        "mlp_dim": config["intermediate_size"],
        "num_positions": config["max_position_embeddings"],
        "num_token_types": config["type_vocab_size"],
        "layer_norm_epsilon": config["layer_norm_eps"],
    }
    return Bert(**{**fields, **overrides})


def _llama(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Llama:
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError("llama with biases; ours has none")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"llama with rope scaling {kind!r}; ours knows 'llama3'")
    fields = {
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "mlp_dim": config["intermediate_size"],
        "head_dim": config.get("head_dim"),
        "rope_base": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        "rope_scaling": None if kind == "default" else _rope_scaling(rope),
        "norm_epsilon": config["rms_norm_eps"],
        "tied": config.get("tie_word_embeddings", False),
    }
    return Llama(**{**fields, **overrides})


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling:
    return RopeScaling(
        rope["factor"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )


_Make = Callable[[Mapping[str, Any], Mapping[str, Any]], nn.Module]

# By model type: the activation that ours has, and how to make it.
_FROM_CONFIG: dict[str, tuple[str, _Make]] = {
    "vit": ("gelu", _vit),
    "bert": ("gelu", partial(_bert, variant="bert")),
    "roberta": ("gelu", partial(_bert, variant="roberta")),
    "llama": ("silu", _llama),
}
