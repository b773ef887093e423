"""How much memory a round needs, known before the first one runs, and how much there is."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import psutil

from fedlora_jax.federated.round import CohortRound, RoundFunction

# Evaluation, checkpoints and other programs want some memory too.
_SHARE = 0.8


class Memory(NamedTuple):
    """Bytes on a device.

    Attributes:
      held: The state, before and after the round, and the data.
      working: What the round needs besides: activations, gradients and optimiser states of the
        clients that train at once, and the server's step.
      limit: What there is for both; None if the device does not say.
    """

    held: int
    working: int
    limit: int | None

    def __str__(self) -> str:
        text = f"{readable(self.held)} of state and data, {readable(self.working)} to train"
        return text if self.limit is None else f"{text}, of {readable(self.limit)} that are free"

    @property
    def fits(self) -> bool:
        """Whether there is that much, as far as is known."""
        return self.limit is None or self.held + self.working <= self.limit

    @property
    def fits_easily(self) -> bool:
        """Whether a fifth of what there is would be left."""
        return self.limit is None or self.held + self.working <= _SHARE * self.limit


def estimate(round_function: RoundFunction | CohortRound, *arguments: Any) -> Memory | None:
    """The memory of a round with these arguments, as the compiler plans it.

    The round is compiled, not run; its first call with the same shapes then need not compile.

    Returns:
      None if the compiler does not say.
    """
    planned = round_function.lower(*arguments).compile().memory_analysis()
    if planned is None:
        return None
    held = planned.argument_size_in_bytes + planned.output_size_in_bytes
    free = _free(_devices(arguments))
    return Memory(
        held - planned.alias_size_in_bytes,
        planned.temp_size_in_bytes,
        # The arguments are there already.
        None if free is None else free + planned.argument_size_in_bytes,
    )


def readable(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _devices(arguments: Any) -> list[jax.Device]:
    """This process's devices on which the arguments are."""
    arrays = [x for x in jax.tree.leaves(arguments) if isinstance(x, jax.Array)]
    found = {device for x in arrays for device in x.sharding.addressable_devices}
    return list(found) or jax.local_devices()[:1]


def _free(devices: list[jax.Device]) -> int | None:
    """Bytes free on the fullest device; None if one does not say."""
    if devices[0].platform == "cpu":  # They share one memory.
        return _free_on_host() // len(devices)
    statistics = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in each for each in statistics):
        return None
    return min(each["bytes_limit"] - each["bytes_in_use"] for each in statistics)


def _free_on_host() -> int:
    """What is free in the machine, and in the control groups that bound this process."""
    return min([psutil.virtual_memory().available, *free_in_groups()])


def free_in_groups(
    own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Bytes free in each of Linux's control groups around this process that has a limit.

    Args:
      own: Which groups it is in, both versions.
      root: Where the groups are.

    Returns:
      An empty list where there are no such groups, or no limits.
    """
    if not own.exists():
        return []
    found = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be one of the host; the container's own group is the base.
        group = Path(path.lstrip("/"))
        for part in (group, *group.parents):
            free = _free_in_group(base / part, *names)
            if free is not None:
                found.append(free)
    return found


def _free_in_group(group: Path, limit: str, usage: str, idle: str) -> int | None:
    try:
        bound, used = (group / limit).read_text(), (group / usage).read_text()
        statistics = dict(line.split() for line in (group / "memory.stat").open())
    except OSError:
        return None
    if not bound.strip().isdigit():  # "max"
        return None
    # Pages of files that nobody reads make place when asked to.
    return max(0, int(bound) - int(used) + int(statistics.get(idle, 0)))
