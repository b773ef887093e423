"""The upper reference: all data in one place."""

from fedlora_jax import aggregation
from fedlora_jax.methods._base import Method, averaging


def central() -> Method:
    """One client holds all the data and sees as many examples a round as a cohort together."""
    return averaging(aggregation.fedit)._replace(pooled=True, download=lambda server: ())
