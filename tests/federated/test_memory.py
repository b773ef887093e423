"""What the compiler plans for a round of a language model: shapes alone, nothing is run."""

import functools

import jax
import jax.numpy as jnp
import optax

from fedlora_jax import lora, methods, models
from fedlora_jax.data.clients import ClientData
from fedlora_jax.federated.local import LocalTraining
from fedlora_jax.federated.round import Recipe, create, make_round
from fedlora_jax.federated.task import causal_language_model
from fedlora_jax.methods import Server, Trainable

CLIENTS, BATCH_SIZE, LENGTH, WIDTH, DEPTH = 2, 4, 65, 32, 3
MODEL = functools.partial(
    models.Llama,
    vocab_size=97,
    width=WIDTH,
    depth=DEPTH,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=8 * WIDTH,
)


def working_bytes(remat):
    model = MODEL(remat=remat)
    method = methods.get("fedit")()

    def federation(key):
        params = model.init(key, jnp.zeros((1, LENGTH - 1), jnp.int32))["params"]
        adapters = lora.init(key, params, targets=models.lora_targets(model), rank=2)
        server = Server(params, Trainable(adapters, {}), jnp.float32(2), (), jnp.int32(0))
        return create(key, method, server, CLIENTS)

    def data():
        tokens = jnp.zeros((CLIENTS * BATCH_SIZE, LENGTH), jnp.int32)
        examples, each = {"tokens": tokens, "answer": tokens > 0}, jnp.zeros(CLIENTS, jnp.int32)
        return ClientData(examples, jnp.zeros(len(tokens), jnp.int32), each, each, jnp.float32(1))

    key = jax.eval_shape(jax.random.key, 0)
    training = LocalTraining(optax.sgd(1.0), BATCH_SIZE, 2)
    function = make_round(Recipe(causal_language_model(model), method, training))
    lowered = function.lower(
        jax.eval_shape(federation, key),
        jax.eval_shape(data),
        jax.ShapeDtypeStruct((CLIENTS,), jnp.int32),
        key,
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_remat_saves_the_activations_of_all_blocks_but_one():
    hidden = 4 * CLIENTS * BATCH_SIZE * (LENGTH - 1) * 8 * WIDTH
    # Gate, up and their product in each block, which the backward pass needs.
    assert working_bytes(False) - working_bytes(True) > (DEPTH - 1) * 3 * hidden
