"""Which robust rule holds against which clients that fail or attack: a table.

    python -m experiments.robustness --config=configs/digits.py --out=runs/robustness \\
        --methods=fedit --seeds=2 --config.faults.factor=5

Runs each method with each rule and each kind of faults, under the same seeds, splits and cohorts;
share and factor of the faults, and what the rules take for hostile, are those of the configuration.
One program is compiled for a method with a rule. Writes `results.json` after each run, and
`README.md` with the tables; given the same command again, it goes on from the runs that are there.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments.shared import report, rounds
from experiments.shared.apps import check_asked, command, method_names, progress_bar, run
from fedlora_jax import experiment, locks, transforms
from fedlora_jax.experiment import Program, Setting, records
from fedlora_jax.experiment.measure import in_words
from fedlora_jax.experiment.program import make_method
from fedlora_jax.federated import faults
from fedlora_jax.federated.evaluation import panel_states
from fedlora_jax.federated.faults import Faults
from fedlora_jax.federated.metrics import Metric
from fedlora_jax.federated.round import Federation, RoundMetrics, run_round
from fedlora_jax.methods import check_combination
from fedlora_jax.names import lookup

RULES = ("none", *transforms.ROBUST_RULES)
KINDS = ("none", *faults.KINDS)
# To the server these are one: nothing of such a client counts, and its state stays.
ABSENT = ("dropout", "crash", "nan")

# Method, rule, kind and seed; and by them the headline metric after the last round.
Job: TypeAlias = tuple[str, str, str, int]
Results: TypeAlias = dict[Job, float]


def main() -> None:
    """Runs what is missing, and writes the tables."""
    config, out = _CONFIG.value, Path(_OUT.value)
    names, rules, kinds = method_names(_METHODS.value), _RULES.value, _KINDS.value
    check_asked(config, names, _SEEDS.value)
    for given, known, what in ((rules, RULES, "robust rule"), (kinds, KINDS, "kind of faults")):
        for name in given:
            lookup(dict.fromkeys(known, name), name, what)
    with locks.held(out, out / ".lock"):
        metric, results = study(config, out, names, rules, kinds, _SEEDS.value)
        text = page(results, metric, names, rules, kinds, _SEEDS.value)
        head = f"# Robust rules\n\n```\n{command()}\n```\n\n"
        records.write_atomically(out / "README.md", head + text)
    print(text)


def study(
    config: ConfigDict,
    out: Path,
    names: Sequence[str],
    rules: Sequence[str],
    kinds: Sequence[str],
    num_seeds: int,
) -> tuple[Metric, Results]:
    """Runs every method with every rule that it can have, against every kind of faults.

    Args:
      config: What all have in common.
      out: Where `results.json` is, or will be.
      names: Methods.
      rules: From `RULES`.
      kinds: From `KINDS`.
      num_seeds: Seeds 0, 1, ...

    Returns:
      The headline metric, and its value after the last round, of all in `results.json`.

    Raises:
      ValueError: If `out` holds results of another configuration, or as `rounds.check`.
    """
    rounds.check(config)
    configs = {(name, rule): _with(config, name, rule) for name in names for rule in rules}
    configs = {key: mine for key, mine in configs.items() if _combines(*key, mine)}
    path, results = out / "results.json", _read(out / "results.json", config)
    setting = experiment.prepare(config)
    with progress_bar(len(configs) * len(kinds) * num_seeds, unit="run") as bar:
        for (name, rule), mine in configs.items():
            make, program = None, None
            for seed in range(num_seeds):
                for kind in kinds:
                    bar.set_description(f"{name}, {rule}, {kind}, seed {seed}")
                    bar.update()
                    job = (name, rule, kind, seed)
                    if job in results:
                        continue
                    same = ABSENT if kind in ABSENT else ()
                    others = [(name, rule, other, seed) for other in same]
                    known = [results[other] for other in others if other in results]
                    if not known:
                        program = program or experiment.compile_program(mine, setting)
                        make = make or _compiled(program)
                        known = [_final(mine, setting, program, make, kind, seed)]
                    results[job] = known[0]
                    _write(path, config, results)
    return setting.task.metrics[0], results


def _with(config: ConfigDict, name: str, rule: str) -> ConfigDict:
    mine = config.copy_and_resolve_references()
    mine.method, mine.robust.rule = name, rule
    # Faults are arguments of the program.
    mine.faults.kind = "none"
    return mine


def _combines(name: str, rule: str, mine: ConfigDict) -> bool:
    """Whether the method can have the rule; what else is wrong is an error."""
    if rule != "none":
        plain = make_method(_with(mine, name, "none"))
        try:
            check_combination(plain, transforms.ROBUST_RULES[rule], rule)
        except ValueError:
            return False
    experiment.check(mine)
    return True


def _compiled(program: Program) -> rounds.Make:
    """A round to which the faults are given, so that all kinds are one program."""

    @functools.cache
    def make(size: int) -> Callable[..., tuple[Federation, RoundMetrics]]:
        def step(chosen: Faults, *state: Any) -> tuple[Federation, RoundMetrics]:
            training = program.recipe.training._replace(faults=chosen)
            recipe = program.recipe._replace(training=training, clients_per_chunk=size)
            return run_round(recipe, *state)[:2]

        return jax.jit(step)

    return make


def _final(
    config: ConfigDict, setting: Setting, program: Program, make: rounds.Make, kind: str, seed: int
) -> float:
    """The headline metric after the last round, or after the first in which all diverge."""
    config = config.copy_and_resolve_references()
    config.seed = seed
    share = 0.0 if kind == "none" else config.faults.share
    # With a share of zero it does not matter which.
    chosen = faults.make(
        "zeros" if kind == "none" else kind, share=share, factor=config.faults.factor
    )
    state = experiment.first_state(config, setting, program.method)
    after = rounds.each(config, state, make, chosen)
    for federation, metrics in after:  # noqa: B007
        if int(metrics.excluded) == state.cohort_size - int(metrics.absent or 0):
            break
    clients = federation.clients
    judged = panel_states(
        program.method, lambda who: jax.tree.map(lambda x: x[who], clients), state.test
    )
    found = program.evaluate(federation.server, judged, state.test)
    metric = setting.task.metrics[0]
    value = in_words(program.metrics, found, setting.domains)[metric.name]
    return float("nan") if value is None else metric.factor * value


def _read(path: Path, config: ConfigDict) -> Results:
    return {
        (row["method"], row["rule"], row["kind"], row["seed"]): _value(row)
        for row in rounds.read(path, config)
    }


def _value(row: Mapping[str, Any]) -> float:
    return float("nan") if row["value"] is None else row["value"]


def _write(path: Path, config: ConfigDict, results: Results) -> None:
    keys = ("method", "rule", "kind", "seed")
    runs = [
        {**dict(zip(keys, job, strict=True)), "value": value if np.isfinite(value) else None}
        for job, value in results.items()
    ]
    rounds.write(path, config, runs)


def page(
    results: Results,
    metric: Metric,
    names: Sequence[str],
    rules: Sequence[str],
    kinds: Sequence[str],
    num_seeds: int,
) -> str:
    """A table a method, in Markdown: faults down, rules across, means over seeds.

    Args:
      results: From `study`.
      metric: The headline.
      names: Methods.
      rules: In the order of the columns.
      kinds: In the order of the rows.
      num_seeds: The number of seeds.
    """
    spread = " ± sample standard deviation" * (num_seeds > 1)
    lines = [
        f"{metric.sentence} after the last round, mean{spread} over seeds; {metric.better} is "
        "better; -: the method refuses it.",
        "",
    ]

    def cell(name: str, rule: str, kind: str) -> str:
        jobs = [(name, rule, kind, seed) for seed in range(num_seeds)]
        values = [results[job] for job in jobs if job in results]
        return report.spread(values, metric.digits) if values else "-"

    for name in names:
        rows = [[kind, *(cell(name, rule, kind) for rule in rules)] for kind in kinds]
        lines += [report.aligned([name, *rules], rows, "github"), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
    _OUT = flags.DEFINE_string("out", None, "Directory for the results.", required=True)
    _METHODS = flags.DEFINE_list(
        "methods", ["fedit"], "Methods, or all; a method that --config names must be among them."
    )
    _RULES = flags.DEFINE_list("rules", list(RULES), "Robust rules.")
    _KINDS = flags.DEFINE_list("kinds", list(KINDS), "Kinds of faults.")
    _SEEDS = flags.DEFINE_integer(
        "seeds",
        2,
        "Number of seeds: 0, 1, ...; a --config.seed must be one of them.",
        lower_bound=1,
    )
    flags.mark_flag_as_required("config")
    run(main)
