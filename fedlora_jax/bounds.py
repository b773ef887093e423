"""Which numbers make sense: one table for configurations, methods, partitioners and constructors.

A new option gets its line in `BOUNDS`, and is then checked wherever it is taken.
"""

import fnmatch
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Bound(NamedTuple):
    """What a number must be, or each of a tuple of them.

    Attributes:
      low: The least that it may be.
      high: The most that it may be.
      above: Whether it must be more than `low`.
      below: Whether it must be less than `high`.
      whole: Whether it must be an integer.
      optional: Whether it may be None.
      hint: What to do instead, for the message.
      several: How many there must be at least, of a tuple of such numbers; None for one number.
    """

    low: float = 0
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    optional: bool = False
    hint: str = ""
    several: int | None = None

    def __str__(self) -> str:
        if not self.above and not self.below and self.high < math.inf:
            return f"from {self.low} to {self.high}"
        text = f"above {self.low}" if self.above else f"at least {self.low}"
        if self.high < math.inf:
            text += f" and {'below' if self.below else 'at most'} {self.high}"
        return text

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value: `must be at least 1, got 0`; None if nothing is."""
        if self.several is not None:
            return self._fault_of_several(value)
        if isinstance(value, jax.core.Tracer) or (value is None and self.optional):
            return None
        if isinstance(value, np.ndarray | jax.Array) and value.ndim == 0:
            value = value.item()
        kind = numbers.Integral if self.whole else numbers.Real
        known = isinstance(value, kind) and not isinstance(value, bool)
        if not known or not math.isfinite(value):
            what = "a whole number" if self.whole else "a finite number"
            return f"must be {what}, {self}{' or None' * self.optional}, got {value!r}"
        too_low = value <= self.low if self.above else value < self.low
        too_high = value >= self.high if self.below else value > self.high
        return f"must be {self}, got {value}{self.hint}" if too_low or too_high else None

    def _fault_of_several(self, values: Any) -> str | None:
        least = self.several or 0
        if not isinstance(values, tuple | list) or len(values) < least:
            wanted = f"at least {least} number{'s' * (least != 1)}" if least else "numbers"
            return f"must be {wanted}, as a tuple, got {values!r}"
        one = self._replace(several=None)
        return next((fault for value in values if (fault := one.fault(value))), None)


_COUNT = Bound(1, whole=True)
_MAYBE_COUNT = Bound(1, whole=True, optional=True)
_ANY_COUNT = Bound(0, whole=True)
_POSITIVE = Bound(above=True)
_NOT_NEGATIVE = Bound()
_SHARE = Bound(0, 1, below=True)
_UP_TO_ALL = Bound(0, 1)
_MINORITY = Bound(0, 0.5, below=True, hint="; no rule holds against half of the clients")
_PROBABILITY = Bound(0, 1, above=True, below=True)
_SEED = Bound(0, 2**32 - 1, whole=True)
_SEEDS = _SEED._replace(several=1)
_DIALS = {
    "heterogeneity": _NOT_NEGATIVE,
    "clients": _COUNT,
    "rank": _COUNT,
    "local_steps": _COUNT,
    "momentum": _SHARE,
}
_PARTS = {"num_clients": _COUNT, "clients_per_domain": _COUNT, "min_examples": _COUNT}

BOUNDS: dict[str, dict[str, Bound]] = {
    "config": {
        "seed": _SEED,
        "rounds": _COUNT,
        "clients_per_round": _COUNT,
        "evaluation_batch_size": _COUNT,
        "judged_clients": _COUNT,
        "evaluate_every": _COUNT,
        "checkpoint_every": _COUNT,
        "data.length": _COUNT,
        "data.size": _COUNT,
        "data.rows.*": _ANY_COUNT,
        "data.windows_per_client.*": _ANY_COUNT,
        "data.windows_per_file.*": _ANY_COUNT,
        "data.held_out.*": _SHARE,
        "lora.rank": _COUNT,
        "lora.scale": _POSITIVE,
        "local.steps": _ANY_COUNT,
        "local.epochs": _ANY_COUNT,
        "local.batch_size": _COUNT,
        "local.learning_rate": _POSITIVE,
        "local.momentum": _SHARE,
        "local.weight_decay": _NOT_NEGATIVE,
        "local.clip_norm": _NOT_NEGATIVE,
        "local.proximal": _NOT_NEGATIVE,
        "server.learning_rate": _POSITIVE,
        "server.momentum": _SHARE,
        "server.second_moment": _SHARE,
        "server.adaptivity": _POSITIVE,
        "server.step": _POSITIVE,
        "server.step_momentum": _SHARE,
        "server.step_rank": _ANY_COUNT,
        "privacy.clip": _NOT_NEGATIVE,
        "privacy.noise_multiplier": _NOT_NEGATIVE,
        "privacy.delta": _PROBABILITY,
        "faults.share": _UP_TO_ALL,
        "faults.factor": _POSITIVE,
        "robust.norm": _NOT_NEGATIVE,
        "robust.byzantine": _MINORITY,
        "mesh.clients": _COUNT,
        "mesh.model": _COUNT,
        # Of `configs/linear.py`.
        "seeds": _COUNT,
        "tuning_seeds": _SEEDS,
        "confirming_seeds": _SEEDS._replace(several=0),
        "finalists": _COUNT,
        "runs_at_once": _COUNT,
        "learning_rates": _POSITIVE._replace(several=1),
        "server_steps": _POSITIVE._replace(several=1),
        "problem.inputs": _COUNT,
        "problem.outputs": _COUNT,
        "problem.examples": _COUNT,
        "problem.noise": _NOT_NEGATIVE,
        "problem.decay": _NOT_NEGATIVE,
        "problem.shift": _NOT_NEGATIVE,
        **{f"base.{dial}": bound for dial, bound in _DIALS.items()},
        **{f"dials.{dial}": bound._replace(several=0) for dial, bound in _DIALS.items()},
    },
    # Of `models.get`, and `config.model.options`.
    "model": {
        "num_classes": _MAYBE_COUNT,
        "patch_size": _COUNT,
        "width": _COUNT,
        "depth": _COUNT,
        "num_heads": _COUNT,
        "num_kv_heads": _COUNT,
        "mlp_dim": _MAYBE_COUNT,
        "token_mlp_dim": _MAYBE_COUNT,
        "channel_mlp_dim": _MAYBE_COUNT,
        "head_dim": _MAYBE_COUNT,
        "vocab_size": _COUNT,
        "num_positions": _COUNT,
        "num_token_types": _COUNT,
        # -1 is no token: nothing is padding.
        "pad_token": Bound(-1, whole=True),
        "context": _MAYBE_COUNT,
        "layer_norm_epsilon": _NOT_NEGATIVE,
        "norm_epsilon": _NOT_NEGATIVE,
        "rope_base": _POSITIVE,
        # Of `RopeScaling`.
        "factor": _POSITIVE,
        "low_frequency_factor": _POSITIVE,
        "high_frequency_factor": _POSITIVE,
        "original_context": _COUNT,
    },
    # Of `pretrain`, and `config.pretraining.options`.
    "pretrain": {
        "steps": _COUNT,
        "batch_size": _COUNT,
        "learning_rate": _POSITIVE,
        "seed": _SEED,
    },
    # Of `experiment.run`.
    "run": {"until": _MAYBE_COUNT},
    "training": {"steps": _ANY_COUNT, "epochs": _ANY_COUNT, "batch_size": _COUNT},
    # Of adapters: `lora.init`, and those of PEFT in and out.
    "adapters": {"rank": _COUNT, "scale": _POSITIVE, "r": _COUNT, "lora_alpha": _POSITIVE},
    # Methods and aggregation functions, and `config.options.METHOD`.
    "fedex_lora": {"rank": _MAYBE_COUNT},
    "fedrot_lora": {
        "strength": Bound(0, 1, hint="; what the authors' code does with more is reflections=True"),
    },
    "fedsmooth_lora": {
        "zeta": _NOT_NEGATIVE,
        "zeta_min": _NOT_NEGATIVE,
        "rounds": _MAYBE_COUNT,
        "gamma": _POSITIVE,
        "calibration_batches": _COUNT,
    },
    "flexlora": {"rank": _MAYBE_COUNT},
    "flora_na": {"sweeps": _ANY_COUNT},
    "hetlora": {"pruning": _NOT_NEGATIVE, "decay": Bound(0, 1, above=True)},
    "lora_fair": {
        "regularization": _NOT_NEGATIVE,
        "steps": _ANY_COUNT,
        "learning_rate": _POSITIVE,
    },
    "spectral": {"threshold": Bound(0, 1, above=True), "rank": _MAYBE_COUNT},
    # Transforms.
    "fedprox": {"mu": _NOT_NEGATIVE},
    "private": {
        "clip": _POSITIVE,
        "noise_multiplier": _NOT_NEGATIVE,
        "cohort_size": _MAYBE_COUNT,
    },
    "faults": {"share": _UP_TO_ALL, "factor": _POSITIVE},
    "robust": {"norm": Bound(above=True, optional=True), "byzantine": _MINORITY},
    "server_step": {"rate": _POSITIVE, "momentum": _SHARE, "rank": _MAYBE_COUNT},
    "epsilon": {
        "noise_multiplier": _NOT_NEGATIVE,
        "num_clients": _COUNT,
        "cohort_size": _COUNT,
        "rounds": _COUNT,
        "delta": _PROBABILITY,
    },
    # Partitioners, and `config.data.partition_options`.
    "by_domain": _PARTS,
    "dirichlet": {**_PARTS, "alpha": _POSITIVE},
    "domain_dirichlet": {**_PARTS, "alpha": _POSITIVE},
    "iid": _PARTS,
    "label_proportions": {"examples_per_client": _MAYBE_COUNT},
    "natural": _PARTS,
    "power_law": {**_PARTS, "exponent": _NOT_NEGATIVE},
    "quantity_skew": {**_PARTS, "alpha": _POSITIVE},
    "shards": {**_PARTS, "shards_per_client": _COUNT},
}


def check(owner: str, /, **values: Any) -> None:
    """Checks the numbers that a function is given; traced ones, and what has no bound, pass.

    Args:
      owner: What takes them, a key of `BOUNDS`.
      **values: By name.

    Raises:
      ValueError: If one is out of bounds; it names owner, option and bound.

    Examples:
      >>> check("lora_fair", steps=-5)
      Traceback (most recent call last):
      ...
      ValueError: lora_fair: steps must be at least 0, got -5
    """
    known = BOUNDS.get(owner, {})
    for name, value in values.items():
        if name in known and (fault := known[name].fault(value)):
            raise ValueError(f"{owner}: {name} {fault}")


def check_config(config: Mapping[str, Any]) -> None:
    """Checks all numbers of a configuration.

    Args:
      config: As nested dicts.

    Raises:
      ValueError: If one is out of bounds; it names field and bound.
    """
    # Options may refer to other fields, which are then what is wrong.
    fields = sorted(_flat(config), key=lambda field: field[0].startswith("options."))
    for path, value in fields:
        bound = bound_of(path, config)
        if bound is not None and (fault := bound.fault(value)):
            raise ValueError(f"config.{path} {fault}")


def bound_of(path: str, config: Mapping[str, Any]) -> Bound | None:
    """The bound of a field of a configuration, `local.steps`; None if it has none."""
    group, _, name = path.rpartition(".")
    owners = {
        "data.partition_options": config.get("data", {}).get("partition"),
        "pretraining.options": "pretrain",
        "model.options": "model",
    }
    if group in owners:
        return BOUNDS.get(owners[group], {}).get(name)
    if group.startswith("options."):
        return BOUNDS.get(group.removeprefix("options."), {}).get(name)
    patterns = BOUNDS["config"].items()
    return next((bound for pattern, bound in patterns if fnmatch.fnmatchcase(path, pattern)), None)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
