"""What all runs of a comparison share: data, model and pretrained parameters, by configuration."""

import functools
import hashlib
import inspect
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fedlora_jax import methods, models
from fedlora_jax.data import image_folder, images, partition, python_docs, sources
from fedlora_jax.data.stored import Stored
from fedlora_jax.experiment import hosts, texts
from fedlora_jax.federated.task import (
    Batch,
    Task,
    causal_language_model,
    classification,
    regression,
)
from fedlora_jax.lora import Params
from fedlora_jax.models import pretrain, pretrained
from fedlora_jax.names import lookup

_SOURCE_OPTIONS = ("size", "classes", "on_bad_record")
_PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Setting(NamedTuple):
    """What all runs of a comparison share.

    Attributes:
      task: The model, what it reads, and the loss.
      params: Pretrained parameters, in the host's memory: devices hold those of the run that is on,
        each what the mesh gives it.
      train: Training examples of all clients, dict of arrays `[M, ...]`; without the images where
        these stay in their files.
      test: Held-out examples.
      domains: The names of the domains; one called `all` for a data set without domains.
      stored: The training examples if their images stay in their files, else None.
    """

    task: Task
    params: Params
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    domains: tuple[str, ...]
    stored: Stored | None = None


def prepare(config: ml_collections.ConfigDict) -> Setting:
    """Reads the data and the pretrained backbone, which is made and kept on first use.

    Raises:
      ValueError: If data and configuration do not fit each other, such as labels that the model
        has no class for, or a cohort of more clients than there are; before anything is trained.
    """
    model = _model(config)
    if config.data.name in texts.SOURCES:
        texts.check(config, model)
    stored = _stored(config) if is_streamed(config) else None
    train, domains = _training_examples(config, stored)
    test = _examples(_load(config, config.data.splits.test)[0])
    for split, examples in ((config.data.splits.train, train), (config.data.splits.test, test)):
        _check_values(config, model, split, examples)
    _check_domains(config, train, test, domains)
    _check_num_clients(config, train)
    inputs = _tokens if "tokens" in train else _images(config)
    first = {key: x[:1] for key, x in train.items()}
    if stored is not None:
        first["image"] = stored.image(0)[None]
    params = _backbone(config, model, inputs(jax.tree.map(jnp.asarray, first)))
    task = _task(config, model.clone(dtype=dtype_of(config.precision.compute)), inputs)
    # A run of earlier times has no such switch.
    task = task._replace(loop=config.model.get("loop", False))
    return Setting(task, params, train, test, domains, stored)


def prepare_on_all_hosts(config: ml_collections.ConfigDict) -> Setting:
    """`prepare` on each of several hosts; the first one alone makes what is not there yet.

    Raises:
      ValueError: As `prepare`, on all hosts if on one; or if hosts differ in settings, data or
        backbone.
    """
    with hosts.all_or_none(), hosts.first_before_others("prepared"):
        setting = prepare(config)
    hosts.check_same(_alike(config, setting))
    return setting


def _alike(config: ml_collections.ConfigDict, setting: Setting) -> dict[str, int]:
    """What hosts may not differ in, as checksums; nothing is computed for one host."""
    if not hosts.are_several():
        return {}
    settings = np.frombuffer(config.to_json_best_effort(sort_keys=True).encode(), np.uint8)
    parts = {"settings": settings, "training data": setting.train, "held-out data": setting.test}
    return {name: _checksum(tree) for name, tree in {**parts, "backbone": setting.params}.items()}


def _checksum(tree: Any) -> int:
    arrays = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in jax.tree.leaves(tree))
    return functools.reduce(lambda before, x: zlib.crc32(x.data, before), arrays, 0)


def _check_values(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    split: str,
    examples: dict[str, np.ndarray],
) -> None:
    """Raises ValueError on numbers that are not finite, and labels that are no class."""

    def refuse(name: str, wrong: np.ndarray, why: str) -> None:
        if wrong.any():
            first = int(wrong.argmax())
            raise ValueError(
                f"{name!r} of example {first} of the split {split!r}, and of {wrong.sum() - 1} "
                f"more, {why}"
            )

    for name, values in examples.items():
        if np.issubdtype(values.dtype, np.floating):
            sums = values.reshape(len(values), -1).astype(np.float64).sum(1)
            refuse(name, ~np.isfinite(sums), "is not finite")
    classes = getattr(model, "num_classes", None)
    if config.task == "classification" and classes is not None and "label" in examples:
        labels = examples["label"]
        why = f"is no class 0 to {classes - 1}: config.model.options.num_classes is {classes}"
        refuse("label", (labels < 0) | (labels >= classes), why)


def _check_num_clients(config: ml_collections.ConfigDict, train: dict[str, np.ndarray]) -> None:
    """Raises ValueError if a round wants more clients than there are, where options say how many.

    Nothing is drawn: a run that is read back has its partition, and may lack the file it is of.
    """
    options, kind = config.data.partition_options, methods.get(config.method)
    if kind(**config.options[config.method]).pooled:
        return
    wanted = inspect.signature(partition.get(config.data.partition)).parameters
    if "labels" in wanted and not is_labelled(train):
        return  # Nothing comes of it at all, as is said when it is drawn.
    if "clients_per_domain" in options:
        check_cohort(config, options.clients_per_domain * len(np.unique(train["domain"])))
    elif "num_clients" in options:
        check_cohort(config, options.num_clients)


def check_cohort(config: ml_collections.ConfigDict, num_clients: int) -> None:
    """Raises ValueError if a round wants more clients than the partition makes."""
    if config.clients_per_round > num_clients:
        raise ValueError(
            f"config.clients_per_round is {config.clients_per_round}, but the partition "
            f"{config.data.partition!r} makes only {num_clients} clients"
        )


def _check_domains(
    config: ml_collections.ConfigDict,
    train: dict[str, np.ndarray],
    test: dict[str, np.ndarray],
    domains: tuple[str, ...],
) -> None:
    """Raises ValueError if clients have a domain on which nothing can be judged, or no name."""
    for examples in (train, test):
        if (last := int(examples["domain"].max())) >= len(domains):
            raise ValueError(
                f"config.data.name={config.data.name!r} has {len(domains)} names of domains, but "
                f"there is an example of domain {last}: the data set is damaged"
            )
    missing = np.setdiff1d(train["domain"], test["domain"]).tolist()
    if missing:
        raise ValueError(
            f"the split {config.data.splits.test!r}, on which models are judged, has no example of "
            f"the domain {', '.join(domains[place] for place in missing)}, of which clients have; "
            "hold out more, or leave that domain out of the data"
        )


def training_examples(
    config: ml_collections.ConfigDict,
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Reads the training examples of all clients and the names of the domains; needs no model.

    Images are left out if they are streamed.
    """
    return _training_examples(config, _stored(config) if is_streamed(config) else None)


def is_streamed(config: ml_collections.ConfigDict) -> bool:
    """Whether training images stay in their files until a round needs them."""
    return config.data.get("streaming", False)


def _training_examples(
    config: ml_collections.ConfigDict, stored: Stored | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    if stored is None:
        train, domains = _load(config, config.data.splits.train)
    else:
        train, domains = stored.columns, _domains(config, stored.columns)
    return _examples(train), domains or ("all",)


def _stored(config: ml_collections.ConfigDict) -> Stored:
    """The training examples, with images that stay in their files.

    Raises:
      ValueError: If the data set has no image files, or bad ones are to be skipped.
    """
    data = config.data
    if data.name in (*texts.SOURCES, "python_docs"):
        raise ValueError(
            f"config.data.streaming is for images; the texts of {data.name!r} are held in memory"
        )
    if data.on_bad_record != "stop":
        raise ValueError(
            f"config.data.on_bad_record is {data.on_bad_record!r}, but with config.data.streaming "
            "a file that is no image is found too late to be left out; set it to 'stop'"
        )
    split = data.splits.train
    if data.name == "image_folder":
        return image_folder.stored(split, data.root, size=data.size, held_out=data.held_out)
    options = {key: data[key] for key in ("size", "classes") if key in data}
    return sources.stored(data.name, split, **options)


def _domains(config: ml_collections.ConfigDict, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    """The names of the domains of images, if there are any."""
    if "domain" not in arrays:
        return ()
    if config.data.name == "image_folder":
        return tuple(image_folder.class_names(config.data.root, "domain"))
    return tuple(sources.class_names(config.data.name, "domain"))


def full_name(config: ml_collections.ConfigDict) -> str:
    """The name of the data set, with its version where it has one."""
    name = config.data.get("dataset", config.data.name)
    if name in (*texts.SOURCES, "python_docs", "image_folder"):
        return name
    return sources.full_name(name)


def _task(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    inputs: Callable[[Batch], tuple[jax.Array, ...]],
) -> Task:
    if config.task == "causal_lm":
        return causal_language_model(model, config.metrics)
    makers = {"classification": classification, "regression": regression}
    return lookup(makers, config.task, "task")(model, inputs, config.metrics)


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


def _load(
    config: ml_collections.ConfigDict, split: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The examples of a split, and the names of the domains, if there are any."""
    data = config.data
    if data.name in texts.SOURCES:
        found = texts.load(config, split)
        return found.arrays, found.domains
    if data.name == "python_docs":
        return python_docs.load(split, pretrained.locate(data.tokenizer), data.length), ()
    if data.name == "image_folder":
        arrays = image_folder.load(
            split,
            data.root,
            size=data.size,
            held_out=data.held_out,
            on_bad_record=data.on_bad_record,
        )
        return arrays, _domains(config, arrays)
    options = {key: data[key] for key in _SOURCE_OPTIONS if key in data}
    arrays = sources.load(data.name, split, **options)
    return arrays, _domains(config, arrays)


def _backbone(
    config: ml_collections.ConfigDict, model: nn.Module, inputs: tuple[jax.Array, ...]
) -> Params:
    """Parameters read from `config.pretrained`, or made as `config.pretraining` says."""
    storage = dtype_of(config.precision.storage)
    if "pretrained" in config:
        wanted, key = config.pretrained, jax.random.key(0)
        return pretrained.load(
            model,
            wanted.source,
            *inputs,
            new=wanted.new or None,
            key=key,
            dtype=storage,
            on_host=True,
        )
    examples = _load(config, config.pretraining.split)[0]
    _check_values(config, model, config.pretraining.split, examples)
    made = pretrain.cached(
        _backbone_path(config),
        model,
        examples,
        statistics=config.data.statistics,
        **config.pretraining.options,
    )
    return jax.device_get(jax.tree.map(lambda x: x.astype(storage), made))


def _backbone_path(config: ml_collections.ConfigDict) -> Path:
    """A directory whose name changes with all that the backbone is made from."""
    if config.data.name == "image_folder":
        data = {**config.data.to_dict(), "root": image_folder.digest(config.data.root)}
        data.pop("streaming", None)
    else:
        options = {key: config.data.get(key) for key in (*_SOURCE_OPTIONS, "statistics")}
        data = {"name": sources.full_name(config.data.name), **options}
    recipe = [data, config.model.to_dict(), config.pretraining.to_dict()]
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=list).encode())
    return Path(config.backbone_dir) / f"{config.model.name}-{digest.hexdigest()[:12]}"


def _examples(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What training needs of a split; a data set without domains has one."""
    count = len(next(iter(arrays.values())))
    wanted = ("image", "tokens", "token_types", "answer", "label", "domain", "client")
    return {"domain": np.zeros(count, np.int32)} | {
        name: arrays[name] for name in wanted if name in arrays
    }


def is_labelled(examples: dict[str, np.ndarray]) -> bool:
    """Whether the examples are of classes."""
    return "label" in examples and np.issubdtype(examples["label"].dtype, np.integer)


def _tokens(batch: Batch) -> tuple[Any, ...]:
    """Tokens, which mask their padding; and which text of a pair each is of, where it is told."""
    if "token_types" in batch:
        return batch["tokens"], None, batch["token_types"]
    return (batch["tokens"],)


def _images(config: ml_collections.ConfigDict) -> Callable[[Batch], tuple[jax.Array]]:
    normalize = functools.partial(images.normalize, statistics=config.data.statistics)
    return lambda batch: (normalize(batch["image"]),)
