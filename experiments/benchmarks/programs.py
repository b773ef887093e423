"""The round's program on the shapes of SmolLM2-135M: its size, its memory, what compiling takes.

Shapes alone: no weight is made, and nothing is run.
"""

import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tabulate import tabulate

from fedlora_jax import lora, methods, models
from fedlora_jax.data.clients import ClientData
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.round import Recipe, create, make_round
from fedlora_jax.federated.task import Batch, Task, Weighted, causal_language_model, equally
from fedlora_jax.methods import Server, Trainable
from fedlora_jax.models import Llama

SMOLLM2 = {
    "vocab_size": 49152,
    "width": 576,
    "num_heads": 9,
    "num_kv_heads": 3,
    "mlp_dim": 1536,
    "rope_base": 100_000.0,
    "tied": True,
}
WINDOW, BATCH_SIZE, STEPS, EXAMPLES = 128, 4, 10, 64
# What ends the name of a row with the blocks in a loop, and which methods have one.
_LOOP, _LOOPED = "+loop", ("fedit", "fedsmooth_lora")


def next_token(model: Llama) -> Task:
    """Language modelling on windows `batch['tokens']`, with the logits of the batch kept."""

    def loss(logits: jax.Array, batch: Batch) -> Weighted:
        logits, following = logits[:, :-1], batch["tokens"][:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, following)
        return equally(jnp.mean(losses, axis=1))

    return Task(model, lambda batch: (batch["tokens"],), loss)


# How the loss is taken: the logits of the batch are kept, or those of 128 tokens at a time.
LOSSES = {"whole": next_token, "chunked": causal_language_model}


def lower(
    method: str,
    *,
    blocks: int,
    clients: int,
    rank: int,
    loss: str = "whole",
    length: int = WINDOW,
    remat: bool = False,
    loop: bool = False,
    clients_per_chunk: int | None = 1,
) -> jax.stages.Lowered:
    """The program of a round of a method with its defaults, not yet compiled.

    All clients take part; every linear layer of every block is adapted.

    Args:
      method: Its name.
      blocks: Of the model.
      clients: K.
      rank: r.
      loss: A key of `LOSSES`.
      length: Tokens of a text.
      remat: Whether blocks are computed again in the backward pass.
      loop: Whether blocks are gone through in a loop.
      clients_per_chunk: How many clients are side by side; None for all.
    """
    model = Llama(depth=blocks, remat=remat, **SMOLLM2)  # type: ignore[arg-type]
    made = methods.get(method)()
    training = LocalTraining(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0)), BATCH_SIZE, STEPS
    )
    key = jax.eval_shape(jax.random.key, 0)

    def federation(key: jax.Array) -> Any:
        params = model.init(key, jnp.zeros((1, length), jnp.int32))["params"]
        adapters = lora.init(key, params, targets=models.lora_targets(model), rank=rank)
        server = Server(params, Trainable(adapters, {}), jnp.float32(2), (), jnp.int32(0))
        return create(key, made, server, clients)

    def data() -> ClientData:
        tokens = jnp.zeros((clients * EXAMPLES, length), jnp.int32)
        examples, each = {"tokens": tokens, "answer": tokens > 0}, jnp.zeros(clients, jnp.int32)
        return ClientData(examples, jnp.zeros(len(tokens), jnp.int32), each, each, jnp.float32(1))

    task = LOSSES[loss](model)._replace(loop=loop)
    return make_round(Recipe(task, made, training, clients_per_chunk=clients_per_chunk)).lower(
        jax.eval_shape(federation, key),
        jax.eval_shape(data),
        jax.ShapeDtypeStruct((clients,), jnp.int32),
        key,
        jax.ShapeDtypeStruct((), jnp.float32),
    )


def rows() -> list[str]:
    """What is measured: each method, and some with the blocks in a loop as well."""
    return sorted([*methods.REGISTRY, *(name + _LOOP for name in _LOOPED)])


def measure(row: str, *, blocks: int, clients: int, rank: int) -> dict[str, Any]:
    """Lines of StableHLO, seconds, and memory in bytes; for a process of its own.

    The peak is that of the whole process, which has held no array: all that it needed, to load
    the library, to trace and to compile.
    """
    start = time.perf_counter()
    name, loop = row.removesuffix(_LOOP), row.endswith(_LOOP)
    lowered = lower(name, blocks=blocks, clients=clients, rank=rank, loop=loop)
    traced = time.perf_counter()
    lines = lowered.as_text().count("\n")
    begun = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    planned = compiled.memory_analysis()
    return {
        "lines": lines,
        "trace_s": traced - start,
        "compile_s": done - begun,
        "peak_bytes": peak_bytes(),
        "held_bytes": planned.argument_size_in_bytes if planned else None,
        "working_bytes": planned.temp_size_in_bytes if planned else None,
    }


def working_bytes(method: str, **shapes: Any) -> int | None:
    """Memory that a round needs besides its state and data, as the compiler plans it.

    Args:
      method: Its name.
      **shapes: Arguments of `lower`.
    """
    planned = lower(method, **shapes).compile().memory_analysis()
    return planned.temp_size_in_bytes if planned else None


def peak_bytes() -> int:
    """The most memory that this process has had; Linux counts in KiB, macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def page(results: dict[str, Any]) -> str:
    """The table of programs, as Markdown."""
    facts = results["environment"]

    def gigabytes(size: int | None) -> str:
        return "" if size is None else f"{size / 1e9:.2f}"

    table = [
        [
            name,
            line["lines"],
            f"{line['trace_s']:.0f}",
            f"{line['compile_s']:.0f}",
            gigabytes(line["peak_bytes"]),
            gigabytes(line["held_bytes"]),
            gigabytes(line["working_bytes"]),
        ]
        for name, line in results["methods"].items()
    ]
    headers = ["method", "lines", "trace, s", "compile, s", "peak, GB", "held, GB", "working, GB"]
    lines = [
        "# Programs: size, and what compiling takes",
        "",
        f"A round on the shapes of a SmolLM2-135M with {facts['blocks']} blocks, "
        f"{7 * facts['blocks']} adapted kernels at r = {facts['rank']}, {facts['clients']} clients "
        f"one at a time. {facts['date']}, {facts['device']}, {facts['cores']} cores, jax "
        f"{facts['versions']['jax']}, load average {facts['load_average_at_start']} when it began.",
        "",
        tabulate(table, headers=headers, tablefmt="github", colalign=("left", *["right"] * 6)),
        "",
        "`+loop`: with the blocks in a loop. `lines`: of StableHLO. `peak`: most resident memory "
        "of the process that traced and compiled. `held`: state and data of the round; "
        "`working`: what it needs besides, as the compiler plans it.",
    ]
    return "\n".join(lines)
