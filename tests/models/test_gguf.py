"""GGUF files, written by llama.cpp's own library: weights, configuration, tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from fedlora_jax.models import pretrained
from fedlora_jax.models.llama import Llama, RopeScaling, rotary_frequencies
from fedlora_jax.models.pretrained import gguf_files, naming

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

MODEL = Llama(
    vocab_size=261,
    width=64,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=96,
    rope_base=5e3,
    context=128,
)
THEIRS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def interleaved(weight, heads):
    """The rows of query or key in llama.cpp's order, as its converter has it."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def bytes_vocabulary():
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return ["<|end|>", "<|user|>", *letters, "he", "Ġt", "Ġthe"], ["h e", "Ġ t", "Ġt he"]


def write(path, params, kind="F32", frequencies=None, context=128, **changed):
    """A file of `MODEL`, of as many blocks as there are, with matrices in a quantisation; the
    dequantised parameters as torch's."""
    writer = gguf.GGUFWriter(path, changed.pop("arch", "llama"))
    tokens, merges = bytes_vocabulary()
    writer.add_context_length(context)
    writer.add_embedding_length(MODEL.width)
    writer.add_block_count(sum(name.startswith("block_") for name in params))
    writer.add_feed_forward_length(MODEL.mlp_dim)
    writer.add_head_count(MODEL.num_heads)
    writer.add_head_count_kv(MODEL.num_kv_heads)
    if changed.pop("has_epsilon", True):
        writer.add_layer_norm_rms_eps(MODEL.norm_epsilon)
    for name, *values in changed.pop("entries", ()):
        getattr(writer, f"add_{name}")(*values)
    writer.add_rope_freq_base(MODEL.rope_base)
    writer.add_tokenizer_model(changed.pop("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changed.pop("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    stored = {}
    (form,) = naming.formats(MODEL)
    quantisation = gguf.GGMLQuantizationType[kind]
    for path_of, value in traverse_util.flatten_dict(params, sep="/").items():
        name = naming.parameter(form, path_of).theirs
        weight = np.asarray(value, np.float32)
        weight = weight.T if path_of.endswith("kernel") else weight
        module = name.removesuffix(".weight")
        index = module.split(".")[2] if module.startswith("model.layers.") else None
        short = THEIRS[module.split(".", 3)[3] if index else module]
        heads = {"attn_q": MODEL.num_heads, "attn_k": MODEL.num_kv_heads}.get(short)
        data = weight if heads is None else interleaved(weight, heads)
        own = quantisation if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(data, own)
        writer.add_tensor(
            (f"blk.{index}." if index else "") + short + ".weight", packed, raw_dtype=own
        )
        # Blocks of a quantisation lie within a row, so that rows can be put in order afterwards.
        stored[path_of] = gguf.quants.dequantize(gguf.quants.quantize(weight, own), own)
    if frequencies is not None:
        writer.add_tensor("rope_freqs.weight", frequencies)
    assert not changed
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def write_metadata(path, **entries):
    """A file without weights; entries by the names of `GGUFWriter`'s methods `add_...`."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in entries.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_random(path, seed=0, depth=1, **changed):
    """A file of `MODEL`, but of so many blocks, with random weights."""
    model, tokens = MODEL.clone(depth=depth), jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 8, shapes)
    write(path, params, **changed)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_model_and_weights_come_back_in_every_quantisation(tmp_path, params, kind):
    stored = write(tmp_path / "model.gguf", params, kind)
    for source in (tmp_path / "model.gguf", tmp_path):
        model, got = pretrained.from_pretrained(source)
        assert model == MODEL.clone(head_dim=16, norm_epsilon=model.norm_epsilon)
        assert model.norm_epsilon == pytest.approx(MODEL.norm_epsilon)
        for path, value in traverse_util.flatten_dict(got, sep="/").items():
            want = stored[path].T if path.endswith("kernel") else stored[path]
            np.testing.assert_array_equal(value, want, err_msg=path)


def test_a_file_is_looked_through_once_until_it_changes(tmp_path, params, monkeypatch):
    """The library takes seconds for the vocabulary of a real model."""
    path, opened, read = tmp_path / "model.gguf", [], gguf.GGUFReader.__init__

    def noted(self, *args, **options):
        opened.append(args)
        read(self, *args, **options)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", noted)
    write(path, params)
    for _ in range(2):
        pretrained.from_pretrained(path)
        pretrained.read_language(path)
        assert gguf_files.read_config(path)["max_position_embeddings"] == 128
    assert len(opened) == 1
    write(path, params, context=64)
    assert gguf_files.read_config(path)["max_position_embeddings"] == 64
    assert len(opened) == 2


def write_tensors(path, **tensors):
    """A file of tensors as they are stored, with their forms; of a model with two heads."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(2)
    for name, (stored, kind) in tensors.items():
        writer.add_tensor(name.replace("__", "."), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Where a block has the numbers of 16 bits that scale it: anything else may stand there at random.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@pytest.mark.parametrize("kind", SCALES)
def test_quantisations_that_gguf_only_undoes(tmp_path, kind):
    """Rows are read some at a time, in the order of Hugging Face."""
    quantisation = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[quantisation]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (8, 2, size), np.uint8)
    for at in SCALES[kind]:
        blocks[..., at : at + 2] = rng.normal(size=(8, 2, 1)).astype(np.float16).view(np.uint8)
    stored = blocks.reshape(8, 2 * size)
    tensors = {"blk__0__attn_q__weight": stored, "blk__0__attn_v__weight": stored}
    path = tmp_path / "model.gguf"
    write_tensors(path, **{name: (x, quantisation) for name, x in tensors.items()})
    want = gguf.dequantize(stored, quantisation)
    assert np.isfinite(want).all() and len(np.unique(want)) > values / 2
    read = gguf_files.open_gguf(path)
    for name, order in (("v", range(8)), ("q", [0, 2, 1, 3, 4, 6, 5, 7])):
        tensor = read[f"model.layers.0.self_attn.{name}_proj.weight"]
        assert tensor.shape == (8, 2 * values)
        for first, count in ((0, 8), (3, 4)):
            got = np.empty((count, 2 * values), np.float32)
            tensor.read_into(got, first)
            np.testing.assert_array_equal(got, want[list(order)][first : first + count])


@pytest.mark.parametrize("kind", ["F64", "I8", "I32", "Q8_K"])
def test_forms_that_gguf_cannot_undo_are_named(tmp_path, kind):
    dtype = {"F64": np.float64, "I8": np.int8, "I32": np.int32}.get(kind)
    stored = np.zeros((2, 292), np.uint8) if dtype is None else np.zeros((2, 64), dtype)
    form = gguf.GGMLQuantizationType[kind]
    write_tensors(tmp_path / "model.gguf", blk__0__ffn_up__weight=(stored, form))
    message = f"model.gguf: tensor 'blk.0.ffn_up.weight' is in {kind}, which gguf cannot dequantise"
    with pytest.raises(ValueError, match=message):
        gguf_files.open_gguf(tmp_path / "model.gguf")


def test_tokenizer(tmp_path, params):
    write(tmp_path / "model.gguf", params)
    tokenizer = gguf_files.read_tokenizer(tmp_path / "model.gguf")
    tokens, _ = bytes_vocabulary()
    text = "<|user|>the the 12\n\tnaïve<|end|>"
    encoded = tokenizer.encode(text)
    assert encoded.tokens[:3] == ["<|user|>", "t", "he"] and "Ġthe" in encoded.tokens
    assert encoded.tokens[-1] == "<|end|>"
    assert encoded.ids == [tokens.index(token) for token in encoded.tokens]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text


# What Llama 3's splitting makes of a text, by hand, in the letters of bytes.
TEXT_OF_LLAMA_3 = "We'LL add 1234567,  naïve\n\n  stop!\n<|eot_id|>\tok"
PIECES_OF_LLAMA_3 = (
    *("We", "'LL", "Ġadd", "Ġ", "123", "456", "7", ",", "Ġ", "ĠnaÃ¯ve", "ĊĊ", "Ġ", "Ġstop", "!Ċ"),
    *("<|eot_id|>", "ĉok"),
)


def write_llama_3(path, **changed):
    """Pieces are tokens that no merge gives, but for one, which is made of two tokens."""
    pieces = sorted({*PIECES_OF_LLAMA_3} - {"<|eot_id|>", "Ġstop"})
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    letters = [letter for letter in letters if letter not in pieces]
    special = ["<|begin_of_text|>", "<|eot_id|>"]
    tokens = [*letters, *pieces, "Ġs", "to", "top", *special]
    entries = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "llama-bpe",
        "token_list": tokens,
        "token_merges": ["Ġ s", "t o", "to p"],
        "token_types": [1] * (len(tokens) - 2) + [3, 3],
        "bos_token_id": len(tokens) - 2,
        "eos_token_id": len(tokens) - 1,
    }
    entries |= changed
    write_metadata(path, **{name: x for name, x in entries.items() if x is not None})
    return tokens


@pytest.mark.parametrize("name", ["llama-bpe", "llama3", "llama-v3"])
def test_llama_3_splits_and_takes_whole_pieces_first(tmp_path, name):
    path = tmp_path / "model.gguf"
    tokens = write_llama_3(path, tokenizer_pre=name)
    tokenizer = gguf_files.read_tokenizer(path)
    encoded = tokenizer.encode(TEXT_OF_LLAMA_3, add_special_tokens=False)
    cut = PIECES_OF_LLAMA_3.index("Ġstop")
    want = (*PIECES_OF_LLAMA_3[:cut], "Ġs", "top", *PIECES_OF_LLAMA_3[cut + 1 :])
    assert tuple(encoded.tokens) == want
    assert encoded.ids == [tokens.index(token) for token in want]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == TEXT_OF_LLAMA_3
    assert tokenizer.decode(encoded.ids) == TEXT_OF_LLAMA_3.replace("<|eot_id|>", "")


@pytest.mark.parametrize("said, added", [(None, True), (True, True), (False, False)])
def test_a_text_begins_as_the_file_says(tmp_path, said, added):
    """Llama 3's do where a file says nothing, as in its own tokenizer.json."""
    path = tmp_path / "model.gguf"
    tokens = write_llama_3(path, **({} if said is None else {"add_bos_token": said}))
    tokenizer = gguf_files.read_tokenizer(path)
    ids = [tokens.index("<|begin_of_text|>"), tokens.index("to")]
    assert tokenizer.encode("to").ids == ids[not added :]
    assert tokenizer.encode("to", add_special_tokens=False).tokens == ["to"]


SPLITTERS = "gpt-2, llama-bpe, llama-v3, llama3, smollm"


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"tokenizer_pre": "lama-bpe"},
            "has a tokenizer 'gpt2' with an unknown pre-tokenizer 'lama-bpe'. Did you mean "
            f"'llama-bpe'? Valid names: {SPLITTERS}.",
        ),
        ({"tokenizer_pre": "qwen2"}, f"pre-tokenizer 'qwen2'. Valid names: {SPLITTERS}."),
        (
            {"tokenizer_pre": "default"},
            f"does not say how it splits a text; known are {SPLITTERS}.",
        ),
        ({"tokenizer_pre": None}, f"does not say how it splits a text; known are {SPLITTERS}."),
        ({"tokenizer_model": "bert"}, "has an unknown tokenizer 'bert'. Valid names: gpt2, llama."),
        ({"tokenizer_model": None}, "has no tokenizer."),
    ],
)
def test_unknown_tokenizers_are_named_with_what_to_do(tmp_path, changed, message):
    path = tmp_path / "model.gguf"
    write_llama_3(path, **changed)
    with pytest.raises(ValueError) as error:
        gguf_files.read_tokenizer(path)
    told = str(error.value)
    assert told.startswith(str(path)) and message in told
    assert told.endswith(
        "Name the original model's tokenizer.json instead: --config.data.tokenizer=PATH, or "
        "--tokenizer=PATH of experiments.evaluate."
    )


PIECES = (
    *("▁", "e", "t", "o", "a", "h", "n", "i", "s", "l", ".", ",", "1", "2"),
    *("▁t", "he", "▁the", "in", "▁▁", "▁a", "to", "an", "is", "▁to", "ll", "▁▁▁▁", "hell", "12"),
    *("hello", "▁hello", "▁is"),
)
# The best of all, and one that is no sum of better ones.
SCORES = {"▁the": 0.5, "hello": -99.0}


def sentence_pieces(**changed):
    """Entries of a vocabulary of SentencePiece's, as Llama 2's: bytes, and pieces with scores."""
    count = 3 + 256
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *PIECES,
        "<tool>",
    ]
    scores = [SCORES.get(piece, -float(index)) for index, piece in enumerate(PIECES)]
    return {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_list": tokens,
        "token_scores": [0.0] * count + scores + [0.0],
        "token_types": [2, 3, 3] + [6] * 256 + [1] * len(PIECES) + [4],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
        **changed,
    }


def merged(text, scores):
    """SentencePiece's algorithm to the letter: the neighbours whose piece has the best score."""
    symbols = list(text)
    while True:
        found = [
            (-scores[left + right], at)
            for at, (left, right) in enumerate(zip(symbols, symbols[1:]))
            if left + right in scores
        ]
        if not found:
            return symbols
        at = min(found)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_pieces_are_merged_by_their_scores(tmp_path, prefix):
    entries = sentence_pieces(add_space_prefix=prefix)
    write_metadata(tmp_path / "model.gguf", **entries)
    tokenizer = gguf_files.read_tokenizer(tmp_path / "model.gguf")
    scores = dict(zip(entries["token_list"], entries["token_scores"]))
    for text in (
        "the hello  the     tin 1212,\nnaïve 漢 🎉 is\tQ.",
        " hellohello in the tothello    ",
        "",
        "é",
    ):
        # As in transformers, a text that begins with a space gets no other.
        put = prefix and text != "" and not text.startswith(" ")
        spelt = merged("▁" * put + text.replace(" ", "▁"), scores)
        want = [
            token
            for piece in spelt
            for token in (
                [piece] if piece in scores else [f"<0x{byte:02X}>" for byte in piece.encode()]
            )
        ]
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert encoded.tokens == want
        assert encoded.ids == [entries["token_list"].index(token) for token in want]
        assert tokenizer.decode(encoded.ids) == (text.removeprefix(" ") if prefix else text)
        assert tokenizer.encode(text).ids == [1, *encoded.ids]


def test_sentence_pieces_that_are_special(tmp_path):
    write_metadata(tmp_path / "model.gguf", **sentence_pieces(add_bos_token=False))
    tokenizer = gguf_files.read_tokenizer(tmp_path / "model.gguf")
    encoded = tokenizer.encode("to<tool>is</s><s>")
    assert encoded.tokens == ["▁to", "<tool>", "is", "</s>", "<s>"]
    assert tokenizer.decode(encoded.ids) == "to<tool>is"


@pytest.mark.parametrize("scores", [None, -1000.0])
def test_sentence_pieces_without_scores_are_refused(tmp_path, scores):
    """Some converters write one score for all."""
    entries = sentence_pieces()
    count = len(entries.pop("token_scores"))
    if scores is not None:
        entries["token_scores"] = [scores] * count
    write_metadata(tmp_path / "model.gguf", **entries)
    with pytest.raises(ValueError, match="'llama' without scores.*tokenizer.json"):
        gguf_files.read_tokenizer(tmp_path / "model.gguf")


def test_frequencies_of_llama_3(tmp_path, params):
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    plain, stretched = (
        np.asarray(rotary_frequencies(16, MODEL.rope_base, kind)) for kind in (None, scaling)
    )
    write(tmp_path / "model.gguf", params, frequencies=plain / stretched)
    model, _ = pretrained.from_pretrained(tmp_path)
    assert model.rope_scaling == pytest.approx(scaling)
    write(tmp_path / "other.gguf", params, frequencies=np.linspace(1, 9, 8, dtype=np.float32))
    with pytest.raises(ValueError, match="not stretched as Llama 3"):
        gguf_files.read_config(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        # As for llama.cpp, scaling is linear where no kind is said, and none by a factor of 1 or 0.
        ([("rope_scaling_factor", 4.0)], "rope scaling 'linear'"),
        ([("float32", "llama.rope.scale_linear", 4.0)], "rope scaling 'linear'"),
        ([("string", "llama.rope.scaling.type", "yarn")], "rope scaling 'yarn'"),
        ([("rope_scaling_factor", 0.0), ("float32", "llama.rope.scale_linear", 4.0)], None),
        ([("rope_scaling_factor", 1.0), ("string", "llama.rope.scaling.type", "linear")], None),
        ([("rope_scaling_factor", 4.0), ("string", "llama.rope.scaling.type", "none")], None),
        ([("causal_attention", False)], "attends in both directions"),
        ([("causal_attention", True)], None),
        (None, "lacks 'rms_norm_eps'"),
    ],
)
def test_entries_of_the_header(tmp_path, entries, problem):
    has_epsilon = entries is not None
    write_random(tmp_path / "model.gguf", entries=entries or (), has_epsilon=has_epsilon)
    if problem is None:
        assert pretrained.model_of(tmp_path).rope_scaling is None
        return
    with pytest.raises(ValueError, match=problem):
        pretrained.model_of(tmp_path)


def test_mistakes(tmp_path, params):
    good = tmp_path / "good.gguf"
    write(good, params)
    (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:3000])
    (tmp_path / "text.gguf").write_text("no weights here")
    for name in ("cut", "text"):
        with pytest.raises(ValueError, match="is not a GGUF file, or is damaged"):
            pretrained.from_pretrained(tmp_path / f"{name}.gguf")
    with pytest.raises(FileNotFoundError):
        gguf_files.read_config(tmp_path / "none.gguf")
    write(tmp_path / "qwen.gguf", params, arch="qwen2")
    with pytest.raises(ValueError, match="architecture 'qwen2'; ours is 'llama'"):
        pretrained.from_pretrained(tmp_path / "qwen.gguf")
    write(tmp_path / "spm.gguf", params, tokenizer="llama", pre="default")
    with pytest.raises(ValueError, match="tokenizer 'llama'.*tokenizer.json"):
        gguf_files.read_tokenizer(tmp_path / "spm.gguf")
    with pytest.raises(FileNotFoundError, match="which of these files is meant"):
        pretrained.from_pretrained(tmp_path)
