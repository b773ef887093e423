"""BERT and RoBERTa encoders, written to be read.

The architectures of Devlin et al., "BERT" (NAACL 2019), and Liu et al., "RoBERTa"
(arXiv:1907.11692), as Hugging Face's `BertModel`, `BertForSequenceClassification` and
`RobertaForSequenceClassification` compute them without dropout; their released weights fit
parameter by parameter. The two differ in how positions are counted and in nothing else: both
classification heads are a dense layer and a tanh on the first token, and a dense layer. Sentence
encoders such as MiniLM are `pooling='mean'`.

Every projection is a plain `nn.Dense` with a fixed name, so that an adapter can be addressed as
`block_0/attention/query`.
"""

from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fedlora_jax.blocks import over_blocks

Variant = Literal["bert", "roberta"]
Pooling = Literal["none", "first", "mean"]


class Attention(nn.Module):
    """Multi-head attention to all tokens that are not masked."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """`[B, T, width] -> [B, T, width]`, mask `[B, T]`."""
        batch, tokens, width = x.shape

        def project(name: str) -> jax.Array:
            heads = nn.Dense(width, dtype=self.dtype, name=name)(x)
            return heads.reshape(batch, tokens, self.num_heads, width // self.num_heads)

        query, key, value = project("query"), project("key"), project("value")
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        return nn.Dense(width, dtype=self.dtype, name="out")(mixed.reshape(x.shape))


class Block(nn.Module):
    """A post-LayerNorm Transformer block."""

    num_heads: int
    mlp_dim: int
    layer_norm_epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """`[B, T, width] -> [B, T, width]`, mask `[B, T]`."""

        def normalise(x: jax.Array, name: str) -> jax.Array:
            return nn.LayerNorm(self.layer_norm_epsilon, dtype=self.dtype, name=name)(x)

        attended = Attention(self.num_heads, self.dtype, name="attention")(x, mask)
        x = normalise(x + attended, "norm1")
        hidden = nn.Dense(self.mlp_dim, dtype=self.dtype, name="fc1")(x)
        hidden = nn.gelu(hidden, approximate=False)
        out = nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)
        return normalise(x + out, "norm2")


class Bert(nn.Module):
    """BERT or RoBERTa, as an encoder, a sentence encoder or a classifier.

    Attributes:
      vocab_size: Number of token ids.
      width: Size of a token.
      depth: Number of blocks.
      num_heads: Attention heads a block; divides `width`.
      num_classes: Number of logits; no head when None.
      pooling: What the head sees, or what is returned without one. `'first'`: the first token after
        a dense layer and a tanh, BERT's pooler and RoBERTa's head; `'mean'`: the mean of the tokens
        that are not masked; `'none'`: each token.
      variant: `'bert'` counts positions from 0; `'roberta'` from `pad_token + 1`, over tokens that
        are not padding.
      pad_token: Token id of padding, masked unless a mask is given.
      mlp_dim: Hidden units of a block's MLP; `4 * width` when None.
      num_positions: Rows of the position table, RoBERTa's unused ones included.
      num_token_types: Rows of the token type table.
      layer_norm_epsilon: Added to variances.
      dtype: Type of the arithmetic. What is returned is float32 whatever it is.
      remat: Recompute each block in the backward pass instead of storing its activations.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_classes: int | None = None
    pooling: Pooling = "first"
    variant: Variant = "bert"
    pad_token: int = 0
    mlp_dim: int | None = None
    num_positions: int = 512
    num_token_types: int = 2
    layer_norm_epsilon: float = 1e-12
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
    ) -> jax.Array:
        """Encodes or classifies texts.

        Args:
          tokens: Token ids `[B, T]`.
          mask: `[B, T]`, true for tokens to attend to; by default those that are not padding.
          token_types: `[B, T]`, which segment a token belongs to; by default all the first.

        Returns:
          Logits `[B, num_classes]`, or `[B, width]` without a head; with `pooling='none'` the same
          a token, `[B, T, ...]`. Float32.

        Raises:
          ValueError: If the texts are longer than the position table allows, or on an unknown
            pooling or variant.
        """
        self._check(tokens)
        mask = tokens != self.pad_token if mask is None else mask.astype(bool)
        x = self._embed(tokens, token_types)

        kind = nn.remat(Block) if self.remat else Block
        mlp_dim = self.mlp_dim or 4 * self.width

        def block(name: str) -> nn.Module:
            return kind(self.num_heads, mlp_dim, self.layer_norm_epsilon, self.dtype, name=name)

        x = over_blocks(self, block, self.depth, x, mask)

        x = x.astype(jnp.float32)
        if self.pooling == "first":
            x = jnp.tanh(nn.Dense(self.width, name="pooler")(x[:, 0]))
        elif self.pooling == "mean":
            count = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
            x = jnp.sum(x, axis=1, where=mask[..., None]) / count
        return x if self.num_classes is None else nn.Dense(self.num_classes, name="head")(x)

    def _embed(self, tokens: jax.Array, token_types: jax.Array | None) -> jax.Array:
        """The normalised sum of word, position and token type embeddings, `[B, T, width]`."""

        def look_up(rows: int, name: str, index: jax.Array) -> jax.Array:
            return nn.Embed(rows, self.width, dtype=self.dtype, name=name)(index)

        if token_types is None:
            token_types = jnp.zeros_like(tokens)
        x = (
            look_up(self.vocab_size, "word_embedding", tokens)
            + look_up(self.num_positions, "position_embedding", self._positions(tokens))
            + look_up(self.num_token_types, "token_type_embedding", token_types)
        )
        return nn.LayerNorm(self.layer_norm_epsilon, dtype=self.dtype, name="embedding_norm")(x)

    def _positions(self, tokens: jax.Array) -> jax.Array:
        if self.variant == "bert":
            return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        real = (tokens != self.pad_token).astype(jnp.int32)
        return self.pad_token + jnp.cumsum(real, axis=1) * real

    def _check(self, tokens: jax.Array) -> None:
        for name, value, kind in (
            ("pooling", self.pooling, Pooling),
            ("variant", self.variant, Variant),
        ):
            if value not in get_args(kind):
                raise ValueError(f"unknown {name} {value!r}; expected one of {get_args(kind)}")
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [B, T], not of shape {tokens.shape}")
        longest = self.num_positions - (self.pad_token + 1 if self.variant == "roberta" else 0)
        if tokens.shape[1] > longest:
            raise ValueError(
                f"texts of {tokens.shape[1]} tokens are too long: there are {longest} positions"
            )
