"""Aggregates LoRA adapters that were trained elsewhere, as a server would, without their backbone.

    python -m experiments.aggregate --adapters=client_0,client_1,client_2 --weights=120,80,200 \\
        --method=lora_fair --set regularization=0.02 --out=merged

Reads adapter checkpoints of Hugging Face PEFT (directories, or names on the hub), prints how far
the result is from the weighted mean of the clients' updates and how its spectrum falls off, and
writes a PEFT checkpoint, or with `--base=DIR --merge` the backbone with the result merged in.
`aggregation.json` beside it has the numbers of every layer.
"""

import ast
import collections
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import tabulate
from absl import flags

from experiments.shared.apps import run
from fedlora_jax import aggregation
from fedlora_jax.interop import checkpoints, peft
from fedlora_jax.interop.checkpoints import Combined

_ADAPTERS = flags.DEFINE_list(
    "adapters", None, "Adapter checkpoints, one a client, separated by commas.", required=True
)
_WEIGHTS = flags.DEFINE_list(
    "weights", None, "Their weights, e.g. numbers of examples; equal by default."
)
_METHOD = flags.DEFINE_enum(
    "method", "fedit", sorted(aggregation.REGISTRY), "Aggregation function."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "A hyperparameter of the method, name=value. May be given more than once."
)
_OUT = flags.DEFINE_string("out", None, "Directory for the result.", required=True)
_RESCALE = flags.DEFINE_bool(
    "rescale",
    False,
    "Accept adapters of different scales (alpha / r) and fold the ratios into the factors; without "
    "it they are refused.",
)
_BASE = flags.DEFINE_string("base", None, "The backbone, for --merge: a directory or a hub name.")
_MERGE = flags.DEFINE_bool(
    "merge", False, "Write the backbone with the result merged in, instead of adapters."
)


def main() -> None:
    """Reads, aggregates, reports, writes."""
    began = time.perf_counter()
    base = _BASE.value
    if _MERGE.value != (base is not None):
        raise ValueError("--base names the backbone for --merge: give both, or neither")
    out = Path(_OUT.value)
    checkpoints.check_out(out, [*_ADAPTERS.value, *([] if base is None else [base])])
    weights = parse_weights(_WEIGHTS.value, len(_ADAPTERS.value))
    combined = checkpoints.combine(
        _ADAPTERS.value, weights, _METHOD.value, parse_options(_SET.value), rescale=_RESCALE.value
    )
    adapters, scale, saved, config = combined.checkpoint
    if base is not None:
        checkpoints.merge(base, combined.checkpoint, out)
    else:
        peft.save(out, adapters, scale=scale, head=saved, config=config)
    _write_numbers(combined, weights, out / "aggregation.json")
    print(table(combined))
    ranks = sorted({factors.rank for factors in adapters.values()})
    print(
        f"\n{_METHOD.value} of {len(weights)} clients: {len(adapters)} layers of rank "
        f"{', '.join(map(str, ranks))}, scale {scale:g}, error {combined.error:.4g}\n"
        f"wrote {'the merged backbone' if base else 'a PEFT checkpoint'} to {out} "
        f"in {time.perf_counter() - began:.1f} s"
    )


def parse_weights(texts: list[str] | None, count: int) -> list[float]:
    """One number a client; all 1 by default."""
    try:
        weights = [1.0] * count if texts is None else [float(text) for text in texts]
    except ValueError:
        raise ValueError(f"--weights={','.join(texts or [])}: expected numbers") from None
    if len(weights) != count:
        raise ValueError(f"--adapters names {count} checkpoints, --weights has {len(weights)}")
    return weights


def parse_options(texts: list[str]) -> dict[str, Any]:
    """Hyperparameters from `name=value`; a value that is no Python literal is a string."""
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: expected name=value")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def table(combined: Combined) -> str:
    """Error and spectrum for each kind of layer, by the last part of its name."""
    kinds = collections.defaultdict(list)
    for name in combined.spectra:
        kinds[name.rpartition(".")[2]].append(name)
    rows = []
    for kind, names in kinds.items():
        spectra = [combined.spectra[name] for name in names]
        rows.append(
            [
                kind,
                len(names),
                np.mean([combined.layer_errors[name] for name in names]),
                np.mean([s[0] for s in spectra]),
                np.mean([effective_rank(s) for s in spectra]),
                np.mean([rank_of_energy(s, 0.99) for s in spectra]),
            ]
        )
    headers = ["layers", "count", "error", "largest", "effective rank", "rank of 99%"]
    return tabulate.tabulate(rows, headers, floatfmt=("", "", ".4f", ".3g", ".1f", ".1f"))


def effective_rank(singular_values: np.ndarray) -> float:
    """`(sum s^2)^2 / sum s^4`: how many equal singular values would have the same energy."""
    energy = np.square(singular_values.astype(np.float64))
    return float(energy.sum() ** 2 / max(np.square(energy).sum(), 1e-300))


def rank_of_energy(singular_values: np.ndarray, share: float) -> int:
    """How many singular values hold that share of the sum of squares."""
    energy = np.cumsum(np.square(singular_values.astype(np.float64)))
    return int(np.searchsorted(energy, share * energy[-1]) + 1)


def _write_numbers(combined: Combined, weights: list[float], path: Path) -> None:
    numbers = {
        "adapters": _ADAPTERS.value,
        "weights": weights,
        "method": _METHOD.value,
        "options": parse_options(_SET.value),
        "error": combined.error,
        "layers": {
            name: {"error": combined.layer_errors[name], "singular_values": spectrum.tolist()}
            for name, spectrum in combined.spectra.items()
        },
    }
    path.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
