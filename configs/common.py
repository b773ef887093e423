"""What the configurations share: their argument string, and the options of the methods."""

import difflib
import inspect
from typing import Any, get_args

import ml_collections

from fedlora_jax import methods


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
    """Parses the part after the colon of `--config=configs/NAME.py:key=value,flag,...`.

    A value gets the type of its default; a key alone means True.

    Args:
      arg: The argument string, or None.
      **defaults: The keys there are.

    Raises:
      ValueError: On an unknown key (with the nearest one), or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            nearest = difflib.get_close_matches(key, defaults, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(
                f"unknown config argument {key!r}.{hint} Arguments: {', '.join(sorted(defaults))}"
            )
        kind = type(defaults[key])
        if kind is bool:
            if text.lower() not in ("", "true", "false", "1", "0"):
                raise ValueError(f"config argument {key!r}: expected a truth value, got {text!r}")
            values[key] = text.lower() in ("", "true", "1")
            continue
        try:
            values[key] = kind(text)
        except ValueError:
            raise ValueError(
                f"config argument {key!r}: expected a value of type {kind.__name__}, got {text!r}"
            ) from None
    return values


def method_options(rounds: int) -> ml_collections.ConfigDict:
    """The hyperparameters of every method with their defaults: `config.options.<method>.<name>`."""
    options = {
        name: {key: _option(p) for key, p in methods.hyperparameters(name).items()}
        for name in sorted(methods.REGISTRY)
    }
    options["fedsmooth_lora"]["rounds"] = rounds
    return ml_collections.ConfigDict(options)


def _option(parameter: inspect.Parameter) -> Any:
    """The default; where that is None, with a type, without which no command line can set it."""
    if parameter.default is not None:
        return parameter.default
    kind, _ = get_args(parameter.annotation)
    return ml_collections.config_dict.placeholder(kind)


def add_task(config: ml_collections.ConfigDict, task: str, *metrics: str) -> None:
    """Adds what is learned, and how it is judged.

    Args:
      config: To be added to.
      task: classification, regression or causal_lm.
      *metrics: How it is judged, the headline first.
    """
    config.task = task
    config.metrics = metrics
    config.evaluation_batch_size = 256
    # Most clients whose personal models are judged, and of which each one's score is written; of
    # more a sample by the seed, the same for all methods.
    config.judged_clients = 128
    # Rounds from one evaluation, and from one checkpoint, to the next; the last round has both.
    config.evaluate_every = 1
    config.checkpoint_every = 1


def add_combinations(config: ml_collections.ConfigDict) -> None:
    """Adds what methods can be combined with, all of it off."""
    config.precision = ml_collections.ConfigDict()
    config.precision.compute = "float32"  # or "bfloat16": the arithmetic of the model
    config.precision.storage = "float32"  # or "bfloat16": the frozen backbone

    # Describe the clients' updates of each round, which takes their singular values.
    config.diagnostics = False
    config.weights = "examples"  # or "equal"
    # How many clients train at once, on each device: "auto", the fastest number that fits the
    # memory; "all"; or "4"
    config.clients_per_chunk = "auto"

    # Go through the model's blocks in a loop: compiled sooner where they are many, for the memory
    # of one more backbone.
    config.model.loop = False

    config.mesh = ml_collections.ConfigDict()
    config.mesh.clients = 1  # devices that a cohort is spread over
    config.mesh.model = 1  # devices that one backbone is spread over

    # "equal" to lora.rank, "uniform", "heavy_tail_light", "heavy_tail_strong", or a list "4,2,1"
    config.lora.ranks = "equal"
    config.local.epochs = 0  # passes over a client's data a round, instead of local.steps
    config.local.proximal = 0.0  # mu of FedProx
    config.local.scaffold = False

    config.server = ml_collections.ConfigDict()
    config.server.optimizer = "none"  # or fedavgm, fedadam, fedyogi, fedadagrad
    config.server.learning_rate = 1.0
    config.server.momentum = 0.9
    config.server.second_moment = 0.99  # of fedadam and fedyogi
    config.server.adaptivity = 1e-3  # tau of the adaptive ones
    # Of the whole model, in the space of products; 1 and no momentum: the method as it is.
    config.server.step = 1.0
    config.server.step_momentum = 0.0
    config.server.step_rank = 0  # of what carries the momentum; 0: lora.rank

    config.privacy = ml_collections.ConfigDict()
    config.privacy.clip = 0.0  # largest norm of a client's change; 0: no privacy
    config.privacy.noise_multiplier = 1.0
    config.privacy.delta = 1e-5

    # Clients that fail or attack: dropout, crash, nan, huge, zeros, sign_flip
    config.faults = ml_collections.ConfigDict()
    config.faults.kind = "none"
    config.faults.share = 0.2  # of each round's cohort
    config.faults.factor = 1.0  # of sign_flip, and of huge times a million

    # Against them: norm_clip, median, trimmed_mean, krum, multi_krum, geometric_median
    config.robust = ml_collections.ConfigDict()
    config.robust.rule = "none"
    config.robust.norm = 0.0  # largest of a change, of norm_clip; 0: the median of the cohort's
    # Share of a cohort that may be hostile, of trimmed_mean, krum and multi_krum
    config.robust.byzantine = 0.2
