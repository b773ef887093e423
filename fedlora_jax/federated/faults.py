"""Clients that fail or attack, to see what a method makes of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedlora_jax import bounds
from fedlora_jax.federated import randomness
from fedlora_jax.methods import Start, Trained, trained_mask
from fedlora_jax.names import lookup

# What `huge` multiplies a change by.
HUGE = 1e6


class Faults(NamedTuple):
    r"""What happens to a share of each round's cohort.

    A faulty client trains as any other, and what it keeps is what it has trained. What it sends is
    made, as by the method, of other values of all that it trains,

    .. math:: \theta' = \text{keep} \cdot \theta_0 + \text{gain} \cdot (\theta - \theta_0)

    with :math:`\theta_0` where it started from and :math:`\theta` where it arrived, factors and
    head. A client that does not answer has weight zero, and its state stays as it was. All numbers
    may be traced, so that one program serves all kinds.

    Attributes:
      share: Of the cohort, rounded to the nearest number of clients.
      keep: 1 but for a client that sends zeros.
      gain: 1 for an honest client.
      answers: Whether anything arrives.
    """

    share: ArrayLike
    keep: ArrayLike
    gain: ArrayLike
    answers: ArrayLike


KINDS = ("dropout", "crash", "nan", "huge", "zeros", "sign_flip")


def make(kind: str, *, share: float, factor: float = 1.0) -> Faults | None:
    r"""The faults of a kind.

    * `dropout`: the client never answers. `crash`: it stops amid its round. To the server, and to
      what the client keeps, they are the same: nothing arrives, and its state stays.
    * `nan`: all that it sends is NaN.
    * `huge`: its change is :math:`10^6` times the factor as large.
    * `zeros`: all values that it sends are zero, those of the head too.
    * `sign_flip`: it sends :math:`\theta_0 - \text{factor} \cdot (\theta - \theta_0)`, which undoes
      what the others learn.

    Args:
      kind: One of `KINDS`, or `none`.
      share: Of each round's cohort, from 0 to 1.
      factor: Of `huge` and `sign_flip`.

    Returns:
      None for `none`.

    Raises:
      ValueError: If there is no such kind, or a number is out of its bounds.
    """
    bounds.check("faults", share=share, factor=factor)
    gains = {"nan": jnp.nan, "huge": HUGE * factor, "zeros": 0.0, "sign_flip": -factor}
    if lookup(dict.fromkeys(("none", *KINDS), kind), kind, "kind of faults") == "none":
        return None
    return Faults(
        share=share,
        keep=float(kind != "zeros"),
        gain=gains.get(kind, 1.0),
        answers=kind not in ("dropout", "crash"),
    )


def drawn(faults: Faults, seed: jax.Array, round_index: jax.Array, cohort: jax.Array) -> jax.Array:
    """Which clients of a cohort are faulty in this round, the same for every method under a seed.

    Args:
      faults: How many.
      seed: The seed's key.
      round_index: The round.
      cohort: Identities, int32 `[K]`; -1 for nobody.

    Returns:
      bool `[K]`.
    """

    def lot(client: jax.Array) -> jax.Array:
        return jax.random.uniform(randomness.of_client(seed, "faults", round_index, client))

    present = cohort >= 0
    lots = jnp.where(present, jax.vmap(lot)(cohort), jnp.inf)
    count = jnp.round(faults.share * jnp.sum(present, dtype=jnp.float32)).astype(jnp.int32)
    return jnp.argsort(jnp.argsort(lots)) < count


def sent(faults: Faults, faulty: jax.Array, start: Start, trained: Trained) -> Trained:
    """What a client claims to have trained: the truth, unless it is faulty.

    Args:
      faults: What is wrong with it then.
      faulty: Whether it is, `[]`.
      start: Where it started from.
      trained: Where it arrived. The mean gradient of a false change is `gain` times the true one.
    """

    def false(moves: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
        claimed = faults.keep * first + faults.gain * (last - first)
        return jnp.where(faulty & moves, claimed, last).astype(last.dtype)

    return Trained(
        jax.tree.map(false, trained_mask(start), start.trainable, trained.trainable),
        jax.tree.map(lambda g: jnp.where(faulty, faults.gain * g, g), trained.gradient),
    )
