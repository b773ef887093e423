"""What can be scored: a finished run, a model on disk, or that of a configuration."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from fedlora_jax import experiment, lora
from fedlora_jax.experiment import finished, records
from fedlora_jax.experiment.finished import Finished
from fedlora_jax.experiment.setting import dtype_of
from fedlora_jax.interop import peft
from fedlora_jax.lora import Adapters, Params
from fedlora_jax.methods import Trainable
from fedlora_jax.models import pretrained
from fedlora_jax.names import lookup


class Target(NamedTuple):
    """What is scored.

    Attributes:
      name: What it is, for the record; it changes with what the model would write.
      model: The model; None for a run whose method has none for all, where no client is chosen.
      params: Its parameters, head included.
      adapters: Its adapters; an empty dict for none.
      scale: Their factor s.
      tokenizer: Where its tokenizer is, as for `pretrained.read_language`; None if unknown.
      measure: Measures the metrics; None without data.
    """

    name: dict[str, Any]
    model: nn.Module | None
    params: Params
    adapters: Adapters
    scale: float | jax.Array
    tokenizer: str | None
    measure: Callable[[], dict[str, Any]] | None


class Adapter(NamedTuple):
    """An adapter on disk: `--adapter`, and `--scale` where it does not say its own."""

    source: str | None = None
    scale: float | None = None

    def read(
        self, model: nn.Module, params: Params, default: float | None = None
    ) -> tuple[Adapters, float, Params]:
        """Adapters, their scale, and parameters that were trained as a whole.

        Args:
          model: The backbone.
          params: Its parameters.
          default: The scale of an adapters.npz if none is given.

        Raises:
          ValueError: If it does not fit the model, or nothing says its scale.
          FileNotFoundError: If there is none.
        """
        saved: Params = {}
        if self.source is None:
            return {}, 1.0, saved
        if self.source.endswith(".npz"):
            scale = default if self.scale is None else self.scale
            if scale is None:
                raise ValueError(
                    f"{self.source} has no scale: give --scale, config.lora.scale of its run"
                )
            adapters, saved = records.load_trainable(Path(self.source))
            self._check_complete()
        else:
            if self.scale is not None:
                raise ValueError(f"--scale is for an adapters.npz; {self.source} has its own")
            adapters, scale, saved, _ = peft.load(self.source, model)
        self._check_fits(adapters, saved, params)
        return adapters, scale, saved

    def _check_complete(self) -> None:
        assert self.source is not None
        if merged := records.merged_layers(Path(self.source)):
            raise ValueError(
                f"{self.source} is half of what was trained: its run merged the other half into "
                f"{len(merged)} kernels of the backbone, such as that of {merged[0]}. Score the "
                "run instead, by --workdir"
            )

    def _check_fits(self, adapters: Adapters, saved: Params, params: Params) -> None:
        shapes = lora.kernel_shapes(params)
        for path, factors in adapters.items():
            shape = lookup(shapes, path, f"layer in {self.source}:")
            found = [factors.a.shape[0], factors.b.shape[1]]
            if found != [shape.d_in, shape.d_out]:
                raise ValueError(
                    f"{self.source} is for another model: its adapter of {path!r} is for a kernel "
                    f"{found}, the layer has {[shape.d_in, shape.d_out]}"
                )
        known = _by_path(params)
        for path, array in _by_path(saved).items():
            kept = lookup(known, path, f"parameter in {self.source}:")
            if array.shape != kept.shape:
                raise ValueError(
                    f"{self.source} is for another model: its {path!r} is {list(array.shape)}, the "
                    f"model's {list(kept.shape)}"
                )

    def check_head(self, head: Params, saved: Params) -> None:
        """Raises ValueError if the adapter lacks what was trained with it."""
        missing = sorted(_by_path(head).keys() - _by_path(saved).keys())
        if self.source is not None and missing:
            raise ValueError(
                f"{self.source} has no {', '.join(missing)}: by config.lora.head these are trained "
                "with the adapters, which are worth nothing beside untrained ones"
            )


def _by_path(params: Params) -> dict[str, jax.Array]:
    return traverse_util.flatten_dict(dict(params), sep="/")


def of_run(
    workdir: Path, split: str, client: int | None = None, metrics: Sequence[str] = ()
) -> Target:
    """The last state of a run.

    Args:
      workdir: Its work directory.
      split: On which metrics are measured.
      client: Whose own model writes; None for the model of all.
      metrics: Which are measured; those of the run if there are none.

    Raises:
      ValueError: If there is no such model, or as `finished.restore`.
      FileNotFoundError: If there is no finished round.
    """
    run = finished.restore(workdir, split, metrics)
    server, method = run.state.server, run.program.method
    trainable, count = server.trainable, len(run.state.ranks)
    if client is not None:
        if method.personal is None:
            raise ValueError(f"{run.config.method} keeps no models of clients' own")
        if not 0 <= client < count:
            raise ValueError(f"there is no client {client}: they are 0 to {count - 1}")
        own = jax.tree.map(lambda x: x[0], run.clients.read(np.array([client])))
        trainable = method.personal(server, own)
    name = {"workdir": str(workdir), "rounds": run.rounds, "client": client}
    target = _of_state(name, run, trainable)
    if client is None and not method.shared:
        # What the server holds was never trained.
        return target._replace(model=None, params={}, adapters={})
    return target


def of_config(
    config: ConfigDict, split: str, adapter: Adapter, metrics: Sequence[str] = ()
) -> Target:
    """The model of a configuration as it is, or with an adapter, and its data."""
    config = finished.judged_on(config, split, metrics)
    config.method = finished.LEAST
    experiment.check(config)
    run = finished.untrained(config, experiment.prepare(config))
    server = run.state.server
    params = lora.join_head(server.backbone, server.trainable.head)
    adapters, scale, saved = adapter.read(run.setting.task.model, params, config.lora.scale)
    adapter.check_head(server.trainable.head, saved)
    head = lora.join_head(server.trainable.head, saved)
    trainable = Trainable(adapters or server.trainable.adapters, head)
    server = server._replace(trainable=trainable, scale=jnp.float32(scale))
    state = run.state._replace(server=server)
    made = config.to_json_best_effort().encode()
    name = {"config": hashlib.sha256(made).hexdigest()[:16], "adapter": adapter.source}
    return _of_state(name, run._replace(state=state), trainable)


def _of_state(name: dict[str, Any], run: Finished, trainable: Trainable) -> Target:
    server, config = run.state.server, run.config
    source = config.pretrained.source if "pretrained" in config else None
    return Target(
        {**name, "adapters": digest(trainable.adapters)},
        run.setting.task.model,
        lora.join_head(server.backbone, trainable.head),
        trainable.adapters,
        server.scale,
        config.data.get("tokenizer", source),
        run.measure,
    )


def of_model(source: str, precision: str, adapter: Adapter) -> Target:
    """A pretrained model, with an adapter or without."""
    dtype = dtype_of(precision)
    model, params = pretrained.from_pretrained(source, dtype=dtype)
    model = model.clone(dtype=dtype)
    adapters, scale, saved = adapter.read(model, params)
    return Target(
        {
            "model": source,
            "precision": precision,
            "adapter": adapter.source,
            "adapters": digest(adapters),
            "scale": scale,
        },
        model,
        lora.join_head(params, saved),
        adapters,
        scale,
        source,
        None,
    )


def digest(adapters: Adapters) -> str:
    """Changes with the adapters."""
    made = hashlib.sha256()
    for path, factors in sorted(adapters.items()):
        for x in factors:
            made.update(path.encode() + np.asarray(x, np.float32).tobytes())
    return made.hexdigest()[:16]
