"""What a round on four devices computes and sends, by the compiler's account; nothing is run.

As the library has it, the local training under `shard_map` and the kernels of the server's step
dealt out, or all left to the compiler: the same function without its mesh, on inputs that are
spread alike.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tabulate import tabulate

from experiments.benchmarks import hlo
from experiments.shared.compiling import least_effort
from fedlora_jax import lora, methods, models
from fedlora_jax.data.clients import ClientData, client_data
from fedlora_jax.federated import placement
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.round import Federation, Recipe, create, make_cohort_round
from fedlora_jax.federated.task import Task, causal_language_model
from fedlora_jax.methods import Method, Server, Trainable
from fedlora_jax.models import Llama

DEVICES = 4
SMALL = {"width": 64, "depth": 1, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 128}
VOCABULARY, LENGTH, RANK, COHORT, EXAMPLES, BATCH_SIZE, STEPS = 128, 16, 4, 16, 8, 4, 4


def names() -> list[str]:
    """The methods that have a cohort."""
    return [name for name in sorted(methods.REGISTRY) if not methods.get(name)().pooled]


def measure(name: str) -> dict[str, Any]:
    """FLOPs a device and collectives of a round of one method, on one device and on four.

    Raises:
      RuntimeError: If there are not four devices.
    """
    if jax.device_count() < DEVICES:
        raise RuntimeError(f"{DEVICES} devices are needed, there are {jax.device_count()}")
    method = methods.get(name)()
    task, federation, data = _small(method)
    mesh = placement.make_mesh(DEVICES)
    training = LocalTraining(optax.adamw(1.0), BATCH_SIZE, STEPS)
    key, rate, cohort = jax.random.key(0), jnp.float32(1e-3), np.arange(COHORT)
    server, clients, ranks = federation
    shared = placement.put((ranks, data), placement.everywhere(mesh))
    rows = placement.put((clients, cohort), placement.rows(mesh))
    spread = placement.put(server, placement.server(mesh, server)), rows[0], *shared, rows[1]
    ways = {
        "one": (None, (server, clients, ranks, data, jnp.asarray(cohort))),
        "library": (mesh, spread),
        "compiler": (None, spread),
    }
    found = {}
    for way, (devices, arguments) in ways.items():
        function = make_cohort_round(Recipe(task, method, training), mesh=devices)
        # What devices compute and send is settled before there is machine code.
        compiled = function.lower(*arguments, key, rate).compile(least_effort())
        text, cost = compiled.as_text(), compiled.cost_analysis()
        assert text is not None and cost is not None
        sent, waits = hlo.collectives(text), hlo.collectives(text, only_in_loops=True)
        found[way] = {
            "flops": cost["flops"],
            "collectives": {kind: list(each) for kind, each in sorted(sent.items())},
            "in_loops": sum(each.times for each in waits.values()),
        }
    jax.clear_caches()
    return found


def _small(method: Method) -> tuple[Task, Federation, ClientData]:
    """A Llama of one block with all its linear layers adapted, and sixteen clients."""
    model = Llama(vocab_size=VOCABULARY, **SMALL)  # type: ignore[arg-type]
    key = jax.random.key(0)
    tokens = jax.random.randint(key, (COHORT * EXAMPLES, LENGTH), 0, VOCABULARY)
    params = model.init(key, tokens[:1])["params"]
    adapters = lora.init(key, params, targets=models.lora_targets(model), rank=RANK)
    server = Server(params, Trainable(adapters, {}), jnp.float32(2), (), jnp.int32(0))
    parts = np.split(np.arange(len(tokens)), COHORT)
    data = client_data({"tokens": tokens, "answer": tokens > 0}, parts)
    return causal_language_model(model), create(key, method, server, COHORT), data


def page(results: dict[str, Any]) -> str:
    """The table, as Markdown."""
    facts = results["environment"]

    def sent(way: dict[str, Any]) -> list[str]:
        each = way["collectives"].items()
        kinds = ", ".join(f"{count} {kind}" for kind, (count, _) in each) or "none"
        size = f"{sum(size for _, (_, size) in each) / 1e3:,.0f}"
        return [kinds, str(way["in_loops"]), size]

    table = [
        [
            name,
            f"{ways['one']['flops'] / 1e6:.1f}",
            f"{ways['library']['flops'] / 1e6:.1f}",
            f"{ways['compiler']['flops'] / 1e6:.1f}",
            *sent(ways["library"]),
            *sent(ways["compiler"]),
        ]
        for name, ways in results["methods"].items()
    ]
    headers = ["method", "MFLOP, one device", "library", "compiler"]
    for way in ("library", "compiler"):
        headers += [f"collectives, {way}", "in loops", "kB"]
    align = ("left", *["right"] * 3, *["left", "right", "right"] * 2)
    lines = [
        f"# A round on {DEVICES} devices",
        "",
        f"A Llama of one block, width {SMALL['width']}, its seven linear layers adapted at r = "
        f"{RANK}; {COHORT} clients, {STEPS} steps of {BATCH_SIZE} texts of {LENGTH} tokens. "
        f"{facts['date']}, {facts['device']}, jax {facts['versions']['jax']}. Compiled, not run.",
        "",
        tabulate(table, headers, tablefmt="github", colalign=align, disable_numparse=True),
        "",
        "`library`: the local training of each device's clients is said to concern no other "
        "device, and for the server's step each gets all clients' factors of its share of the "
        "kernels. `compiler`: the same function and the same placing of its inputs, without that. "
        "MFLOP are those of one device by the compiler's count, which takes "
        "the body of a loop once. Collectives are those that a device takes part in during one "
        "round, in loops as often as the loop turns where the compiler knows that; kB are of their "
        "results on a device.",
    ]
    return "\n".join(lines)
