"""The upper reference: all data in one place."""

from fedlora_jax.methods._base import COMBINATIONS, Method
from fedlora_jax.methods._fedit import fedit


def central() -> Method:
    """One client holds all the data and sees as many examples a step as a cohort together."""
    return fedit()._replace(
        pooled=True,
        free_basis=False,
        sent=lambda upload, round_index: (),
        received=lambda server, aggregated, round_index: (),
        refuses=dict.fromkeys(
            set(COMBINATIONS) - {"unequal_ranks"},
            "all data lie in one place, so that nothing drifts and nothing is sent",
        ),
    )
