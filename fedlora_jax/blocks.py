"""Equal blocks of a model as one, so that a deep model compiles like a shallow one.

A model's blocks are its modules `block_0`, `block_1`, ... `stack` puts their parameters under
`block_*`, with an axis `[depth]` in front. A model with such parameters goes through its blocks in
a loop, of which the compiler sees one step. The stack is a copy of the backbone.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

LOOPED = "block_*"


def is_stacked(params: Mapping[str, Any]) -> bool:
    """Whether parameters, or adapters by path, are as `stack` or `stack_adapters` returns them."""
    return any(path.partition("/")[0] == LOOPED for path in params)


def stack(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with those of all blocks under `block_*`, each array `[depth, ...]`.

    Raises:
      ValueError: If there are no blocks, or they are not alike.
    """
    found = {i: params[name] for name in params if (i := _index(name)) is not None}
    rest = {name: value for name, value in params.items() if _index(name) is None}
    return {**rest, LOOPED: _stacked(found, "parameters")}


def stack_adapters(adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Adapters by path with those of a layer of all blocks under `block_*/LAYER`.

    Raises:
      ValueError: If some blocks have an adapter that others lack, or of another rank.
    """
    blocks: dict[int, dict[str, Any]] = {}
    rest = {}
    for path, factors in adapters.items():
        block, _, layer = path.partition("/")
        if (i := _index(block)) is None:
            rest[path] = factors
        else:
            blocks.setdefault(i, {})[layer] = factors
    if not blocks:
        return rest
    layers = _stacked(blocks, "adapters")
    return rest | {f"{LOOPED}/{layer}": factors for layer, factors in layers.items()}


def unstack_adapters(adapters: Mapping[str, Any]) -> dict[str, Any]:
    """What `stack_adapters` was given."""
    apart = {}
    for path, factors in adapters.items():
        block, _, layer = path.partition("/")
        if block != LOOPED:
            apart[path] = factors
            continue
        leaves, structure = jax.tree.flatten(factors)
        for i, row in enumerate(zip(*map(_rows, leaves), strict=True)):
            apart[f"block_{i}/{layer}"] = jax.tree.unflatten(structure, row)
    return apart


def check(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> None:
    """Raises ValueError unless blocks of these, not yet stacked, can be gone through in a loop."""
    check_depth(*jax.eval_shape(lambda: (stack(params), stack_adapters(adapters))))


def check_depth(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> None:
    """Raises ValueError if stacked adapters are of fewer blocks than stacked parameters."""
    (depth,) = {len(x) for x in jax.tree.leaves(params[LOOPED])}
    for path, factors in adapters.items():
        found = len(jax.tree.leaves(factors)[0])
        if path.startswith(f"{LOOPED}/") and found != depth:
            raise ValueError(
                f"a loop goes over all blocks or none: the adapters are of {found} blocks, the "
                f"parameters of {depth}"
            )


def over_blocks(
    model: nn.Module, make: Callable[[str], nn.Module], depth: int, x: jax.Array, *inputs: Any
) -> jax.Array:
    """`x = block_i(x, *inputs)` for i = 0 .. depth - 1, in a loop if the parameters are stacked.

    Args:
      model: Whose blocks they are, from within one of its compact methods.
      make: From the name of a block to the block.
      depth: How many there are.
      x: What goes through them.
      *inputs: What all of them see besides.
    """
    if not model.has_variable("params", LOOPED):
        for i in range(depth):
            x = make(f"block_{i}")(x, *inputs)
        return x

    def step(block: nn.Module, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return block(x, *inputs), None

    loop = nn.scan(step, variable_axes={True: 0}, split_rngs={True: False}, length=depth)
    return loop(make(LOOPED), x, None)[0]


def _index(name: str) -> int | None:
    return int(name.removeprefix("block_")) if re.fullmatch(r"block_\d+", name) else None


def _stacked(blocks: Mapping[int, Any], what: str) -> Any:
    """Trees of arrays of the blocks 0 .. depth - 1 as one."""
    if sorted(blocks) != list(range(len(blocks))) or not blocks:
        raise ValueError(
            f"a loop goes over block_0, block_1, ..., and there are {what} of "
            f"{', '.join(f'block_{i}' for i in sorted(blocks)) or 'none'}"
        )
    first = jax.tree.map(jnp.shape, blocks[0])
    for i, block in blocks.items():
        if jax.tree.map(jnp.shape, block) != first:
            raise ValueError(
                f"a loop goes over blocks that are alike, and the {what} of block_{i} are not of "
                "the layers and shapes of those of block_0"
            )
    return jax.tree.map(lambda *rows: jnp.stack(rows), *(blocks[i] for i in range(len(blocks))))


@jax.custom_vjp
def _rows(stacked: jax.Array) -> tuple[jax.Array, ...]:
    """The rows of an array; their gradients come back as a stack, not as a sum of padded ones."""
    return tuple(stacked)


_rows.defvjp(lambda stacked: (tuple(stacked), None), lambda _, rows: (jnp.stack(rows),))
