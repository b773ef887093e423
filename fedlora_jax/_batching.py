"""A batch over many small things whose results are taken apart again."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def over_rows(function: Callable[..., Any], rows: Sequence[Any]) -> list[Any]:
    """`[function(*row) for row in rows]` for rows of equal structure and shapes.

    As two batches, one after the other in a loop: what comes out of a loop is an array. Of one
    batch the compiler puts the end of the function into whatever reads a row, once a row, and the
    program grows with the square of their number.
    """
    if len(rows) == 1:
        return [function(*rows[0])]
    half = -(-len(rows) // 2)
    filled = [*rows, *rows[: 2 * half - len(rows)]]
    batch = jax.tree.map(lambda *x: jnp.stack(x).reshape(2, half, *jnp.shape(x[0])), *filled)
    results = jax.lax.map(lambda row: jax.vmap(function)(*row), batch)
    return [jax.tree.map(lambda x, i=i: x[i // half, i % half], results) for i in range(len(rows))]
