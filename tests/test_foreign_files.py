"""Every reader of files of others: whatever is in one, it is read, or an error names it.

A few hundred files by default; `HYPOTHESIS_EXAMPLES=100000` tries so many of each kind.
"""

import json
import os
import pickle
import struct
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora_jax import Factors
from fedlora_jax.data import own_files, partition, record_files
from fedlora_jax.interop import peft
from fedlora_jax.models import pretrained
from fedlora_jax.models.pretrained import gguf_files
from fedlora_jax.models.pretrained.files import files_of, open_tensors, write_safetensors

COUNT = int(os.environ.get("HYPOTHESIS_EXAMPLES", "60"))
fuzz = settings(
    max_examples=COUNT,
    deadline=None,
    derandomize=COUNT < 1000,
    database=None,
    suppress_health_check=list(HealthCheck),
)

# Errors that are ours, or the system's own.
READABLE = (ValueError, OSError)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "I8", "../x", "LORA", "llama", "(", "lora_A"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@st.composite
def damaged(draw, whole):
    """Bytes with a few of them changed, cut short, or with something put in between."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["flip", "cut", "insert", "zero"]))
        # Headers are small, and come first or last: half of the damage goes there.
        near = draw(st.booleans())
        place = draw(st.integers(0, max(0, min(len(content), 96 if near else 1 << 30) - 1)))
        if kind == "flip" and content:
            content[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=12))
        else:
            content[place : place + 8] = draw(
                st.sampled_from([bytes(8), b"\xff" * 8, struct.pack("<Q", 2**40)])
            )[: len(content[place : place + 8])]
    return bytes(content)


@st.composite
def changed(draw, whole):
    """An object with some of its fields left out or changed, or something else altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(json_values)
    found = dict(whole)
    for name in draw(st.sets(st.sampled_from(sorted(whole)), min_size=1, max_size=2)):
        value = draw(st.just("left out") | json_values)
        if value == "left out":
            del found[name]
        elif isinstance(found[name], dict) and found[name] and draw(st.booleans()):
            found[name] = draw(changed(found[name]))
        else:
            found[name] = value
    return found


def check(path, read):
    """Reads a file: a result, or an error that names it; nothing is unpickled or read outside."""
    outside = AssertionError("pickled objects were loaded")
    with (
        mock.patch.object(pickle, "loads", side_effect=outside),
        mock.patch.object(pickle, "load", side_effect=outside),
        warnings.catch_warnings(),
        np.errstate(all="ignore"),
    ):
        warnings.simplefilter("ignore")
        try:
            return read(path)
        except READABLE as error:
            assert str(path.name) in str(error) or str(path.parent) in str(error), error
            return None


def read_all(path):
    return {name: tensor.read() for name, tensor in open_tensors(path).items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("foreign")


TENSORS = {"a.weight": np.ones((3, 2), np.float32), "b": np.arange(4, dtype=np.int32)}
SAFETENSORS_HEADER = {
    "a.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
    "b": {"dtype": "I32", "shape": [4], "data_offsets": [24, 40]},
}


def encoded(header, data=bytes(40)):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@fuzz
@given(st.one_of(damaged(encoded(SAFETENSORS_HEADER)), changed(SAFETENSORS_HEADER).map(encoded)))
def test_safetensors(directory, content):
    path = directory / "model.safetensors"
    path.write_bytes(content)
    found = check(path, read_all)
    assert found is None or sum(x.nbytes for x in found.values()) <= 2 * len(content) + 40


@fuzz
@given(st.data())
def test_npz(directory, data):
    path = directory / "model.npz"
    np.savez(path, **TENSORS)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    check(path, read_all)


def test_npz_of_python_objects_is_refused(directory):
    path = directory / "objects.npz"
    np.savez(path, x=np.array([{"run": 1}], object))
    with pytest.raises(ValueError, match="objects.npz.*holds Python objects"):
        read_all(path)


@fuzz
@given(st.data())
def test_gguf(directory, data):
    pytest.importorskip("gguf")
    whole = directory / "whole.gguf"
    if not whole.exists():
        write_gguf(whole)
        assert gguf_files.read_config(whole)["hidden_size"] == 8
    path = directory / "model.gguf"
    path.write_bytes(data.draw(damaged(whole.read_bytes())))
    for read in (read_all, pretrained.model_of, gguf_files.read_tokenizer, gguf_files.end_token):
        check(path, read)


def write_gguf(path):
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_feed_forward_length(16)
    writer.add_context_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([1, 1, 3])
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", np.ones((3, 8), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.ones((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "alpha_pattern": {"^layer": 8},
    "rank_pattern": {},
    "use_rslora": False,
    "target_modules": ["layer"],
    "modules_to_save": None,
}


@fuzz
@given(changed(ADAPTER_CONFIG).map(json.dumps) | damaged(json.dumps(ADAPTER_CONFIG).encode()))
def test_adapter_config(directory, content):
    adapter = directory / "adapter"
    if not adapter.exists():
        factors = Factors(np.ones((3, 2), np.float32), np.ones((2, 4), np.float32))
        peft.save(adapter, {"layer": factors}, scale=2.0)
    path = adapter / peft.CONFIG_FILE
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = check(adapter, peft.load)
    assert found is None or (found.scale > 0 and np.isfinite(found.scale))


MODEL_CONFIG = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "tie_word_embeddings": True,
}


@fuzz
@given(changed(MODEL_CONFIG).map(json.dumps) | damaged(json.dumps(MODEL_CONFIG).encode()))
def test_model_config(directory, content):
    model = directory / "model"
    model.mkdir(exist_ok=True)
    path = model / "config.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    check(model, pretrained.model_of)


@fuzz
@given(changed({"metadata": {}, "weight_map": {"a": "a.safetensors"}}))
def test_index_of_shards(directory, content):
    inside = directory / "sharded"
    inside.mkdir(exist_ok=True)
    path = inside / "model.safetensors.index.json"
    path.write_text(json.dumps(content))
    for found in check(path, files_of) or []:
        assert found.parent == inside and found.name not in (".", "..")


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/x.safetensors", "x/../../y.safetensors", "..\\x", ".."]
)
def test_a_shard_lies_beside_its_index(tmp_path, shard):
    write_safetensors(tmp_path / "secret.safetensors", TENSORS)
    inside = tmp_path / "model"
    inside.mkdir()
    index = inside / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": shard}}))
    with pytest.raises(ValueError, match="index.json.*would lie outside of its directory"):
        open_tensors(inside)


RECORDS = '{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n'
TABLE = "text,label\n'a b',1\n\"c\",0\n"


@fuzz
@given(
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv"]),
    st.one_of(
        damaged(RECORDS.encode()),
        damaged(TABLE.encode()),
        json_values.map(lambda x: json.dumps(x).encode()),
        st.lists(json_values, max_size=3).map(lambda x: json.dumps(x).encode()),
        st.binary(max_size=64),
        st.just(b"[" * 20_000),
    ),
    st.sampled_from(["stop", "skip"]),
)
def test_records(directory, kind, content, policy):
    path = directory / f"records{kind}"
    path.write_bytes(content)
    for each in check(path, lambda path: record_files.read(path, policy)) or []:
        assert isinstance(each.fields, dict)
    read = lambda path: own_files.read(path, ("prompt", "response"), on_bad_record=policy)  # noqa: E731
    for each in check(path, read) or []:
        assert set(each.fields) == {"prompt", "response"}


WRITTEN = {
    "format": 1,
    "data": {"name": "d", "num_examples": 6, "digest": partition.digest(6)},
    "partitioner": "iid",
    "options": {},
    "seed": 0,
    "sha256": partition.digest_of_parts([np.array([0, 1]), np.array([2])]),
    "parts": [[0, 1], [2]],
}
positions = st.lists(st.lists(st.integers(-1, 7) | json_values, max_size=4), max_size=3)


@fuzz
@given(
    st.one_of(
        changed(WRITTEN),
        positions,
        positions.map(lambda x: {"clients": {str(i): each for i, each in enumerate(x)}}),
    ).map(lambda x: json.dumps(x).encode())
    | damaged(json.dumps(WRITTEN).encode())
    | st.just(b"[" * 20_000)
)
def test_partition_files(directory, content):
    path = directory / "partition.json"
    path.write_bytes(content)
    found = check(path, lambda path: partition.file(6, path))
    if found is not None:
        everything = np.concatenate(found)
        assert len(set(everything.tolist())) == len(everything)
        assert 0 <= everything.min() and everything.max() < 6 and min(map(len, found)) > 0


def test_whole_files_are_read(directory):
    """Or no error would say anything."""
    path = directory / "whole.safetensors"
    path.write_bytes(encoded(SAFETENSORS_HEADER))
    assert set(read_all(path)) == set(TENSORS)
    config = Path(directory / "whole")
    config.mkdir()
    rope = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0, "rope_type": "llama3"}
    rope["original_max_position_embeddings"] = 8192
    (config / "config.json").write_text(json.dumps(MODEL_CONFIG | {"rope_scaling": rope}))
    assert pretrained.model_of(config).width == 8
