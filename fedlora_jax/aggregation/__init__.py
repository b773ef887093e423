"""What the server computes: pure functions on stacked LoRA adapters.

Every function has one signature:

    aggregated = aggregation.lora_fair(stacked, weights, **hyperparameters)

`stacked` is any pytree whose leaves are `Factors(a [K, d_in, r], b [K, r, d_out])`, K clients on
the leading axis (`stack` makes one from a list of clients, also of unequal ranks). `weights` is
`[K]`, non-negative numbers of any type and size, normalised inside (`shares`); weight 0 is the same
as absence. The result is `Aggregated(adapters, residual)`; the new global model is
`backbone + scale (residual + adapters)`. Layers that are stacked, as for a scan over them, are
mapped over: `jax.vmap(aggregation.flexlora, in_axes=(0, None))` takes `a [L, K, d_in, r]`.
Nothing of size d_in x d_out is ever formed, and arithmetic is in float32 at the least, whatever the
storage type. All functions can be called under `jit`, `vmap` and `grad`.

Errors. Outside jit a ValueError says what is wrong: shapes that do not fit, weights that are
negative, not finite or all zero, an upload that is not finite (and whose). Values cannot be checked
while tracing: there a client with a negative or non-finite weight, or with anything non-finite in
its upload, counts as absent, and if nobody is left the means are zero. The result is finite as long
as the type holds the products; only the descent of `lora_fair(units='raw')`, the authors', runs
away from large factors.
"""

from collections.abc import Callable

from fedlora_jax.aggregation._base import (
    Aggregated,
    UnequalFactors,
    cut,
    present_clients,
    shares,
    stack,
)
from fedlora_jax.aggregation._diagnostics import Diagnostics, diagnostics
from fedlora_jax.aggregation._error import error
from fedlora_jax.aggregation._fedex_lora import fedex_lora
from fedlora_jax.aggregation._fedit import fedit
from fedlora_jax.aggregation._fedrot_lora import fedrot_lora
from fedlora_jax.aggregation._fedsa_lora import fedsa_lora
from fedlora_jax.aggregation._fedsvd import fedsvd
from fedlora_jax.aggregation._ffa_lora import ffa_lora
from fedlora_jax.aggregation._flexlora import flexlora
from fedlora_jax.aggregation._flora import flora
from fedlora_jax.aggregation._flora_na import flora_na
from fedlora_jax.aggregation._frlora import frlora
from fedlora_jax.aggregation._hetlora import hetlora, tail_penalty
from fedlora_jax.aggregation._lora_fair import lora_fair
from fedlora_jax.aggregation._ordered import ordered
from fedlora_jax.aggregation._robust import (
    check_krum,
    clip_scales,
    coordinate_median,
    coordinate_trimmed_mean,
    geometric_median_weights,
    gram,
    krum_weights,
)
from fedlora_jax.aggregation._rolora import rolora
from fedlora_jax.aggregation._spectral import spectral
from fedlora_jax.names import lookup

REGISTRY: dict[str, Callable[..., Aggregated]] = {
    function.__name__: function
    for function in (
        fedex_lora,
        fedit,
        fedrot_lora,
        fedsa_lora,
        fedsvd,
        ffa_lora,
        flexlora,
        flora,
        flora_na,
        frlora,
        hetlora,
        lora_fair,
        rolora,
        spectral,
    )
}


def get(name: str) -> Callable[..., Aggregated]:
    """The aggregation function called `name`.

    Raises:
      ValueError: If there is none; it lists the names, the nearest one first.
    """
    return lookup(REGISTRY, name, "aggregation function")


__all__ = [
    "REGISTRY",
    "Aggregated",
    "Diagnostics",
    "UnequalFactors",
    "check_krum",
    "clip_scales",
    "coordinate_median",
    "coordinate_trimmed_mean",
    "cut",
    "diagnostics",
    "error",
    "geometric_median_weights",
    "get",
    "gram",
    "krum_weights",
    "ordered",
    "present_clients",
    "shares",
    "stack",
    "tail_penalty",
    "fedex_lora",
    "fedit",
    "fedrot_lora",
    "fedsa_lora",
    "fedsvd",
    "ffa_lora",
    "flexlora",
    "flora",
    "flora_na",
    "frlora",
    "hetlora",
    "lora_fair",
    "rolora",
    "spectral",
]
