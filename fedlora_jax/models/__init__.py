"""Backbones by name: `models.get("vit_digits", num_classes=10)`."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn

from fedlora_jax import bounds
from fedlora_jax.models.bert import Bert
from fedlora_jax.models.llama import Llama, RopeScaling
from fedlora_jax.models.mixer import Mixer
from fedlora_jax.models.vit import ViT
from fedlora_jax.names import lookup

_ROBERTA: dict[str, Any] = {
    "vocab_size": 50265,
    "variant": "roberta",
    "pad_token": 1,
    "num_positions": 514,
    "num_token_types": 1,
    "layer_norm_epsilon": 1e-5,
}

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit_digits": partial(ViT, num_classes=10, patch_size=4, width=64, depth=3, num_heads=4),
    "vit_s16": partial(ViT, num_classes=1000, patch_size=16, width=384, depth=12, num_heads=6),
    "vit_b16": partial(ViT, num_classes=1000, patch_size=16, width=768, depth=12, num_heads=12),
    "vit_l16": partial(ViT, num_classes=1000, patch_size=16, width=1024, depth=24, num_heads=16),
    "mixer_s16": partial(Mixer, num_classes=1000, patch_size=16, width=512, depth=8),
    "mixer_b16": partial(Mixer, num_classes=1000, patch_size=16, width=768, depth=12),
    "minilm_l6": partial(Bert, vocab_size=30522, width=384, depth=6, num_heads=12, pooling="mean"),
    "bert_base": partial(Bert, vocab_size=30522, width=768, depth=12, num_heads=12),
    "bert_large": partial(Bert, vocab_size=30522, width=1024, depth=24, num_heads=16),
    "roberta_base": partial(Bert, width=768, depth=12, num_heads=12, **_ROBERTA),
    "roberta_large": partial(Bert, width=1024, depth=24, num_heads=16, **_ROBERTA),
    "llama2_7b": partial(
        Llama,
        vocab_size=32000,
        width=4096,
        depth=32,
        num_heads=32,
        num_kv_heads=32,
        mlp_dim=11008,
        context=4096,
    ),
    "llama3_1b": partial(
        Llama,
        vocab_size=128256,
        width=2048,
        depth=16,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=8192,
        rope_base=500_000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        tied=True,
        context=131_072,
    ),
    "smollm2_135m": partial(
        Llama,
        vocab_size=49152,
        width=576,
        depth=30,
        num_heads=9,
        num_kv_heads=3,
        mlp_dim=1536,
        rope_base=100_000.0,
        tied=True,
        context=8192,
    ),
}

# Which layers the papers adapt: regular expressions for `fedlora_jax.lora.init`.
_LORA_TARGETS: dict[type[nn.Module], tuple[str, ...]] = {
    ViT: (r"attention/(query|key|value)$",),
    Mixer: (r"(token|channel)_mlp/fc[12]$",),
    Bert: (r"attention/(query|value)$",),
    Llama: (r"(attention|mlp)/",),
}


def names() -> list[str]:
    """Names that `get` knows, sorted."""
    return sorted(_MODELS)


def get(name: str, **overrides: Any) -> nn.Module:
    """Makes the backbone of that name.

    Args:
      name: One of `names()`.
      **overrides: Fields of the module to set differently, e.g. `num_classes=100` or `remat=True`.

    Returns:
      An unbound Linen module.

    Raises:
      ValueError: If there is no such backbone or field (the message lists those there are), or a
        number is out of its bounds.
    """
    make = lookup(_MODELS, name, "model")
    check_fields(make, name, overrides)
    return make(**overrides)


def check_fields(kind: Callable[..., nn.Module], name: str, fields: Mapping[str, Any]) -> None:
    """Checks fields of a module before it is made.

    Raises:
      ValueError: If it has no such field, or a number is out of its bounds.
    """
    known = inspect.signature(kind).parameters
    for field in fields:
        lookup(known, field, f"option of the model {name!r}:")
    bounds.check("model", **fields)


def lora_targets(model: nn.Module) -> tuple[str, ...]:
    """The layers of a backbone that papers adapt by default, as patterns for `lora.init`.

    ViT: query, key and value (FedSmoothLoRA); Mixer: all layers of its MLPs; BERT and RoBERTa:
    query and value (LoRA); Llama: all linear layers (FedSmoothLoRA).

    Raises:
      ValueError: If the model is none of ours.
    """
    if type(model) not in _LORA_TARGETS:
        raise ValueError(f"no default targets are known for {type(model).__name__}")
    return _LORA_TARGETS[type(model)]


__all__ = [
    "Bert",
    "Llama",
    "Mixer",
    "RopeScaling",
    "ViT",
    "get",
    "lora_targets",
    "names",
]
