"""The round's program on the shapes of SmolLM2-135M: how large it is and what compiling it takes.

Shapes alone: no weight is made, and nothing is run.
"""

import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedlora_jax import lora, methods, models
from fedlora_jax.data.clients import ClientData
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.round import create, make_round
from fedlora_jax.federated.task import Batch, Task, Weighted, equally
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


def next_token(model: Llama) -> Task:
    """Language modelling on windows `batch['tokens']`."""

    def loss(logits: jax.Array, batch: Batch) -> Weighted:
        logits, following = logits[:, :-1], batch["tokens"][:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, following)
        return equally(jnp.mean(losses, axis=1))

    return Task(model, lambda batch: (batch["tokens"],), loss)


def lower(method: str, *, blocks: int, clients: int, rank: int) -> jax.stages.Lowered:
    """The program of a round of a method with its defaults, not yet compiled.

    All clients take part, one after the other; every linear layer of every block is adapted.
    """
    model = Llama(depth=blocks, **SMOLLM2)  # type: ignore[arg-type]
    made = methods.get(method)()
    training = LocalTraining(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0)), BATCH_SIZE, STEPS
    )
    key = jax.eval_shape(jax.random.key, 0)

    def federation(key: jax.Array) -> Any:
        params = model.init(key, jnp.zeros((1, WINDOW), jnp.int32))["params"]
        adapters = lora.init(key, params, targets=models.lora_targets(model), rank=rank)
        server = Server(params, Trainable(adapters, {}), jnp.float32(2), (), jnp.int32(0))
        return create(key, made, server, clients)

    def data() -> ClientData:
        tokens = jnp.zeros((clients * EXAMPLES, WINDOW), jnp.int32)
        indices = jnp.zeros((clients, EXAMPLES), jnp.int32)
        return ClientData({"tokens": tokens}, indices, jnp.zeros(clients, jnp.int32))

    return make_round(next_token(model), made, training, clients_per_chunk=1).lower(
        jax.eval_shape(federation, key),
        jax.eval_shape(data),
        jax.ShapeDtypeStruct((clients,), jnp.int32),
        key,
        jax.ShapeDtypeStruct((), jnp.float32),
    )


def measure(method: str, *, blocks: int, clients: int, rank: int) -> dict[str, Any]:
    """Lines of StableHLO, seconds, and memory in bytes; for a process of its own.

    The peak is that of the whole process, which has held no array: all that it needed, to load
    the library, to trace and to compile.
    """
    start = time.perf_counter()
    lowered = lower(method, blocks=blocks, clients=clients, rank=rank)
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
        "peak_bytes": _peak_bytes(),
        "held_bytes": planned.argument_size_in_bytes if planned else None,
        "working_bytes": planned.temp_size_in_bytes if planned else None,
    }


def _peak_bytes() -> int:
    """The most memory that this process has had; Linux counts in KiB, macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
