"""Types of numbers in which a federation learns what the stored ones would round away."""

import zlib

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fedlora_jax import lora, lowrank
from fedlora_jax.federated.outline import PyTree, outline
from fedlora_jax.methods import Method, Server


def with_wide_trainable(server: Server) -> Server:
    """The server with what is trained, adapters and head, in float32 or wider."""
    return server._replace(trainable=jax.tree.map(lowrank.wide, server.trainable))


def with_wide_kernels(method: Method, server: Server, client: PyTree, rank: jax.Array) -> Server:
    """The server whose backbone has the types that a round of the method would leave it with.

    A method that merges leaves float32 in the kernels that it merges into (`methods.absorb`). To
    have them so from the start keeps a round one program. Other methods change nothing.
    """
    kernels = lora.kernels(server.backbone)
    if all(kernels[path].dtype == jnp.float32 for path in server.trainable.adapters):
        return server
    # Of one client some methods merge nothing, with two they do what they do with any number.
    after = outline(method, server, client, rank, cohort_size=2).server.backbone
    backbone = jax.tree.map(lambda x, like: x.astype(like.dtype), server.backbone, after)
    return server._replace(backbone=backbone)


def off_the_grid(key: jax.Array, server: Server, dtype: DTypeLike) -> Server:
    r"""The server with random digits below the last place of bfloat16 in its adapted kernels.

    A model that computes in bfloat16 rounds its kernels at use. Entries that were stored in
    bfloat16 lie on the grid of its numbers, where :math:`\text{round}(w + d) = w` for all d
    smaller than half a unit in the last place: what is merged into them goes unseen until it is 0.2
    to 0.4% of the entry, in all entries at once. With :math:`w' = w + u`, u uniform between minus
    and plus half a unit,

    .. math:: \text{round}(w') = w, \qquad E_u[\text{round}(w' + d)] = w + d ,

    so the model at the start is the same to the bit, and of every change as many entries make the
    step as the change is large. The digits are drawn once: what is merged stays exact, and
    training, evaluation and a bfloat16 copy of the kernel agree. A kernel stored in float32 has
    its own digits and keeps them.

    Args:
      key: A random key; the digits of a kernel depend on it and on its path.
      server: Float32 kernels are treated, others stay. What is on the host stays there.
      dtype: Type of the model's arithmetic; nothing is done if it is not bfloat16.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return server

    def drawn(path: str, kernel: jax.Array) -> jax.Array:
        if kernel.dtype != jnp.float32:
            return kernel
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        found = _with_digits(path_key, kernel)
        return found if isinstance(kernel, jax.Array) else jax.device_get(found)

    backbone = lora.map_kernels(server.backbone, server.trainable.adapters, drawn)
    return server._replace(backbone=backbone)


# The bits of a float32 that bfloat16 does not have.
_BELOW = 0xFFFF


@jax.jit
def _with_digits(key: jax.Array, kernel: jax.Array) -> jax.Array:
    """Numbers of bfloat16 with random digits less than half a unit away; others and zero stay.

    Sign and magnitude are apart in a float's bits, so that adding to them moves the magnitude, also
    across a power of two, where the unit below is half of that above.
    """
    bits = jax.lax.bitcast_convert_type(kernel, jnp.int32)
    half = _BELOW // 2
    digits = jax.random.randint(key, kernel.shape, -half, half + 1, jnp.int32)
    on_grid = (bits & _BELOW == 0) & (kernel != 0) & jnp.isfinite(kernel)
    return jax.lax.bitcast_convert_type(jnp.where(on_grid, bits + digits, bits), jnp.float32)
