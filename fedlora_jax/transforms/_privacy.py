"""Client-level differential privacy: clip each client's change, average, add noise."""

import functools
import zlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from optax.contrib import differentially_private_aggregate

from fedlora_jax import bounds
from fedlora_jax.aggregation import Aggregated
from fedlora_jax.methods import (
    Method,
    Server,
    Start,
    Trainable,
    Trained,
    check_combination,
    trained_mask,
)
from fedlora_jax.methods._base import ROBUST, PyTree
from fedlora_jax.transforms import _base

_STREAM = zlib.crc32(b"privacy")


def private(
    method: Method, *, clip: float, noise_multiplier: float, cohort_size: int | None = None
) -> Method:
    r"""The server sees no more than a noisy mean of clipped changes.

    With :math:`\Delta_k` what client k sends less the server's own values, all factors and the head
    as one vector,

    .. math::
      \bar\Delta = \frac{1}{K} \left( \sum_k \Delta_k \min\left(1, \frac{C}{\lVert \Delta_k \rVert}
      \right) + \mathcal{N}(0, z^2 C^2 I) \right)

    and the method aggregates as if one client had sent that. What a client does not train in the
    round, a factor that rests or what is beyond its rank, is not sent and counts as no change: the
    zeros that stand there would use up the clip, and are not averaged either.
    Weights are equal, whatever the examples of the clients; one that is left out counts as no
    change. The mechanics are those of `optax.contrib.differentially_private_aggregate`. `epsilon`
    gives the guarantee. Whatever one client sends, it moves the noiseless mean by at most C / K, to
    rounding, and another upload in its place by 2 C / K.

    Noise in both factors multiplies: a method that trains one factor at a time (`ffa_lora`,
    `fedsvd`, `rolora`) keeps it linear, and is made for this.

    The noise is drawn from the experiment's seed, so that it can be reproduced: that is for
    research. Whoever deploys it needs a secret seed.

    Args:
      method: A method whose server uses the mean of what clients send, and nothing else of it.
      clip: C, the largest norm of a client's change.
      noise_multiplier: z.
      cohort_size: K; by default as many as there are uploads. On a mesh there can be more of these,
        in the places of nobody.

    Raises:
      ValueError: If the server of the method needs more than the mean, the clip is not positive, or
        the noise multiplier negative.

    References:
      McMahan et al., *Learning Differentially Private Recurrent Language Models*, ICLR 2018,
      arXiv:1710.06963. Sun et al. (FFA-LoRA), ICLR 2024, arXiv:2403.12313.
    """
    check_combination(method, "privacy", "differential privacy")
    bounds.check("private", clip=clip, noise_multiplier=noise_multiplier, cohort_size=cohort_size)

    def init(key: jax.Array, server: Server) -> tuple[Server, PyTree]:
        server, client = method.init(key, server)
        # As bare numbers, which every checkpoint can hold.
        return _base.outer(server, jax.random.key_data(jax.random.fold_in(key, _STREAM))), client

    def finish(
        server: Server, client: PyTree, start: Start, trained: Trained
    ) -> tuple[Trainable, PyTree]:
        upload, client = method.finish(_base.inner(server), client, start, trained)
        moves, own = trained_mask(start).adapters, server.trainable.adapters
        adapters = jax.tree.map(jnp.where, moves, upload.adapters, own)
        return upload._replace(adapters=adapters), client

    def aggregate(
        server: Server, uploads: Trainable, weights: jax.Array
    ) -> tuple[Server, Aggregated | None]:
        known = _base.inner(server)
        key = jax.random.fold_in(jax.random.wrap_key_data(server.memory.own), server.round)
        mechanism = differentially_private_aggregate(clip, noise_multiplier, key)

        def change(sent: jax.Array, own: jax.Array) -> jax.Array:
            present = (weights > 0).reshape(-1, *[1] * own.ndim)
            return jnp.where(present, sent - own[None], 0)

        changes = jax.tree.map(change, uploads, known.trainable)
        # Products of fewer digits, as accelerators have them, would round changes above the clip.
        with jax.default_matmul_precision("highest"):
            mean, _ = mechanism.update(changes, mechanism.init(None))
        places = len(weights) / (cohort_size or len(weights))
        noisy = jax.tree.map(lambda own, x: (own + places * x)[None], known.trainable, mean)
        changed, aggregated = method.aggregate(known, noisy, jnp.ones(1))
        return _base.outer(changed, server.memory.own), aggregated

    return _base.around(
        method,
        init=init,
        finish=finish,
        aggregate=aggregate,
        equal_weights=True,
        refuses={
            **method.refuses,
            "scaffold": "its control variates would be sent unprotected",
            **dict.fromkeys(ROBUST, "its server sees a noisy mean alone"),
        },
    )


@functools.cache
def epsilon(
    *, noise_multiplier: float, num_clients: int, cohort_size: int, rounds: int, delta: float
) -> float:
    r"""The :math:`\varepsilon` of :math:`(\varepsilon, \delta)` client-level privacy after rounds.

    Two federations are neighbours if one client's data differ in them. A cohort is drawn without
    replacement each round, and the accounting is that of Rényi divergences (Wang et al., 2019), by
    Google's library `dp-accounting`; where most clients are drawn its bound can lie above that
    without sampling, which holds too, and the lower one is taken. Replacing a client moves the
    clipped sum by up to 2 C, so that the noise is :math:`z / 2` of that sensitivity.

    Args:
      noise_multiplier: z of `private`.
      num_clients: N.
      cohort_size: K.
      rounds: How many.
      delta: :math:`\delta`; well below 1 / N.

    Returns:
      :math:`\varepsilon`; infinite without noise.

    Raises:
      ImportError: If the extra `privacy` is not installed.
      ValueError: If a number is out of its bounds.

    References:
      Wang, Balle, Kasiviswanathan, *Subsampled Rényi Differential Privacy and Analytical Moments
      Accountant*, AISTATS 2019, arXiv:1808.00087.
    """
    bounds.check(
        "epsilon",
        noise_multiplier=noise_multiplier,
        num_clients=num_clients,
        cohort_size=cohort_size,
        rounds=rounds,
        delta=delta,
    )
    if noise_multiplier == 0:
        return float("inf")
    library = _library()
    whole = library.GaussianDpEvent(noise_multiplier / 2)
    sampled = library.SampledWithoutReplacementDpEvent(num_clients, cohort_size, whole)

    def spent(event: Any) -> float:
        accountant = library.rdp.RdpAccountant(
            neighboring_relation=library.NeighboringRelation.REPLACE_ONE
        )
        accountant.compose(event, rounds)
        return float(accountant.get_epsilon(delta))

    return min(spent(whole), spent(sampled))


def _library() -> ModuleType:
    try:
        import dp_accounting
    except ImportError as error:
        raise ImportError(
            "accounting of differential privacy needs the library dp-accounting: "
            "pip install -e '.[privacy]'"
        ) from error
    return dp_accounting
