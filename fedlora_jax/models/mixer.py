"""MLP-Mixer, written to be read.

The architecture of Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision" (NeurIPS
2021), with the numerical choices of timm (exact GELU, LayerNorm epsilon 1e-6), whose released
weights fit parameter by parameter. Every projection is a plain `nn.Dense` with a fixed name, so
that an adapter can be addressed as `block_0/token_mlp/fc1`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fedlora_jax.blocks import over_blocks
from fedlora_jax.models.vit import MLP

LAYER_NORM_EPSILON = 1e-6


class MixerBlock(nn.Module):
    """An MLP over the tokens, then one over the channels."""

    token_mlp_dim: int
    channel_mlp_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, width] -> [B, T, width]`."""

        def normalise(x: jax.Array, name: str) -> jax.Array:
            return nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name=name)(x)

        tokens_last = jnp.swapaxes(normalise(x, "norm1"), 1, 2)
        mixed = MLP(self.token_mlp_dim, self.dtype, name="token_mlp")(tokens_last)
        x = x + jnp.swapaxes(mixed, 1, 2)
        return x + MLP(self.channel_mlp_dim, self.dtype, name="channel_mlp")(normalise(x, "norm2"))


class Mixer(nn.Module):
    """MLP-Mixer classifier. Its token MLPs fix the image size: no position is interpolated.

    Attributes:
      num_classes: Number of logits.
      patch_size: Side of the square patches, in pixels. Image sides must be multiples of it.
      width: Size of a token.
      depth: Number of blocks.
      token_mlp_dim: Hidden units of the MLPs over tokens; `width // 2` when None.
      channel_mlp_dim: Hidden units of the MLPs over channels; `4 * width` when None.
      dtype: Type of the arithmetic. Logits are float32 whatever it is.
      remat: Recompute each block in the backward pass instead of storing its activations.
    """

    num_classes: int
    patch_size: int
    width: int
    depth: int
    token_mlp_dim: int | None = None
    channel_mlp_dim: int | None = None
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Classifies images.

        Args:
          images: `[B, H, W, C]`, floating point, already normalised.

        Returns:
          Logits `[B, num_classes]`, float32.

        Raises:
          ValueError: If the patches do not tile the image.
        """
        self._check(images)
        x = nn.Conv(
            self.width,
            kernel_size=(self.patch_size, self.patch_size),
            strides=self.patch_size,
            padding="VALID",
            dtype=self.dtype,
            name="patch_embedding",
        )(images)
        x = x.reshape(x.shape[0], -1, self.width)

        kind = nn.remat(MixerBlock) if self.remat else MixerBlock
        token_mlp_dim = self.token_mlp_dim or self.width // 2
        channel_mlp_dim = self.channel_mlp_dim or 4 * self.width

        def block(name: str) -> nn.Module:
            return kind(token_mlp_dim, channel_mlp_dim, self.dtype, name=name)

        x = over_blocks(self, block, self.depth, x)
        x = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name="norm")(x)
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=1).astype(jnp.float32))

    def _check(self, images: jax.Array) -> None:
        if images.ndim != 4:
            raise ValueError(f"images must be [B, H, W, C], not of shape {images.shape}")
        height, width = images.shape[1:3]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"patches of {self.patch_size} pixels do not tile images of {height} x {width}"
            )
