"""Backbones from the configuration files of Hugging Face and timm."""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import flax.linen as nn

from fedlora_jax import bounds
from fedlora_jax.models.bert import Bert
from fedlora_jax.models.llama import Llama, RopeScaling
from fedlora_jax.models.vit import ViT


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
    if not isinstance(kind, str) or kind not in _FROM_CONFIG:
        raise ValueError(f"model type {kind!r} is none of {', '.join(sorted(_FROM_CONFIG))}")
    # What is null is not said.
    config = {name: value for name, value in config.items() if value is not None}
    activation, make = _FROM_CONFIG[kind]
    named = config.get("hidden_act", activation)
    if _OTHER_NAMES.get(named, named) != activation:
        raise ValueError(f"{kind} with hidden_act={named!r}; ours is {activation!r}")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method")
        raise ValueError(f"{kind} quantised by {method!r} (quantization_config); ours is plain")
    try:
        model = make(config, overrides)
    except KeyError as error:
        raise ValueError(f"the configuration of a {kind} lacks {error}") from None
    values = {field.name: getattr(model, field.name) for field in fields(model)}
    bounds.check("model", **values)
    if scaling := values.get("rope_scaling"):
        bounds.check("model", **scaling._asdict())
    return model


def _timm_model(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> nn.Module:
    from fedlora_jax import models

    architecture = config["architecture"]
    match = re.match(r"(vit|mixer)_(small|s|base|b|large|l)(_patch)?16(_|$)", architecture)
    if match is None:
        raise ValueError(f"timm architecture {architecture!r} is not one of our backbones")
    pool = "token" if match[1] == "vit" else "avg"
    if config.get("global_pool", pool) != pool:
        raise ValueError(f"timm with global_pool={config['global_pool']!r}; ours is {pool!r}")
    if changed := sorted((config.get("model_args") or {}).keys() - _TIMM_ARGS):
        raise ValueError(
            f"timm architecture {architecture!r} with model_args {', '.join(changed)}; ours is as "
            "its name says"
        )
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
    if config.get("is_decoder"):
        raise ValueError(f"{variant} as a decoder (is_decoder); ours attends in both directions")
    architectures = config.get("architectures", [])
    classifies = any("Classification" in name for name in architectures)
    each_token = any("TokenClassification" in name for name in architectures)
    fields = {
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_classes": _num_labels(config) if classifies else None,
        "pooling": "none" if each_token else "first",
        "variant": variant,
        "pad_token": config.get("pad_token_id"),
        "mlp_dim": config["intermediate_size"],
        "num_positions": config["max_position_embeddings"],
        "num_token_types": config["type_vocab_size"],
        "layer_norm_epsilon": config["layer_norm_eps"],
    }
    return Bert(**{**fields, **overrides})


def _llama(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Llama:
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError("llama with biases; ours has none")
    if not config.get("is_causal", True):
        raise ValueError("llama that attends in both directions (is_causal); ours is causal")
    # In the order of transformers: the older entry is the one that somebody put beside the other.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear" and rope.get("factor") == 1:
        kind = "default"
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
        "rope_scaling": None if kind == "default" else _rope_scaling(config, rope),
        "norm_epsilon": config["rms_norm_eps"],
        "tied": config.get("tie_word_embeddings", False),
        "context": config.get("max_position_embeddings"),
    }
    return Llama(**{**fields, **overrides})


def _rope_scaling(config: Mapping[str, Any], rope: Mapping[str, Any]) -> RopeScaling:
    original = "original_max_position_embeddings"
    return RopeScaling(
        rope["factor"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        config[original] if original in config else rope[original],
    )


_Make = Callable[[Mapping[str, Any], Mapping[str, Any]], nn.Module]

# Of activations.
_OTHER_NAMES = {"gelu_python": "gelu", "swish": "silu"}

# What a timm model may differ in from its name: seen in shapes, or without effect here.
_TIMM_ARGS = {"img_size", "num_classes", "drop_rate", "drop_path_rate"}

# By model type: the activation that ours has, and how to make it.
_FROM_CONFIG: dict[str, tuple[str, _Make]] = {
    "vit": ("gelu", _vit),
    "bert": ("gelu", partial(_bert, variant="bert")),
    "roberta": ("gelu", partial(_bert, variant="roberta")),
    "xlm-roberta": ("gelu", partial(_bert, variant="roberta")),
    "camembert": ("gelu", partial(_bert, variant="roberta")),
    "llama": ("silu", _llama),
}
