"""Parameters of a model, planned tensor by tensor and read."""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from fedlora_jax import lora
from fedlora_jax.foreign import read_object, reading
from fedlora_jax.models.mixer import Mixer
from fedlora_jax.models.pretrained import gguf_files, naming
from fedlora_jax.models.pretrained.configs import model_from_config
from fedlora_jax.models.pretrained.files import (
    PathLike,
    StoredTensor,
    Tensors,
    empty,
    find_file,
    is_gguf,
    locate,
    open_tensors,
)
from fedlora_jax.models.pretrained.naming import Format, Row
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
      ValueError: On a configuration that is not one of our backbones or of images that are not
        square, or as `load` does.
    """
    directory = locate(source)
    model = model_of(directory, **overrides)
    config = _read_config(directory)
    if isinstance(model, ViT | Mixer):
        own = _side(config)
        side = image_size or own
        example = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    else:
        example = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return model, load(model, directory, example, new=new, key=key, dtype=dtype)


def _side(config: Mapping[str, Any]) -> int:
    """The side of the images of the pretraining, which timm puts behind their channels."""
    size = (config.get("model_args") or {}).get("img_size") or config.get("image_size")
    size = size or (config.get("pretrained_cfg") or {}).get("input_size") or 224
    height, width = size[-2:] if isinstance(size, list) else (size, size)
    if height != width:
        raise ValueError(
            f"a model of images of {height} x {width} pixels, not square: `load` takes such images"
        )
    return height


def model_of(source: PathLike, **overrides: Any) -> nn.Module:
    """The model that `config.json`, or a GGUF file itself, describes.

    Args:
      source: As for `from_pretrained`.
      **overrides: Fields of the module to set differently.

    Raises:
      ValueError: On a configuration that is not one of our backbones.
    """
    path = locate(source)
    with reading(path, "a model of a kind that is known here"):
        return model_from_config(_read_config(path), **overrides)


def _read_config(source: Path) -> dict[str, Any]:
    file = source / "config.json"
    if file.exists() or not is_gguf(find_file(source)):
        return read_object(file, "a configuration of a model")
    return gguf_files.read_config(find_file(source))


def load(
    model: nn.Module,
    source: PathLike,
    *inputs: Any,
    new: str | None = None,
    key: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
    on_host: bool = False,
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
      on_host: Leaves them in the host's memory, as NumPy's arrays: for a model that no one device
        can hold, or that is wanted there later.

    Returns:
      Parameters as `model.init(...)['params']` would have them.

    Raises:
      ValueError: If tensors are missing, left over or of another shape; it lists them, with the
        nearest names. If the model's head is its embeddings, but that of the checkpoint is not.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    flat = {"/".join(path): x.shape for path, x in traverse_util.flatten_dict(shapes).items()}
    fresh = _matching(flat, new)
    tensors = open_tensors(locate(source))
    readings = _plan(model, {p: s for p, s in flat.items() if p not in fresh}, fresh, tensors)

    # Unlike `jnp.asarray`, `device_put` takes an aligned array over without a copy on CPU.
    place = jax.device_get if on_host else jax.device_put
    values = {reading.path: place(_read(reading, dtype)) for reading in readings}
    if fresh:
        values |= place(_initialised(model, inputs, fresh, key, dtype))
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
        row = _row(model, form, path, tensors)
        if row is None or row.theirs not in tensors:
            missing.append((path, row))
            continue
        readings.append(_Reading(path, shape, row, tensors[row.theirs], form.torch))
        if not _fits(readings[-1]):
            misshapen.append(readings[-1])
    known = {reading.row.theirs for reading in readings}
    known |= {row.theirs for path in fresh if (row := naming.parameter(form, path))}
    ignored = [form.ignored, form.before_head if "head/kernel" in fresh else None]
    surplus = [
        name
        for name in tensors
        if name not in known and not any(re.search(p, name) for p in ignored if p)
    ]
    if missing or misshapen or surplus:
        raise ValueError(_complaint(form, missing, misshapen, surplus))
    if getattr(model, "tied", False):
        _check_tied(form, tensors)
    return readings


def _row(model: nn.Module, form: Format, path: str, tensors: Tensors) -> Row | None:
    """Where a parameter is; of one table for embeddings and head some store the head alone."""
    row = naming.parameter(form, path)
    if path == "embedding/embedding" and getattr(model, "tied", False):
        head = naming.parameter(form, "head/kernel")
        if row and head and row.theirs not in tensors and head.theirs in tensors:
            return head
    return row


def _check_tied(form: Format, tensors: Tensors) -> None:
    """Checks that a head which is left aside is the table of embeddings, as it is in the model."""
    head = naming.parameter(form, "head/kernel")
    table = naming.parameter(form, "embedding/embedding")
    if not head or not table or not {head.theirs, table.theirs} <= tensors.keys():
        return
    if not np.array_equal(tensors[head.theirs].read(), tensors[table.theirs].read()):
        raise ValueError(
            f"{head.theirs} is not {table.theirs}, though both are one table in the model "
            "(tie_word_embeddings): read it with tied=False"
        )


def _modern(name: str) -> str:
    module, dot, leaf = name.rpartition(".")
    return module + dot + naming.OLD_LEAVES.get(leaf, leaf)


def _best_format(model: nn.Module, wanted: Mapping[str, Any], tensors: Tensors) -> Format:
    """The format, with or without its prefix, in which most of the names are found."""
    candidates = list(naming.formats(model))
    candidates += [naming.bare(form) for form in candidates if form.prefix]

    def found(form: Format) -> int:
        rows = [naming.parameter(form, path) for path in wanted]
        return sum(row is not None and row.theirs in tensors for row in rows)

    return max(candidates, key=found)


def _axes(reading: _Reading) -> tuple[int, ...]:
    rank = len(reading.tensor.shape)
    same = tuple(range(rank))
    is_kernel = reading.torch and reading.path.endswith("/kernel")
    return naming.KERNEL_AXES.get(rank, same) if is_kernel else same


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


def _read(reading: _Reading, dtype: DTypeLike) -> np.ndarray | jax.Array:
    """The value of one parameter, in our layout."""
    if _is_resized(reading):
        table = reading.tensor.read(np.float32)
        return resize_positions(table, reading.shape).astype(dtype)
    value = empty(reading.shape, dtype)
    start, stop = _rows(reading)
    stored = (stop - start, *reading.tensor.shape[1:])
    in_their_order = value.transpose(np.argsort(_axes(reading))) if reading.torch else value
    reading.tensor.read_into(in_their_order.reshape(stored), start)
    return value


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
