"""GGUF files of Llama-architecture models: weights, configuration and tokenizer of llama.cpp.

One file holds everything. Weights come in the names and the order of Hugging Face, dequantised to
float32 a few rows at a time, so that what is allocated is bounded as for the other formats; the
file itself is mapped. `gguf_tokenizers` says which tokenizers are read. Needs the extra `gguf`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fedlora_jax.foreign import reading
from fedlora_jax.models.llama import RopeScaling, rotary_frequencies
from fedlora_jax.models.pretrained import gguf_tokenizers
from fedlora_jax.models.pretrained.files import PathLike, StoredTensor, Tensors, chunks

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# How much Llama 3 stretches each frequency is stored as it comes out; this is what it comes from.
_FREQUENCIES = "rope_freqs.weight"
_LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 8192)

T = TypeVar("T")


class _Header(NamedTuple):
    """What a file says before its numbers.

    Attributes:
      values: All metadata by name.
      tensors: The library's `ReaderTensor` of each; their data are mapped.
    """

    values: Mapping[str, Any]
    tensors: Sequence[Any]


def _named(function: Callable[[PathLike], T]) -> Callable[[PathLike], T]:
    """Makes errors that name the file of all that `function` meets in it."""

    @functools.wraps(function)
    def named(path: PathLike) -> T:
        with reading(path, "a GGUF file"):
            return function(path)

    return named


@_named
def read_config(path: PathLike) -> dict[str, Any]:
    """What a `config.json` of Hugging Face would say of the model.

    Raises:
      ImportError: If the extra `gguf` is not installed.
      ValueError: If the file is damaged, or its architecture is not Llama's.
    """
    header = _open(path)
    architecture = header.values.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path} holds a model of architecture {architecture!r}; ours is 'llama'")

    def number(name: str, default: Any = None) -> Any:
        return header.values.get(f"llama.{name}", default)

    heads, width = number("attention.head_count"), number("embedding_length")
    names = {tensor.name for tensor in header.tensors}
    return {
        "model_type": "llama",
        "vocab_size": int(_tensor(header, "token_embd.weight").shape[1]),
        "hidden_size": width,
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "intermediate_size": number("feed_forward_length"),
        "head_dim": number("attention.key_length", width // heads),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(header),
        "max_position_embeddings": number("context_length"),
        "is_causal": number("attention.causal", True),
        "tie_word_embeddings": "output.weight" not in names,
    }


def _rope_scaling(header: _Header) -> dict[str, Any] | None:
    def entry(name: str, default: Any) -> Any:
        return header.values.get(f"llama.rope.{name}", default)

    # As llama.cpp reads them: linear where no kind is said, and a factor of 0 is none.
    kind = entry("scaling.type", "linear")
    factor = entry("scaling.factor", entry("scale_linear", 0.0)) or 1.0
    if kind != "none" and (kind, factor) != ("linear", 1.0):
        return {"rope_type": kind, "factor": factor}
    if _FREQUENCIES not in {tensor.name for tensor in header.tensors}:
        return None
    factors = np.array(_tensor(header, _FREQUENCIES).data, np.float32)
    scaling = _LLAMA3._replace(factor=float(factors.max()))
    base = entry("freq_base", 10_000.0)
    plain, stretched = (
        rotary_frequencies(2 * len(factors), base, wanted) for wanted in (None, scaling)
    )
    if not np.allclose(factors, plain / stretched, rtol=1e-3):
        raise ValueError(f"the frequencies in {_FREQUENCIES!r} are not stretched as Llama 3's are")
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


@_named
def open_gguf(path: PathLike) -> Tensors:
    """Lists the tensors of a file by their Hugging Face names, without reading them.

    llama.cpp turns neighbouring channels of a head as a pair, Hugging Face channels half a head
    apart: the rows of query and key are put back into the latter's order.

    Raises:
      ImportError: If the extra `gguf` is not installed.
      ValueError: If the file is damaged, or a tensor is in a form that `gguf` cannot dequantise.
    """
    header = _open(path)
    heads = int(header.values.get("llama.attention.head_count", 1))
    turned = {
        "attn_q": heads,
        "attn_k": int(header.values.get("llama.attention.head_count_kv", heads)),
    }
    tensors = {}
    for tensor in header.tensors:
        if tensor.name != _FREQUENCIES:
            kind = tensor.name.split(".")[-2]
            tensors[_hugging_face_name(tensor.name)] = _stored(path, tensor, turned.get(kind))
    return tensors


def _hugging_face_name(name: str) -> str:
    """The name of a tensor with Hugging Face; as it is if it has none, to be complained about."""
    match name.split("."):
        case ["blk", index, kind, leaf] if kind in _BLOCK_NAMES:
            return f"model.layers.{index}.{_BLOCK_NAMES[kind]}.{leaf}"
    return _NAMES.get(name, name)


def _stored(path: PathLike, tensor: Any, heads: int | None) -> StoredTensor:
    quants, kind = _library().quants, tensor.tensor_type
    plain = kind.name in ("F32", "F16")
    # Dimensions are listed the other way round.
    shape = tuple(int(size) for size in tensor.shape[::-1])
    try:
        quants.dequantize(tensor.data[:1], kind)
    except NotImplementedError as error:
        message = f"{path}: tensor {tensor.name!r} is in {kind.name}, which gguf cannot dequantise"
        raise ValueError(message) from error

    def read_into(out: np.ndarray, first: int) -> None:
        with reading(path, "a GGUF file"):
            for rows, start in chunks(out, int(np.prod(shape[1:])) * 4):
                index = np.arange(first + start, first + start + len(rows))
                if heads is not None:
                    index = _turned(index, shape[0] // heads)
                stored = tensor.data[index]
                rows[...] = stored if plain else quants.dequantize(stored, kind).reshape(rows.shape)

    return StoredTensor(shape, np.dtype(np.float32), read_into)


def _turned(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where rows in Hugging Face's order are: channel `half d/2 + i` of a head at `2 i + half`."""
    head, channel = np.divmod(rows, head_dim)
    half, i = np.divmod(channel, head_dim // 2)
    return head * head_dim + 2 * i + half


@_named
def read_tokenizer(path: PathLike) -> Any:
    """The tokenizer of a file, a `tokenizers.Tokenizer`.

    It adds the token that begins a text where the file says so, and where it says nothing but the
    tokenizer is SentencePiece's or Llama 3's; never the one that ends a text.

    Raises:
      ImportError: If the extra `gguf` is not installed.
      ValueError: If the vocabulary is neither a byte-level one split in a way that is known here,
        nor one of SentencePiece's with scores.
    """
    header, tokenizers = _open(path), _library("tokenizers")

    def entry(name: str, default: Any = None) -> Any:
        return header.values.get(f"tokenizer.ggml.{name}", default)

    try:
        return gguf_tokenizers.make(entry, tokenizers)
    except gguf_tokenizers.Unreadable as error:
        raise ValueError(
            f"{path} {error} Name the original model's tokenizer.json instead: "
            "--config.data.tokenizer=PATH, or --tokenizer=PATH of experiments.evaluate."
        ) from error


@_named
def chat_template(path: PathLike) -> str | None:
    """The Jinja template of a conversation, if the file has one."""
    return _open(path).values.get("tokenizer.chat_template")


@_named
def special_tokens(path: PathLike) -> dict[str, str]:
    """The tokens that begin and end a text, by Hugging Face's names, as far as the file says."""
    header = _open(path)
    tokens = header.values.get("tokenizer.ggml.tokens", [])
    called = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown"}
    ids = {
        name: header.values.get(f"tokenizer.ggml.{key}_token_id") for name, key in called.items()
    }
    return {name: tokens[index] for name, index in ids.items() if index is not None}


@_named
def end_token(path: PathLike) -> int | None:
    """The token id that ends a text, if the file says which."""
    return _open(path).values.get("tokenizer.ggml.eos_token_id")


def _open(path: PathLike) -> _Header:
    file = Path(path)
    found = file.stat()
    return _read_header(file.resolve(), found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=2)
def _read_header(path: Path, changed: int, size: int) -> _Header:
    """Kept for who reads the same file next: the library takes seconds for a vocabulary.

    Args:
      path: The file.
      changed: When it was last changed; one that was since is another file.
      size: Its bytes.
    """
    gguf: Any = _library()

    class Reader(gguf.GGUFReader):
        """Does not go on behind the end of a file, which would take as long as a file says."""

        data: Any

        def _get(self, offset: int, dtype: Any, count: int = 1, **options: Any) -> Any:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > size:
                raise ValueError("it is cut short")
            # The same memory: a slice of a map takes three times as long as one of an array.
            self.data = np.asarray(self.data)
            return super()._get(offset, dtype, count, **options)

    reader = Reader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    return _Header(values, reader.tensors)


def _tensor(header: _Header, name: str) -> Any:
    for tensor in header.tensors:
        if tensor.name == name:
            return tensor
    raise ValueError(f"the file has no tensor {name!r}")


def _library(name: str = "gguf") -> ModuleType:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(
            f"reading GGUF files needs the library {name}: pip install -e '.[gguf]'"
        ) from error
