"""Adapter checkpoints of Hugging Face PEFT: `adapter_model.safetensors` and `adapter_config.json`.

    checkpoint = peft.load("path/to/adapter", model)
    logits = lora.apply(model, params, checkpoint.adapters, x, scale=checkpoint.scale)

PEFT's `lora_A [r, d_in]` is our `a`, transposed, its `lora_B [d_out, r]` our `b`, transposed. It
has a scale a module, `alpha / r` or `alpha / sqrt(r)`; we have one a tree: that of the checkpoint's
`lora_alpha` and `r`. Where `alpha_pattern` or `rank_pattern` makes another one, the ratio is folded
into `b`.
"""

import json
import math
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from fedlora_jax import bounds, lora
from fedlora_jax.foreign import read_object, reading
from fedlora_jax.lora import Adapters, Params
from fedlora_jax.lowrank import Factors
from fedlora_jax.models import pretrained
from fedlora_jax.models.pretrained import naming
from fedlora_jax.models.pretrained.files import (
    PathLike,
    StoredTensor,
    open_tensors,
    write_safetensors,
)
from fedlora_jax.models.pretrained.naming import Format
from fedlora_jax.names import lookup

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_ROOT = "base_model.model."

# Settings under which an adapter is more, or something else, than `scale * a b`.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
)

# Values of `init_lora_weights` that leave the backbone as it is. Under others (`pissa`, `olora`,
# `corda`, `lora_ga`, `loftq`) PEFT changes its weights, each time that it loads the adapter.
_UNTOUCHED = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")


# What a torch leaf with that many axes is with us; a table of embeddings is no kernel.
_LEAVES = {
    ("weight", 1): "scale",
    ("weight", 2): "kernel",
    ("weight", 4): "kernel",
    ("bias", 1): "bias",
}


class Checkpoint(NamedTuple):
    """An adapter checkpoint.

    Attributes:
      adapters: From module path to `Factors(a [d_in, r], b [r, d_out])`: paths of our backbone, or
        torch's module names if none was given.
      scale: The factor s of all of them.
      saved: Parameters that were trained as a whole (`modules_to_save`): a part of our backbone's
        parameters for `lora.join_head`, or from torch's names to arrays if none was given.
      config: The content of `adapter_config.json`.
    """

    adapters: Adapters
    scale: float
    saved: dict[str, Any]
    config: dict[str, Any]


def load(
    source: PathLike, model: nn.Module | None = None, *, dtype: DTypeLike = jnp.float32
) -> Checkpoint:
    """Reads an adapter checkpoint.

    Args:
      source: Its directory, or its name on the hub (extra `hub`).
      model: The backbone that it is for, one of ours; None for a bare tree with torch's names.
      dtype: Storage type of the factors.

    Raises:
      FileNotFoundError: If a file is not there.
      ValueError: If it is not a LoRA checkpoint, uses a variant that is not LoRA (DoRA, embedding
        adapters, convolutions, trained biases), belongs to weights that PEFT changed (PiSSA, OLoRA,
        ...), or does not belong to the backbone; it names what does not fit. If the backbone has
        one table for embeddings and head, and the adapter two.
    """
    directory = pretrained.locate(source)
    config = read_config(directory)
    file = directory / WEIGHTS_FILE
    stored = open_tensors(file if file.is_file() else directory)
    pairs, others = _sorted_out(stored)
    scale = _scale(config, config["lora_alpha"], config["r"])
    adapters = {}
    for name, (lora_a, lora_b) in pairs.items():
        a, b = lora_a.read(dtype).T, lora_b.read(dtype).T
        ratio = module_scale(config, name, a.shape[1]) / scale
        adapters[name] = Factors(jnp.asarray(a), jnp.asarray(b if ratio == 1 else b * ratio))
    saved = {name: jnp.asarray(tensor.read(dtype)) for name, tensor in others.items()}
    if model is None:
        return Checkpoint(adapters, scale, saved, config)
    form = _format(model, [*adapters, *saved])
    saved = _head_to_ours(form, saved)
    if getattr(model, "tied", False):
        saved = _without_tied_head(directory, saved)
    return Checkpoint(_to_ours(form, adapters), scale, saved, config)


def read_config(directory: PathLike) -> dict[str, Any]:
    """The content of `adapter_config.json`, checked to be LoRA as we know it."""
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no adapter checkpoint: there is no {CONFIG_FILE}")
    config = read_object(path, "a configuration of PEFT")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, not 'LORA'")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if used:
        raise ValueError(f"{path}: {', '.join(used)} is set; only plain LoRA can be read")
    if (bias := config.get("bias") or "none") != "none":
        raise ValueError(
            f"{path}: bias is {bias!r}, so biases of the backbone were trained as well; only plain "
            "LoRA, with 'none', can be read"
        )
    _check_start(path, config.get("init_lora_weights", True))
    with reading(path, "a configuration of LoRA"):
        _check_numbers(config)
    return config


def _check_start(path: Path, start: Any) -> None:
    """Checks that the adapter belongs to the backbone's own weights."""
    name = start.lower() if isinstance(start, str) else start
    if name in _UNTOUCHED:
        return
    hint = ""
    if str(name).startswith(_CONVERTIBLE):
        hint = (
            ". Save it as plain LoRA: `save_pretrained(directory, "
            "path_initial_model_for_weight_conversion=...)`, with the adapter as it began"
        )
    raise ValueError(
        f"{path}: init_lora_weights is {start!r}, an adapter of weights that PEFT makes of the "
        f"backbone's, not of its own{hint}"
    )


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Checks rank and alphas, which make the scale."""
    missing = [name for name in ("r", "lora_alpha") if name not in config]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    bounds.check("adapters", r=config["r"], lora_alpha=config["lora_alpha"])
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        lora.compile_patterns(pattern)
        bounds.check("adapters", lora_alpha=alpha)


def module_scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """PEFT's own scale of one module of that rank."""
    patterns = config.get("alpha_pattern") or {}
    found = (p for p in patterns if re.match(rf"(.*\.)?({p})$", name))
    return _scale(config, patterns.get(next(found, None), config["lora_alpha"]), rank)


def _scale(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _sorted_out(
    stored: Mapping[str, StoredTensor],
) -> tuple[dict[str, tuple[StoredTensor, StoredTensor]], dict[str, StoredTensor]]:
    """The two factors of each adapted module, and all other tensors, by torch's names."""
    sides: dict[str, dict[str, StoredTensor]] = {}
    others = {}
    for full_name, tensor in stored.items():
        name = full_name.removeprefix(_ROOT)
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name):
            if len(tensor.shape) != 2 or not min(tensor.shape):
                raise ValueError(
                    f"{full_name} {list(tensor.shape)}: only linear layers can be read"
                )
            if not jnp.issubdtype(tensor.dtype, jnp.floating):
                raise ValueError(
                    f"{full_name} is of {tensor.dtype.name}: quantised factors cannot be read, for "
                    "nothing says by what they are to be multiplied"
                )
            sides.setdefault(match[1], {})[match[2]] = tensor
        elif "lora_" in name:
            raise ValueError(f"{full_name}: only plain LoRA on linear layers can be read")
        else:
            others[name] = tensor
    for name, pair in sides.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = {f"lora_{side}": list(tensor.shape) for side, tensor in pair.items()}
            raise ValueError(
                f"{name}: lora_A [r, d_in] and lora_B [d_out, r] expected, got {shapes}"
            )
    if not sides:
        raise ValueError("there is no adapter among the tensors")
    others = {_without_base_layer(name, sides): tensor for name, tensor in others.items()}
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}, others


def _without_base_layer(name: str, adapted: Container[str]) -> str:
    """The parameter's own name: PEFT saves an adapted head as `lm_head.base_layer.weight`."""
    module, _, leaf = name.rpartition(".")
    layer = module.removesuffix(".base_layer")
    return f"{layer}.{leaf}" if layer in adapted else name


def _format(model: nn.Module, names: list[str]) -> Format:
    """The torch names of the backbone under which most of `names` are known."""
    candidates = [form for form in naming.formats(model) if form.torch]
    candidates += [naming.bare(form) for form in candidates if form.prefix]
    modules = [name.removesuffix(".weight").removesuffix(".bias") for name in names]

    def known(form: Format) -> int:
        return sum(bool(naming.to_ours(form, module)) for module in modules)

    best = max(candidates, key=known)
    unknown = [m for m in modules if not naming.to_ours(best, m)]
    if unknown:
        raise ValueError(
            f"the adapter is for another model: {type(model).__name__} ({best.name}) has no "
            f"{', '.join(unknown[:4])}" + (", ..." if len(unknown) > 4 else "")
        )
    return best


def _to_ours(form: Format, adapters: Adapters) -> Adapters:
    """With paths of ours; the `b` of a layer that we hold in parts (timm's qkv) is split."""
    result = {}
    for name, factors in adapters.items():
        for row in naming.to_ours(form, name):
            b = factors.b
            if row.part:
                b = jnp.split(b, row.part[1], axis=1)[row.part[0]]
            result[row.ours] = Factors(factors.a, b)
    return result


def _head_to_ours(form: Format, saved: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in saved.items():
        if found := naming.to_ours(form, name):
            flat[found[0].ours] = value
            continue
        module, _, leaf = name.rpartition(".")
        rows = naming.to_ours(form, module)
        if len(rows) != 1 or (leaf, value.ndim) not in _LEAVES:
            raise ValueError(f"saved parameter {name!r} {list(value.shape)} cannot be read")
        path, leaf = rows[0].ours, _LEAVES[leaf, value.ndim]
        if value.ndim == 2 and path.endswith("embedding"):
            leaf = "embedding"
        elif leaf == "kernel":
            value = value.transpose(naming.KERNEL_AXES[value.ndim])
        flat[f"{path}/{leaf}"] = value
    return traverse_util.unflatten_dict(flat, sep="/")


def _with_base_layer(name: str, adapted: Container[str]) -> str:
    """The parameter's name where PEFT wraps its layer in an adapter."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}" if module in adapted else name


def _with_tied_head(model: nn.Module, head: Params) -> Params:
    """The head beside embeddings that are one table with it: PEFT trains one alone otherwise."""
    if not getattr(model, "tied", False) or "embedding" not in head:
        return head
    return {**head, "head": {"kernel": head["embedding"]["embedding"].T}}


def _without_tied_head(directory: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Parameters for a backbone whose head is its embeddings, too: PEFT saves them as two."""
    head = saved.get("head", {}).get("kernel")
    table = saved.get("embedding", {}).get("embedding")
    if head is None and table is None:
        return saved
    if head is None or table is None or not np.array_equal(head.T, table):
        raise ValueError(
            f"{directory}: the backbone has one table for both embeddings and head "
            "(tie_word_embeddings), of which the adapter makes two; "
            "fedlora_jax.interop.checkpoints.merge writes the backbone with both"
        )
    return {name: value for name, value in saved.items() if name != "head"}


def save(
    directory: PathLike,
    adapters: Adapters,
    *,
    scale: float,
    model: nn.Module | None = None,
    head: Params | None = None,
    config: Mapping[str, Any] | None = None,
    names: str | None = None,
) -> None:
    """Writes adapters as a checkpoint that PEFT loads.

    Args:
      directory: Made if it is not there.
      adapters: From module path to `Factors`, of any ranks.
      scale: The factor s.
      model: The backbone whose paths they have; None if they have torch's module names.
      head: Parameters trained as a whole, a part of the backbone's (`lora.split_head`); None for
        none. With torch's names: a flat dict of arrays in torch's layout. Embeddings that are the
        model's head as well are written as both.
      config: Entries of `adapter_config.json` to be taken over, e.g. `base_model_name_or_path`,
        `task_type`, or all of a checkpoint that was loaded. Ranks, scales, targets, saved modules
        and `init_lora_weights` are set here.
      names: The name of the format to write; by default the first that `naming.formats`
        has for the model, without its prefix if the model has no head.

    Raises:
      ValueError: If a path has no name of its own in the format, there are no adapters, or the
        scale is out of its bounds.
    """
    bounds.check("adapters", scale=scale)
    if not adapters:
        raise ValueError("there are no adapters to write")
    head = head or {}
    if model is not None:
        form = _format_to_write(model, names)
        adapters = {_their_name(form, path): factors for path, factors in adapters.items()}
        head = _head_to_theirs(form, _with_tied_head(model, head))
    saved = _modules(head) - adapters.keys()
    if model is None:
        whole = set((config or {}).get("modules_to_save") or saved)
    else:
        whole = _whole_modules(form, saved)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, factors in adapters.items():
        tensors[f"{_ROOT}{name}.lora_A.weight"] = np.asarray(factors.a).T
        tensors[f"{_ROOT}{name}.lora_B.weight"] = np.asarray(factors.b).T
    for name, value in head.items():
        tensors[f"{_ROOT}{_with_base_layer(name, adapters)}"] = np.asarray(value)
    write_safetensors(directory / WEIGHTS_FILE, tensors)
    written = {**(config or {}), **_settings(adapters, float(scale), config or {})}
    written["modules_to_save"] = sorted(whole) if saved else None
    (directory / CONFIG_FILE).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def _settings(adapters: Adapters, scale: float, config: Mapping[str, Any]) -> dict[str, Any]:
    """Ranks and alphas under which every module has that scale."""
    ranks = {name: factors.rank for name, factors in adapters.items()}
    usual = max(ranks.values(), key=lambda rank: list(ranks.values()).count(rank))

    def alpha(rank: int) -> float:
        value = scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
        return round(value) if math.isclose(value, round(value)) else value

    # Anchored, or the name of a layer would also match those that end in it.
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": alpha(usual),
        "rank_pattern": others,
        "alpha_pattern": {name: alpha(rank) for name, rank in others.items()},
        "target_modules": sorted(ranks),
        "inference_mode": True,
        # They have begun, and other ways to begin are refused at some ranks.
        "init_lora_weights": True,
    }


def _format_to_write(model: nn.Module, names: str | None) -> Format:
    candidates = [form for form in naming.formats(model) if form.torch]
    if names is None:
        first = candidates[0]
        headless = getattr(model, "num_classes", 0) is None
        return naming.bare(first) if headless else first
    candidates += [naming.bare(form) for form in candidates if form.prefix]
    return lookup({form.name: form for form in candidates}, names, "format")


def _their_name(form: Format, path: str) -> str:
    row = naming.to_theirs(form, path)
    if row is None or row.part:
        reason = "is a part of a larger layer" if row else "has no name"
        raise ValueError(f"{path!r} {reason} in {form.name}; choose another format by `names`")
    return row.theirs


def _modules(tensors: Mapping[str, Any]) -> set[str]:
    return {name.rpartition(".")[0] for name in tensors}


def _whole_modules(form: Format, modules: set[str]) -> set[str]:
    """The modules; all children of `classifier`, or its like, are replaced by itself."""
    result = set(modules)
    for parent in {name.rpartition(".")[0] for name in modules} - {""}:
        children = {row.theirs for row in form.rows if row.theirs.startswith(f"{parent}.")}
        if children and children <= modules:
            result = result - children | {parent}
    return result


def _head_to_theirs(form: Format, head: Params) -> dict[str, np.ndarray]:
    tensors = {}
    for path, value in traverse_util.flatten_dict(dict(head), sep="/").items():
        if naming.to_theirs(form, path):
            raise ValueError(f"{path!r} has no module of its own, and PEFT saves modules")
        module, _, leaf = path.rpartition("/")
        value = np.asarray(value)
        if leaf == "kernel":
            value = value.transpose(np.argsort(naming.KERNEL_AXES[value.ndim]))
        tensors[f"{_their_name(form, module)}.{naming.TORCH_LEAVES[leaf]}"] = value
    return tensors
