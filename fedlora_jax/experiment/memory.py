"""How much memory a round needs, known before the first one runs."""

from typing import Any, NamedTuple

import jax

from fedlora_jax.federated.round import CohortRoundFunction, RoundFunction


class Memory(NamedTuple):
    """Bytes on a device.

    Attributes:
      held: The state, before and after the round, and the data.
      working: What the round needs besides: activations, gradients and optimiser states of the
        clients that train at once, and the server's step.
      limit: What the device has; None if it does not say.
    """

    held: int
    working: int
    limit: int | None

    def __str__(self) -> str:
        text = f"{_readable(self.held)} of state and data, {_readable(self.working)} to train"
        return text if self.limit is None else f"{text}, of {_readable(self.limit)} on the device"

    @property
    def fits(self) -> bool:
        """Whether the device has that much, as far as is known."""
        return self.limit is None or self.held + self.working <= self.limit


def estimate(round_function: RoundFunction | CohortRoundFunction, *arguments: Any) -> Memory | None:
    """The memory of a round with these arguments, as the compiler plans it.

    The round is compiled, not run; its first call with the same shapes then need not compile.

    Returns:
      None if the compiler does not say.
    """
    planned = round_function.lower(*arguments).compile().memory_analysis()
    if planned is None:
        return None
    statistics = jax.local_devices()[0].memory_stats() or {}
    held = planned.argument_size_in_bytes + planned.output_size_in_bytes
    return Memory(
        held - planned.alias_size_in_bytes,
        planned.temp_size_in_bytes,
        statistics.get("bytes_limit"),
    )


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
