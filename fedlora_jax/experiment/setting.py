"""What all runs of a comparison share: data, model and pretrained parameters, by configuration."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fedlora_jax import models
from fedlora_jax.data import images, partition, python_docs, sources
from fedlora_jax.experiment import texts
from fedlora_jax.federated.task import Batch, Task, classification
from fedlora_jax.lora import Params
from fedlora_jax.models import pretrain, pretrained
from fedlora_jax.names import lookup

_PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Setting(NamedTuple):
    """What all runs of a comparison share.

    Attributes:
      task: The model, what it reads, and the loss.
      params: Pretrained parameters.
      train: Training examples of all clients, dict of arrays `[M, ...]`.
      test: Held-out examples.
      domains: The names of the domains; one called `all` for a data set without domains.
    """

    task: Task
    params: Params
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    domains: tuple[str, ...]


def prepare(config: ml_collections.ConfigDict) -> Setting:
    """Reads the data and the pretrained backbone, which is made and kept on first use."""
    model = _model(config)
    if config.data.name in texts.SOURCES:
        texts.check(config, model)
    train, test = (_load(config, config.data.splits[part]) for part in ("train", "test"))
    domains = _domain_names(config) if "domain" in train else ("all",)
    inputs = _tokens if "tokens" in train else _images
    params = _backbone(config, model, inputs({key: jnp.asarray(x[:1]) for key, x in train.items()}))
    model = model.clone(dtype=dtype_of(config.precision.compute))
    return Setting(
        classification(model, inputs), params, _examples(train), _examples(test), domains
    )


def dtype_of(name: str) -> np.dtype:
    """The type called `name` in `config.precision`.

    Raises:
      ValueError: If it is neither float32 nor bfloat16.
    """
    return jnp.dtype(lookup(_PRECISIONS, name, "precision"))


def _model(config: ml_collections.ConfigDict) -> nn.Module:
    """A backbone by name; one called `pretrained` is what the pretrained files describe."""
    if config.model.name == "pretrained":
        return pretrained.model_of(config.pretrained.source, **config.model.options)
    return models.get(config.model.name, **config.model.options)


def _domain_names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    if config.data.name in texts.SOURCES:
        return texts.domain_names(config)
    return tuple(sources.class_names(config.data.name, "domain"))


def _load(config: ml_collections.ConfigDict, split: str) -> dict[str, np.ndarray]:
    if config.data.name == "python_docs":
        return python_docs.load(split, pretrained.locate(config.data.tokenizer), config.data.length)
    if config.data.name in texts.SOURCES:
        return texts.load(config, split).arrays
    return sources.load(config.data.name, split)


def _backbone(
    config: ml_collections.ConfigDict, model: nn.Module, inputs: tuple[jax.Array, ...]
) -> Params:
    """Parameters read from `config.pretrained`, or made as `config.pretraining` says."""
    storage = dtype_of(config.precision.storage)
    if "pretrained" in config:
        wanted, key = config.pretrained, jax.random.key(0)
        return pretrained.load(
            model, wanted.source, *inputs, new=wanted.new, key=key, dtype=storage
        )
    made = pretrain.cached(
        _backbone_path(config),
        model,
        sources.load(config.data.name, config.pretraining.split),
        **config.pretraining.options,
    )
    return jax.tree.map(lambda x: x.astype(storage), made)


def _backbone_path(config: ml_collections.ConfigDict) -> Path:
    """A directory whose name changes with all that the backbone is made from."""
    data = sources.full_name(config.data.name)
    recipe = [data, config.model.to_dict(), config.pretraining.to_dict()]
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=list).encode())
    return Path(config.backbone_dir) / f"{config.model.name}-{digest.hexdigest()[:12]}"


def _examples(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What training needs of a split; a data set without domains has one."""
    one_domain = np.zeros(len(arrays["label"]), np.int32)
    kind = "tokens" if "tokens" in arrays else "image"
    return {name: arrays.get(name, one_domain) for name in (kind, "label", "domain")}


def _tokens(batch: Batch) -> tuple[jax.Array]:
    return (batch["tokens"],)


def _images(batch: Batch) -> tuple[jax.Array]:
    return (images.normalize(batch["image"]),)


def partitioned(config: ml_collections.ConfigDict, setting: Setting, seed: int) -> list[np.ndarray]:
    """The positions of each client's training examples, as `config.data` says."""
    split = partition.get(config.data.partition)
    known = {
        "labels": setting.train["label"],
        "domains": setting.train["domain"],
        "num_examples": len(setting.train["label"]),
    }
    wanted = {name: known[name] for name in inspect.signature(split).parameters if name in known}
    return split(**wanted, seed=seed, **config.data.partition_options)


def partition_counts(config: ml_collections.ConfigDict, setting: Setting) -> np.ndarray:
    """How many examples each client has of each domain and label, `[N, D, L]`."""
    parts = partitioned(config, setting, config.seed)
    labels, domains = setting.train["label"], setting.train["domain"]
    counts = np.zeros((len(parts), len(setting.domains), int(labels.max()) + 1), int)
    for client, part in enumerate(parts):
        np.add.at(counts[client], (domains[part], labels[part]), 1)
    return counts
