"""Tensors in files, read one at a time and straight into the type that is wanted.

Reads safetensors (one file, or shards under an index), NumPy's `.npz` and GGUF (by
`gguf_files.py`), and writes safetensors. A safetensors file is eight bytes of length, a JSON header
and the raw data; it is read here and not by its library because a slice of rows cast on the way
keeps the peak of memory at the model itself, and because bfloat16 needs no torch.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fedlora_jax.foreign import read_object, reading

PathLike: TypeAlias = str | os.PathLike[str]

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

# Bytes that are cast or transposed at once on their way from the file.
_CHUNK = 1 << 20
_ALIGNMENT = 64
_LONGEST_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
      shape: Its shape.
      dtype: Its type in the file.
      read_into: `(out, start)`: fills `out`, of any type and strides, with as many rows of the
        first axis as it has, from row `start` on.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read_into: Callable[[np.ndarray, int], None]

    def read(self, dtype: DTypeLike | None = None) -> np.ndarray:
        """Its values as `dtype`, by default as stored."""
        out = empty(self.shape, self.dtype if dtype is None else dtype)
        self.read_into(out, 0)
        return out


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array to be filled, aligned as JAX wants it in order to take it over on CPU as it is."""
    dtype = np.dtype(jnp.dtype(dtype))
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    return raw[first : first + size].view(dtype).reshape(shape)


Tensors: TypeAlias = dict[str, StoredTensor]


def open_tensors(source: PathLike) -> Tensors:
    """Lists the tensors of a checkpoint without reading them.

    Args:
      source: A `.safetensors`, `.npz` or `.gguf` file, the index of a sharded checkpoint, or a
        directory that holds one of them.

    Raises:
      FileNotFoundError: If there is nothing of the kind; it says what there is.
      ValueError: If a file is damaged.
    """
    tensors: Tensors = {}
    for path in files_of(source):
        if is_gguf(path):
            from fedlora_jax.models.pretrained import gguf_files

            tensors |= gguf_files.open_gguf(path)
        else:
            tensors |= _open_npz(path) if path.suffix == ".npz" else _open_safetensors(path)
    return tensors


def is_gguf(path: Path) -> bool:
    """Whether it is a file of llama.cpp."""
    return path.suffix == ".gguf"


def files_of(source: PathLike) -> list[Path]:
    """The file, or the shards, that `open_tensors` reads."""
    path = find_file(source)
    if not path.name.endswith(".index.json"):
        return [path]
    with reading(path, "an index of shards"):
        shards = sorted(set(read_object(path, "an index of shards")["weight_map"].values()))
        return [path.parent / _checked_name(shard) for shard in shards]


def _checked_name(shard: str) -> str:
    """The name of a shard, which lies beside its index and nowhere else."""
    if shard != PureWindowsPath(shard).name or shard in ("", ".", ".."):
        raise ValueError(f"a shard {shard!r} would lie outside of its directory")
    if not shard.endswith(".safetensors"):
        raise ValueError(f"a shard {shard!r} is no safetensors file")
    return shard


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
            "pip install -e '.[hub]'"
        ) from error
    patterns = [
        "*.safetensors",
        "*.safetensors.index.json",
        "*.npz",
        "*config.json",
        "token*",
        "*.jinja",
    ]
    return Path(huggingface_hub.snapshot_download(os.fspath(source), allow_patterns=patterns))


def find_file(source: PathLike) -> Path:
    """The file that `open_tensors` reads for `source`."""
    path = Path(source)
    if path.is_file():
        if path.name.endswith((".safetensors", ".npz", ".gguf", ".safetensors.index.json")):
            return path
        raise FileNotFoundError(
            f"cannot read {path}: expected a .safetensors, .safetensors.index.json, .npz or .gguf "
            "file" + _torch_hint(path.name)
        )
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or directory {path}")
    named = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    for name in named:
        if (path / name).is_file():
            return path / name
    found = sorted(
        file for kind in ("safetensors", "npz", "gguf") for file in path.glob(f"*.{kind}")
    )
    if len(found) == 1:
        return found[0]
    listing = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
    reason = "which of these files is meant" if found else "no .safetensors, .npz or .gguf file"
    raise FileNotFoundError(f"{path}: {reason}; it holds {listing}" + _torch_hint(listing))


def _torch_hint(listing: str) -> str:
    if ".bin" in listing or ".pt" in listing:
        return (
            ". Pickled torch checkpoints are not read: save it again as safetensors, in torch with "
            "safetensors.torch.save_file or save_pretrained"
        )
    return ""


def _open_safetensors(path: Path) -> Tensors:
    size = path.stat().st_size
    with path.open("rb") as file, reading(path, "a safetensors file"):
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{path} is not a safetensors file, or is cut short")
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}, not an object")
        header.pop("__metadata__", None)
        return {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _entry(path: Path, name: str, entry: Mapping[str, Any], base: int, size: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{path}: tensor {name!r} has the unknown type {entry['dtype']!r}")
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if any(type(x) is not int or x < 0 for x in (*shape, start, stop)):
        raise ValueError(f"{path}: shape and place of tensor {name!r} must be whole numbers")
    if stop - start != math.prod(shape) * dtype.itemsize or not 0 <= start <= stop <= size - base:
        raise ValueError(f"{path}: tensor {name!r} does not fit its place; the file is damaged")

    def read_into(out: np.ndarray, first: int) -> None:
        row = math.prod(shape[1:])
        with path.open("rb") as file:
            file.seek(base + start + first * row * dtype.itemsize)
            if not shape:
                out[...] = np.fromfile(file, dtype, 1)[0]
                return
            for rows, _ in chunks(out, row * dtype.itemsize):
                rows[...] = np.fromfile(file, dtype, len(rows) * row).reshape(rows.shape)

    return StoredTensor(shape, dtype, read_into)


def chunks(out: np.ndarray, row_bytes: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of an array to be filled a piece at a time, and the index of the first of each."""
    step = max(1, _CHUNK // max(1, row_bytes))
    for begin in range(0, len(out), step):
        yield out[begin : begin + step], begin


def _open_npz(path: Path) -> Tensors:
    """The arrays of an `.npz`, one zip entry each; `opt/target/` of old releases is dropped."""
    tensors = {}
    with reading(path, "an .npz file"), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read_header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read_header(file)
                size = entry.file_size - file.tell()
            if dtype.hasobject:
                raise ValueError(f"{entry.filename!r} holds Python objects, which are not read")
            if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
                raise ValueError(f"{entry.filename!r} {list(shape)} does not fill its place")
            key = entry.filename.removesuffix(".npy")
            tensors[key.removeprefix("opt/target/")] = _npz_tensor(path, key, shape, dtype)
    return tensors


def _npz_tensor(path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype) -> StoredTensor:
    def read_into(out: np.ndarray, first: int) -> None:
        with reading(path, "an .npz file"), np.load(path, allow_pickle=False) as arrays:
            values = arrays[key]
        out[...] = values[first : first + len(out)] if shape else values

    return StoredTensor(shape, dtype, read_into)


def write_safetensors(
    path: PathLike,
    tensors: Mapping[str, np.ndarray | StoredTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors one after the other; those that lie in another file are never all in memory.

    Args:
      path: The file; it appears under its name only when it is complete.
      tensors: From name to values, or to a tensor that is read when its turn comes.
      metadata: Strings for the header; torch's readers want `{"format": "pt"}`, the default.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": _CODES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = Path(f"{os.fspath(path)}.partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            values = tensor.read() if isinstance(tensor, StoredTensor) else tensor
            file.write(np.ascontiguousarray(values).tobytes())
    partial.replace(path)
