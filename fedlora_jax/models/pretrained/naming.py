"""What others call our parameters: one table for each family of checkpoints.

A row says where a module, or a single parameter, of ours is in a checkpoint; `{i}` is the number of
a block. In torch checkpoints a `kernel` of ours is a transposed `weight`; in the original JAX
releases names of leaves are the same and attention kernels have head axes. The tables serve weights
and adapters alike.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import flax.linen as nn

from fedlora_jax.models.bert import Bert
from fedlora_jax.models.llama import Llama
from fedlora_jax.models.mixer import Mixer
from fedlora_jax.models.vit import ViT


class Row(NamedTuple):
    """One correspondence.

    Attributes:
      ours: Path of a module, or of a parameter that is not in a module of its own.
      theirs: Its name in the checkpoint.
      part: `(k, n)` if ours is the k-th of n equal parts of theirs, along the outputs.
    """

    ours: str
    theirs: str
    part: tuple[int, int] | None = None


class Format(NamedTuple):
    """The names of one kind of checkpoint.

    Attributes:
      name: How errors call it.
      rows: The correspondences.
      torch: Whether it has torch's names of leaves and transposed kernels, or Flax's.
      prefix: The start of names which a checkpoint of the bare encoder does not have.
      ignored: A regular expression for tensors that are no parameters, or belong to the
        pretraining.
      before_head: One for layers before the head that ours does not have: ignored if the head
        starts afresh, left over if it does not.
    """

    name: str
    rows: tuple[Row, ...]
    torch: bool = True
    prefix: str = ""
    ignored: str | None = None
    before_head: str | None = None


def _blocks(ours: str, theirs: str, pairs: Iterable[tuple[str, str]]) -> Iterator[Row]:
    return (Row(f"{ours}/{mine}", f"{theirs}{other}") for mine, other in pairs)


_VIT_OUTSIDE_BLOCKS = (
    Row("class_token", "vit.embeddings.cls_token"),
    Row("position_embedding", "vit.embeddings.position_embeddings"),
    Row("patch_embedding", "vit.embeddings.patch_embeddings.projection"),
    Row("norm", "vit.layernorm"),
    Row("head", "classifier"),
)

_VIT_HUGGING_FACE = Format(
    name="Hugging Face ViTForImageClassification",
    prefix="vit.",
    ignored=r"^(vit\.)?pooler\.",
    rows=(
        *_VIT_OUTSIDE_BLOCKS,
        *_blocks(
            "block_{i}",
            "vit.encoder.layer.{i}.",
            [
                ("norm1", "layernorm_before"),
                ("attention/query", "attention.attention.query"),
                ("attention/key", "attention.attention.key"),
                ("attention/value", "attention.attention.value"),
                ("attention/out", "attention.output.dense"),
                ("norm2", "layernorm_after"),
                ("mlp/fc1", "intermediate.dense"),
                ("mlp/fc2", "output.dense"),
            ],
        ),
    ),
)

# Files keep the names above; these are the modules of transformers 5, and so of adapters made with
# it.
_VIT_TRANSFORMERS_5 = Format(
    name="transformers 5 ViTForImageClassification",
    prefix="vit.",
    ignored=_VIT_HUGGING_FACE.ignored,
    rows=(
        *_VIT_OUTSIDE_BLOCKS,
        *_blocks(
            "block_{i}",
            "vit.layers.{i}.",
            [
                ("norm1", "layernorm_before"),
                ("attention/query", "attention.q_proj"),
                ("attention/key", "attention.k_proj"),
                ("attention/value", "attention.v_proj"),
                ("attention/out", "attention.o_proj"),
                ("norm2", "layernorm_after"),
                ("mlp/fc1", "mlp.fc1"),
                ("mlp/fc2", "mlp.fc2"),
            ],
        ),
    ),
)

_VIT_TIMM = Format(
    name="timm VisionTransformer",
    rows=(
        Row("class_token", "cls_token"),
        Row("position_embedding", "pos_embed"),
        Row("patch_embedding", "patch_embed.proj"),
        Row("block_{i}/norm1", "blocks.{i}.norm1"),
        Row("block_{i}/attention/query", "blocks.{i}.attn.qkv", part=(0, 3)),
        Row("block_{i}/attention/key", "blocks.{i}.attn.qkv", part=(1, 3)),
        Row("block_{i}/attention/value", "blocks.{i}.attn.qkv", part=(2, 3)),
        *_blocks(
            "block_{i}",
            "blocks.{i}.",
            [
                ("attention/out", "attn.proj"),
                ("norm2", "norm2"),
                ("mlp/fc1", "mlp.fc1"),
                ("mlp/fc2", "mlp.fc2"),
            ],
        ),
        Row("norm", "norm"),
        Row("head", "head"),
    ),
)

_VIT_ORIGINAL = Format(
    name="original ViT release (.npz)",
    torch=False,
    before_head=r"^pre_logits/",
    rows=(
        Row("class_token", "cls"),
        Row("position_embedding", "Transformer/posembed_input/pos_embedding"),
        Row("patch_embedding", "embedding"),
        *_blocks(
            "block_{i}",
            "Transformer/encoderblock_{i}/",
            [
                ("norm1", "LayerNorm_0"),
                ("attention/query", "MultiHeadDotProductAttention_1/query"),
                ("attention/key", "MultiHeadDotProductAttention_1/key"),
                ("attention/value", "MultiHeadDotProductAttention_1/value"),
                ("attention/out", "MultiHeadDotProductAttention_1/out"),
                ("norm2", "LayerNorm_2"),
                ("mlp/fc1", "MlpBlock_3/Dense_0"),
                ("mlp/fc2", "MlpBlock_3/Dense_1"),
            ],
        ),
        Row("norm", "Transformer/encoder_norm"),
        Row("head", "head"),
    ),
)

_MIXER_TIMM = Format(
    name="timm MlpMixer",
    rows=(
        Row("patch_embedding", "stem.proj"),
        *_blocks(
            "block_{i}",
            "blocks.{i}.",
            [
                ("norm1", "norm1"),
                ("token_mlp/fc1", "mlp_tokens.fc1"),
                ("token_mlp/fc2", "mlp_tokens.fc2"),
                ("norm2", "norm2"),
                ("channel_mlp/fc1", "mlp_channels.fc1"),
                ("channel_mlp/fc2", "mlp_channels.fc2"),
            ],
        ),
        Row("norm", "norm"),
        Row("head", "head"),
    ),
)

_MIXER_ORIGINAL = Format(
    name="original Mixer release (.npz)",
    torch=False,
    rows=(
        Row("patch_embedding", "stem"),
        *_blocks(
            "block_{i}",
            "MixerBlock_{i}/",
            [
                ("norm1", "LayerNorm_0"),
                ("token_mlp/fc1", "token_mixing/Dense_0"),
                ("token_mlp/fc2", "token_mixing/Dense_1"),
                ("norm2", "LayerNorm_1"),
                ("channel_mlp/fc1", "channel_mixing/Dense_0"),
                ("channel_mlp/fc2", "channel_mixing/Dense_1"),
            ],
        ),
        Row("norm", "pre_head_layer_norm"),
        Row("head", "head"),
    ),
)


def _encoder(prefix: str) -> tuple[Row, ...]:
    return (
        Row("word_embedding", f"{prefix}embeddings.word_embeddings"),
        Row("position_embedding", f"{prefix}embeddings.position_embeddings"),
        Row("token_type_embedding", f"{prefix}embeddings.token_type_embeddings"),
        Row("embedding_norm", f"{prefix}embeddings.LayerNorm"),
        *_blocks(
            "block_{i}",
            f"{prefix}encoder.layer.{{i}}.",
            [
                ("attention/query", "attention.self.query"),
                ("attention/key", "attention.self.key"),
                ("attention/value", "attention.self.value"),
                ("attention/out", "attention.output.dense"),
                ("norm1", "attention.output.LayerNorm"),
                ("fc1", "intermediate.dense"),
                ("fc2", "output.dense"),
                ("norm2", "output.LayerNorm"),
            ],
        ),
    )


_BERT = Format(
    name="Hugging Face BERT",
    prefix="bert.",
    ignored=r"(^|\.)(position_ids$|token_type_ids$|pooler\.)|^cls\.",
    rows=(*_encoder("bert."), Row("pooler", "bert.pooler.dense"), Row("head", "classifier")),
)

_ROBERTA = Format(
    name="Hugging Face RoBERTa",
    prefix="roberta.",
    ignored=r"(^|\.)(position_ids$|token_type_ids$|pooler\.)|^lm_head\.",
    rows=(
        *_encoder("roberta."),
        Row("pooler", "classifier.dense"),
        Row("head", "classifier.out_proj"),
    ),
)

_LLAMA = Format(
    name="Hugging Face LlamaForCausalLM",
    prefix="model.",
    ignored=r"rotary_emb\.inv_freq$",
    rows=(
        Row("embedding", "model.embed_tokens"),
        *_blocks(
            "block_{i}",
            "model.layers.{i}.",
            [
                ("norm1", "input_layernorm"),
                ("attention/query", "self_attn.q_proj"),
                ("attention/key", "self_attn.k_proj"),
                ("attention/value", "self_attn.v_proj"),
                ("attention/out", "self_attn.o_proj"),
                ("norm2", "post_attention_layernorm"),
                ("mlp/gate", "mlp.gate_proj"),
                ("mlp/up", "mlp.up_proj"),
                ("mlp/down", "mlp.down_proj"),
            ],
        ),
        Row("norm", "model.norm"),
        Row("head", "lm_head"),
    ),
)

_FORMATS: dict[type[nn.Module], tuple[Format, ...]] = {
    ViT: (_VIT_HUGGING_FACE, _VIT_TIMM, _VIT_ORIGINAL, _VIT_TRANSFORMERS_5),
    Mixer: (_MIXER_TIMM, _MIXER_ORIGINAL),
    Bert: (_BERT, _ROBERTA),
    Llama: (_LLAMA,),
}

# Formats in which a module of ours is the same layer of theirs: BERT's pooler and the first layer
# of RoBERTa's head are not.
_FAMILIES = (_FORMATS[ViT], _FORMATS[Mixer], (_BERT,), (_ROBERTA,), (_LLAMA,))

# What a leaf of ours is called in a torch checkpoint, and what it was called in the first ones.
OLD_LEAVES = {"gamma": "weight", "beta": "bias"}
TORCH_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}

# From torch's order of the axes of a kernel to ours: Dense and Conv.
KERNEL_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}


def formats(model: nn.Module) -> tuple[Format, ...]:
    """The kinds of checkpoints that exist for a model, the one that adapters are saved in first.

    Raises:
      ValueError: If none is known for this type of model.
    """
    if type(model) not in _FORMATS:
        known = ", ".join(kind.__name__ for kind in _FORMATS)
        raise ValueError(f"no checkpoint names are known for {type(model).__name__}, for {known}")
    unused = _unused(model)
    found = tuple(
        form._replace(ignored="|".join(filter(None, [form.ignored, *unused])))
        for form in _FORMATS[type(model)]
    )
    return found[::-1] if isinstance(model, Bert) and model.variant == "roberta" else found


def _unused(model: nn.Module) -> list[str]:
    """Patterns for tensors of a checkpoint that this configuration of a model does without."""
    if isinstance(model, Llama) and model.tied:
        return [r"^lm_head\."]
    if isinstance(model, Bert) and model.num_classes is None:
        return [r"^classifier\." if model.pooling != "first" else r"^classifier\.(?!dense)"]
    return []


def bare(form: Format) -> Format:
    """The format without its prefix, as a checkpoint of the encoder alone has it."""
    rows = tuple(row._replace(theirs=row.theirs.removeprefix(form.prefix)) for row in form.rows)
    return form._replace(name=f"{form.name} (bare encoder)", rows=rows, prefix="")


def to_theirs(form: Format, path: str) -> Row | None:
    """The row for a module path of ours, its `{i}` filled in; None if there is none."""
    for row, pattern, _ in _compiled(form):
        if match := pattern.fullmatch(path):
            return Row(path, row.theirs.format(**match.groupdict()), row.part)
    return None


def to_ours(form: Format, name: str) -> list[Row]:
    """The rows for a module name of theirs, `{i}` filled in: none, one, or all parts."""
    found = []
    for row, _, pattern in _compiled(form):
        if match := pattern.fullmatch(name):
            found.append(Row(row.ours.format(**match.groupdict()), name, row.part))
    return found


@functools.cache
def _compiled(form: Format) -> tuple[tuple[Row, re.Pattern[str], re.Pattern[str]], ...]:
    def pattern(text: str) -> re.Pattern[str]:
        return re.compile(re.escape(text).replace(r"\{i\}", r"(?P<i>\d+)"))

    return tuple((row, pattern(row.ours), pattern(row.theirs)) for row in form.rows)


def parameter(form: Format, path: str) -> Row | None:
    """As `to_theirs`, for the path of a parameter: `block_0/mlp/fc1/kernel`."""
    if row := to_theirs(form, path):
        return row
    module, _, leaf = path.rpartition("/")
    if row := to_theirs(form, module):
        name = f"{row.theirs}.{TORCH_LEAVES[leaf]}" if form.torch else f"{row.theirs}/{leaf}"
        return Row(path, name, row.part)
    return None


def aliases(name: str) -> Iterator[str]:
    """Other names of a torch module in the formats of its family, bare encoders included."""
    for family in _FAMILIES:
        every = [form for form in family if form.torch]
        every += [bare(form) for form in every if form.prefix]
        known = [row for form in every for row in to_ours(form, name) if row.part is None]
        for row in known:
            for other in every:
                match = to_theirs(other, row.ours)
                if match and match.part is None:
                    yield match.theirs
