"""Ordinary training of a whole image classifier: a backbone where none can be downloaded."""

import os
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tqdm.auto import tqdm

from fedlora_jax import bounds, checksums, locks
from fedlora_jax.data import images

Params: TypeAlias = dict[str, Any]

WEIGHT_DECAY = 0.05
SHIFT = 1.0  # pixels
DISTORTION = 0.15
_STEPS_PER_CALL = 25


def pretrain(
    model: nn.Module,
    examples: Mapping[str, np.ndarray],
    *,
    steps: int = 1000,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 0,
    statistics: str = "half",
    progress: bool = True,
) -> Params:
    """Trains a classifier from random weights, with AdamW and small affine distortions.

    Args:
      model: From images `[B, H, W, C]` to logits.
      examples: `image` uint8 `[M, H, W, C]` and `label` int `[M]`.
      steps: Optimisation steps.
      batch_size: Examples a step, drawn with replacement.
      learning_rate: At the start; it falls to zero along half a cosine.
      seed: Of the weights, the batches and the distortions.
      statistics: By which `images.normalize` maps pixels.
      progress: Shows a progress bar if the standard error is a terminal.

    Returns:
      The parameters, a nested dict of float32 arrays.

    Raises:
      ValueError: If a number is out of its bounds.
    """
    bounds.check(
        "pretrain", steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed
    )
    images_, labels = jnp.asarray(examples["image"]), jnp.asarray(examples["label"])
    init_key, train_key = jax.random.split(jax.random.key(seed))
    params = jax.jit(model.init)(init_key, images.normalize(images_[:1], statistics))["params"]
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)

    def loss(params: Params, batch: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(index: jax.Array, carry: tuple[Params, optax.OptState]) -> Any:
        params, state = carry
        batch_key, affine_key = jax.random.split(jax.random.fold_in(train_key, index))
        chosen = jax.random.randint(batch_key, (batch_size,), 0, len(labels))
        pixels = images.normalize(images_[chosen], statistics)
        batch = images.random_affine(affine_key, pixels, shift=SHIFT, distortion=DISTORTION)
        gradient = jax.grad(loss)(params, batch, labels[chosen])
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def run(start: int, stop: int, carry: tuple[Params, optax.OptState]) -> Any:
        return jax.lax.fori_loop(start, stop, step, carry)

    carry = (params, jax.jit(optimizer.init)(params))
    hidden = not (progress and sys.stderr.isatty())
    with tqdm(total=steps, desc="Pretraining", unit="step", disable=hidden) as bar:
        for start in range(0, steps, _STEPS_PER_CALL):
            stop = min(start + _STEPS_PER_CALL, steps)
            carry = jax.block_until_ready(run(start, stop, carry))
            bar.update(stop - start)
    return carry[0]


def save(path: str | os.PathLike[str], params: Params) -> None:
    """Writes parameters as an Orbax checkpoint that is either complete or not there.

    Raises:
      ValueError: If there is something at `path` already.
      OSError: If it cannot be written.
    """
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} already exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    if jax.process_count() > 1:
        # Arrays of one host alone are refused as such.
        params = jax.device_get(params)
    # One that is written in the background waits for ever where there is no place for it.
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
    with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer:
        checkpointer.save(unfinished, args=ocp.args.StandardSave(params))
    checksums.write(unfinished)
    unfinished.rename(path)


def _alone() -> ocp.options.MultiprocessingOptions:
    """No other host is waited for: each has all parameters."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"host_{me}"
    )


def restore(path: str | os.PathLike[str], like: Params) -> Params:
    """Reads what `save` wrote.

    Args:
      path: The checkpoint.
      like: A tree of arrays or `jax.ShapeDtypeStruct` that says what to expect.

    Raises:
      FileNotFoundError: If there is no checkpoint at `path`.
      checksums.Damaged: If it is not what was written.
      ValueError: If it holds another tree.
    """

    def here(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)

    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    checksums.check(Path(path))
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        return checkpointer.restore(Path(path).absolute(), jax.tree.map(here, like))


def cached(
    path: str | os.PathLike[str],
    model: nn.Module,
    examples: Mapping[str, np.ndarray],
    **options: Any,
) -> Params:
    """Restores the backbone at `path`, or pretrains it with these options and saves it there.

    The path should name what the parameters depend on: nothing but the shapes is checked. One that
    is damaged is made anew. Of several processes one makes it, and the others wait for it.

    Raises:
      OSError: If it is to be made, and cannot be written there; before any training.
    """
    path = Path(path).absolute()
    image = jax.ShapeDtypeStruct((1, *examples["image"].shape[1:]), jnp.float32)
    like = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    found = _restored(path, like)
    if found is not None:
        return found
    with locks.held(path, path.with_name(f".{path.name}.lock"), wait=True):
        found = _restored(path, like)  # Another process may have made it meanwhile.
        if found is None:
            shutil.rmtree(path, ignore_errors=True)
            save(path, pretrain(model, examples, **options))
            found = restore(path, like)
    return found


def _restored(path: Path, like: Params) -> Params | None:
    """What is at `path`; None if there is nothing, or nothing of use."""
    if not path.exists():
        return None
    try:
        return restore(path, like)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        why = error if isinstance(error, checksums.Damaged) else f"{path} cannot be read"
        warnings.warn(f"{why}. The backbone is made anew", stacklevel=3)
        return None
