"""Vision Transformer, written to be read.

The architecture of Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021,
arXiv:2010.11929), with the numerical choices of the Hugging Face `ViTModel` (exact GELU, LayerNorm
epsilon 1e-12), whose released weights fit parameter by parameter. Every projection is a plain
`nn.Dense` with a two-dimensional kernel and every module has a fixed name, so that an adapter can
be addressed as `block_0/attention/query`.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fedlora_jax.blocks import over_blocks


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    r"""What `jax.nn.dot_product_attention` computes, in the form whose gradient costs less on CPU.

    With scores s and the largest m of a row, it is
    :math:`\sum_j e^{s_j - m} v_j \,/\, \sum_j e^{s_j - m}`: divided after the product, so that the
    division and, in the gradient, the sums over rows do not pass over all scores.

    Args:
      query: `[B, T, heads, head_dim]`.
      key: The same.
      value: The same.

    Returns:
      The same, in the type of the values; scores and sums are float32.
    """
    # Heads before tokens, so that each product is one of stacks of matrices.
    query = jnp.transpose(query / math.sqrt(query.shape[-1]), (0, 2, 1, 3))
    key, value = jnp.transpose(key, (0, 2, 3, 1)), jnp.transpose(value, (0, 2, 1, 3))
    scores = jnp.matmul(query, key, preferred_element_type=jnp.float32)
    most = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - most)
    mixed = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    mixed /= jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.transpose(mixed.astype(value.dtype), (0, 2, 1, 3))


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, `x / 2 * (1 + erf(x / sqrt(2)))`.

    `jax.nn.gelu` takes erfc, which keeps the tail exact in small types and costs more;
    float32 has digits enough without.
    """
    if x.dtype != jnp.float32:
        return jax.nn.gelu(x, approximate=False)
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, width] -> [B, T, width]`."""
        batch, tokens, width = x.shape

        def project(name: str) -> jax.Array:
            heads = nn.Dense(width, dtype=self.dtype, name=name)(x)
            return heads.reshape(batch, tokens, self.num_heads, width // self.num_heads)

        query, key, value = project("query"), project("key"), project("value")
        mixed = attention(query, key, value)
        return nn.Dense(width, dtype=self.dtype, name="out")(mixed.reshape(x.shape))


class MLP(nn.Module):
    """Two dense layers around a GELU, applied to each token."""

    hidden_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, width] -> [B, T, width]`."""
        hidden = nn.Dense(self.hidden_dim, dtype=self.dtype, name="fc1")(x)
        hidden = gelu(hidden)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)


class Block(nn.Module):
    """A pre-LayerNorm Transformer block."""

    num_heads: int
    mlp_dim: int
    layer_norm_epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, width] -> [B, T, width]`."""

        def normalise(x: jax.Array, name: str) -> jax.Array:
            return nn.LayerNorm(self.layer_norm_epsilon, dtype=self.dtype, name=name)(x)

        x = x + Attention(self.num_heads, self.dtype, name="attention")(normalise(x, "norm1"))
        return x + MLP(self.mlp_dim, self.dtype, name="mlp")(normalise(x, "norm2"))


class ViT(nn.Module):
    """Vision Transformer classifier.

    Attributes:
      num_classes: Number of logits.
      patch_size: Side of the square patches, in pixels. Image sides must be multiples of it.
      width: Size of a token.
      depth: Number of blocks.
      num_heads: Attention heads a block; divides `width`.
      mlp_dim: Hidden units of a block's MLP; `4 * width` when None.
      layer_norm_epsilon: Added to variances: 1e-12 in Hugging Face's models, 1e-6 in timm's and in
        the original releases.
      dtype: Type of the arithmetic. Parameters and logits are float32 whatever it is.
      remat: Recompute each block in the backward pass instead of storing its activations.
    """

    num_classes: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int | None = None
    layer_norm_epsilon: float = 1e-12
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
          ValueError: If the patches do not tile the image or the heads do not divide the width.
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
        x = self._add_class_token_and_positions(x)

        kind = nn.remat(Block) if self.remat else Block
        mlp_dim = self.mlp_dim or 4 * self.width

        def block(name: str) -> nn.Module:
            return kind(self.num_heads, mlp_dim, self.layer_norm_epsilon, self.dtype, name=name)

        x = over_blocks(self, block, self.depth, x)

        norm = nn.LayerNorm(self.layer_norm_epsilon, dtype=self.dtype, name="norm")
        return nn.Dense(self.num_classes, name="head")(norm(x[:, 0]).astype(jnp.float32))

    def _add_class_token_and_positions(self, patches: jax.Array) -> jax.Array:
        """Prepends the class token and adds positions, `[B, P, width] -> [B, P + 1, width]`."""
        batch, num_patches, width = patches.shape
        class_token = self.param("class_token", nn.initializers.zeros, (1, 1, width), jnp.float32)
        normal, shape = nn.initializers.normal(0.02), (1, num_patches + 1, width)
        positions = self.param("position_embedding", normal, shape, jnp.float32)
        class_tokens = jnp.broadcast_to(class_token, (batch, 1, width)).astype(patches.dtype)
        return jnp.concatenate([class_tokens, patches], axis=1) + positions.astype(patches.dtype)

    def _check(self, images: jax.Array) -> None:
        if images.ndim != 4:
            raise ValueError(f"images must be [B, H, W, C], not of shape {images.shape}")
        height, width = images.shape[1:3]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"patches of {self.patch_size} pixels do not tile images of {height} x {width}"
            )
        if self.width % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide a width of {self.width}")
