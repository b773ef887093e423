"""Llama decoder, written to be read.

The architecture of Touvron et al., "LLaMA" (arXiv:2302.13971) and "Llama 2" (arXiv:2307.09288), and
of Grattafiori et al., "The Llama 3 Herd of Models" (arXiv:2407.21783): RMSNorm, rotary position
embeddings, grouped-query attention and SwiGLU, as Hugging Face's `LlamaForCausalLM` computes them;
its released weights fit parameter by parameter. `fedlora_jax.models.generate` generates with it.

Every projection is a plain `nn.Dense` without head axes and with a fixed name, so that an adapter
can be addressed as `block_0/attention/query`.
"""

import math
import re
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fedlora_jax.blocks import LOOPED, over_blocks


class RopeScaling(NamedTuple):
    """Llama 3's stretching of the rotary wavelengths to contexts longer than it was trained on.

    Attributes:
      factor: By how much wavelengths longer than the original context are stretched.
      low_frequency_factor: Wavelengths above `original_context / low_frequency_factor` are
        stretched in full.
      high_frequency_factor: Those below `original_context / high_frequency_factor` are kept;
        between the two there is a smooth transition.
      original_context: Context length of the pretraining.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context: int


class LayerCache(NamedTuple):
    """Keys and values of one layer for S positions, `[B, S, num_kv_heads, head_dim]` each."""

    key: jax.Array
    value: jax.Array


class Cache(NamedTuple):
    """What the layers remember of a text, in the order of the blocks."""

    layers: tuple[LayerCache, ...]


class TokenScores(NamedTuple):
    """How well tokens were predicted.

    Attributes:
      nll: Negative log-likelihood of each, in nats, float32 `[B, T]`.
      correct: Whether it was the likeliest, bool `[B, T]`.
    """

    nll: jax.Array
    correct: jax.Array


# Tokens whose logits exist at the same time where they are only scored.
_CHUNK = 128


class RMSNorm(nn.Module):
    """`x / rms(x) * scale` over the last axis, the mean of squares in float32."""

    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width] -> [..., width]`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return wide.astype(self.dtype) * scale.astype(self.dtype)


def rotary_frequencies(head_dim: int, base: float, scaling: RopeScaling | None) -> jax.Array:
    """Radians a position by which each pair of channels turns, `[head_dim // 2]`, float32."""
    frequency = base ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequency
    turns = scaling.original_context * frequency / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return (kept + (1 - kept) / scaling.factor) * frequency


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Turns channel i of each head and channel `i + head_dim / 2`, as a pair, by an angle.

    Args:
      x: `[B, T, heads, head_dim]`.
      angle: `[B, T, head_dim // 2]`, float32.
    """
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angle: jax.Array,
        positions: jax.Array | None,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`[B, T, width] -> [B, T, width]`, and the cache with these tokens in it.

        Without positions and cache a token sees those before it.
        """

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

        def project(heads: int, name: str) -> jax.Array:
            return dense(heads * self.head_dim, name)(x).reshape(*x.shape[:2], heads, self.head_dim)

        query = rotate(project(self.num_heads, "query"), angle)
        key = rotate(project(self.num_kv_heads, "key"), angle)
        value = project(self.num_kv_heads, "value")
        if positions is None:
            mixed = causal_attention(query, key, value)
        else:
            if cache is None:
                visible = positions[:, None, :] <= positions[:, :, None]
            else:
                rows = jnp.arange(x.shape[0])[:, None]
                cache = LayerCache(
                    cache.key.at[rows, positions].set(key.astype(cache.key.dtype)),
                    cache.value.at[rows, positions].set(value.astype(cache.value.dtype)),
                )
                key, value = cache.key.astype(query.dtype), cache.value.astype(query.dtype)
                visible = jnp.arange(key.shape[1]) <= positions[:, :, None]
            mixed = jax.nn.dot_product_attention(query, key, value, mask=visible[:, None])
        return dense(x.shape[-1], "out")(mixed.reshape(*x.shape[:2], -1)), cache


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of each token to itself and those before it.

    In 16 bits on one of NVIDIA's cards since Ampere it is cuDNN's, which keeps no scores of pairs.
    On several it is not: JAX has open reports of failures there.

    Args:
      query: `[B, T, num_heads, head_dim]`.
      key: `[B, T, num_kv_heads, head_dim]`.
      value: Like `key`.

    Returns:
      `[B, T, num_heads, head_dim]`.
    """
    (_, length, _, head_dim), narrow = query.shape, query.dtype.itemsize == 2
    fused = narrow and length % 2 == 0 and head_dim % 8 == 0 and head_dim <= 128
    implementation: Literal["cudnn", "xla"] = "cudnn" if fused and _has_cudnn() else "xla"
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation=implementation
    )


def _has_cudnn() -> bool:
    capability = getattr(jax.devices()[0], "compute_capability", "")
    recent = re.fullmatch(r"\d+\.\d", capability) is not None and float(capability) >= 8
    return recent and jax.device_count() == 1


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    hidden_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, width] -> [B, T, width]`."""

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

        hidden = nn.silu(dense(self.hidden_dim, "gate")(x)) * dense(self.hidden_dim, "up")(x)
        return dense(x.shape[-1], "down")(hidden)


class Block(nn.Module):
    """A pre-RMSNorm Transformer block."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angle: jax.Array,
        positions: jax.Array | None,
        cache: LayerCache | None = None,
    ) -> Any:
        """`[B, T, width] -> [B, T, width]`; with a cache a pair, and these tokens in it."""

        def normalise(x: jax.Array, name: str) -> jax.Array:
            return RMSNorm(self.norm_epsilon, self.dtype, name=name)(x)

        attention = Attention(
            self.num_heads, self.num_kv_heads, self.head_dim, self.dtype, name="attention"
        )
        attended, cache = attention(normalise(x, "norm1"), angle, positions, cache)
        x = x + attended
        x = x + SwiGLU(self.mlp_dim, self.dtype, name="mlp")(normalise(x, "norm2"))
        return x if cache is None else (x, cache)


class Llama(nn.Module):
    """Llama language model.

    Attributes:
      vocab_size: Number of token ids.
      width: Size of a token.
      depth: Number of blocks.
      num_heads: Query heads a block.
      num_kv_heads: Key and value heads a block; divides `num_heads`.
      mlp_dim: Hidden units of a block's MLP.
      head_dim: Size of a head; `width // num_heads` when None.
      rope_base: Base of the rotary wavelengths.
      rope_scaling: How they are stretched, or None.
      norm_epsilon: Added to mean squares.
      tied: Whether the logits come from the embedding table instead of a head of their own.
      context: Most tokens of a text; None for no bound.
      dtype: Type of the arithmetic. Logits are float32 whatever it is.
      remat: Recompute each block in the backward pass instead of storing its activations.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    head_dim: int | None = None
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    tied: bool = False
    context: int | None = None
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        targets: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        only: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, Cache] | TokenScores:
        """The logits of each next token, or how well they predict given ones.

        A token sees those at positions up to its own, so padding on the right needs no mask: what
        is computed there is not seen from the left.

        Args:
          tokens: Token ids `[B, T]`.
          targets: Token ids `[B, T]` to be scored, the next one at each position. The logits are
            then made for 128 tokens at a time, and again in the backward pass only for a head that
            is trained or adapted: no array of `B T vocab_size` elements exists. First derivatives
            only.
          positions: `[B, T]`; by default 0 .. T-1.
          cache: Keys and values of S positions, from `empty_cache` or an earlier call; tokens are
            written at their positions, each below S, and see all positions up to their own.
          only: `[B]`, the one token of each text whose logits are wanted.

        Returns:
          With targets `TokenScores`. Without, logits `[B, T, vocab_size]`, or `[B, 1, vocab_size]`
          with `only`; float32. With a cache `(logits, cache)`.

        Raises:
          ValueError: If tokens are not `[B, T]`, are more than the context, or targets are of
            another shape or come with a cache or `only`; if there is a cache and parameters are
            stacked; or if the heads do not divide.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [B, T], not of shape {tokens.shape}")
        self.check_length(tokens.shape[1])
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(f"targets are {targets.shape}, but tokens {tokens.shape}")
        if targets is not None and (cache is not None or only is not None):
            raise ValueError("targets are scored of whole texts: no cache, and not `only` some")
        if cache is not None and self.has_variable("params", LOOPED):
            raise ValueError("no cache with stacked blocks: give them as before blocks.stack")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} key heads do not divide {self.num_heads} heads")
        if positions is None:
            at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            positions = None if cache is None else at
        else:
            at = positions
        frequency = rotary_frequencies(self._head_dim, self.rope_base, self.rope_scaling)
        angle = at[..., None].astype(jnp.float32) * frequency

        embedding = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="embedding")
        x = embedding(tokens)
        kind = nn.remat(Block) if self.remat else Block

        def block(name: str) -> nn.Module:
            return kind(
                self.num_heads,
                self.num_kv_heads,
                self._head_dim,
                self.mlp_dim,
                self.norm_epsilon,
                self.dtype,
                name=name,
            )

        layers: list[LayerCache] = []
        if cache is None:
            x = over_blocks(self, block, self.depth, x, angle, positions)
        else:
            for i, layer in enumerate(cache.layers):
                x, layer = block(f"block_{i}")(x, angle, positions, layer)
                layers.append(layer)

        if only is not None:
            x = jnp.take_along_axis(x, only[:, None, None], axis=1)
        x = RMSNorm(self.norm_epsilon, self.dtype, name="norm")(x)
        head: nn.Dense | nn.Embed = embedding
        if not self.tied:
            head = nn.Dense(self.vocab_size, use_bias=False, dtype=self.dtype, name="head")
        if targets is not None:
            return _scores(head, x, targets)
        logits = _logits(head, x)
        return logits if cache is None else (logits, Cache(tuple(layers)))

    def check_length(self, length: int) -> None:
        """Raises ValueError if a text of so many tokens is longer than the context."""
        if self.context is not None and length > self.context:
            raise ValueError(
                f"a text of {length} tokens is longer than the model's context of {self.context}"
            )

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache of zeros for `batch` texts of up to `length` tokens, in the type `dtype`."""
        shape = (batch, length, self.num_kv_heads, self._head_dim)
        zeros = jnp.zeros(shape, self.dtype)
        return Cache(tuple(LayerCache(zeros, zeros) for _ in range(self.depth)))

    @property
    def _head_dim(self) -> int:
        return self.head_dim or self.width // self.num_heads


def _logits(head: nn.Dense | nn.Embed, x: jax.Array) -> jax.Array:
    """`[..., width] -> [..., vocab_size]`, float32."""
    logits = head.attend(x) if isinstance(head, nn.Embed) else head(x)
    return logits.astype(jnp.float32)


def _scores(head: nn.Dense | nn.Embed, x: jax.Array, targets: jax.Array) -> TokenScores:
    r"""Scores targets `[B, T]` by what comes before the head, `[B, T, width]`, chunk by chunk.

    The negative log-likelihood of a token is :math:`\log \sum_v e^{z_v} - z_y`, its gradient for
    the logits :math:`\mathrm{softmax}(z) - e_y`. It depends on its own row of x alone, so that the
    gradient for that row is known, but for a factor, as soon as the logits are. They are made again
    only for the gradient of a head that is trained or adapted itself.
    """

    def score(head: Any, carry: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, Any]:
        x, target = chunk
        logits, pull_back = nn.vjp(_logits, head, x, vjp_variables=False)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        total = jax.nn.logsumexp(logits, axis=-1)
        chances = jnp.exp(logits - total[:, None])
        slope = chances - jax.nn.one_hot(target, logits.shape[-1], dtype=logits.dtype)
        *_, gradient = pull_back(slope)
        correct = jnp.argmax(logits, axis=-1) == target
        return None, (TokenScores(total - chosen, correct), jax.lax.stop_gradient(gradient))

    count = targets.size
    size = min(_CHUNK, count)

    def chunked(array: jax.Array) -> jax.Array:
        padding = [(0, -count % size)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(-1, size, *array.shape[1:])

    def whole(chunks: jax.Array) -> jax.Array:
        return chunks.reshape(-1, *chunks.shape[2:])[:count]

    rows = x.reshape(count, -1)
    chunks = chunked(jax.lax.stop_gradient(rows)), chunked(targets.reshape(count))
    # Lifted by Linen, so that a head keeps its path, and with it its adapter.
    loop = nn.scan(
        nn.remat(score, prevent_cse=False),
        variable_broadcast="params",
        split_rngs={"params": False},
    )
    _, found = loop(head, None, chunks)
    scores, gradient = jax.tree.map(whole, found)
    nll = _with_gradient(scores.nll, rows, gradient)
    return TokenScores(nll.reshape(targets.shape), scores.correct.reshape(targets.shape))


@jax.custom_vjp
def _with_gradient(y: jax.Array, x: jax.Array, gradient: jax.Array) -> jax.Array:
    """y `[n]`, whose derivative for row i of x `[n, d]` is row i of `gradient`, of y_i alone.

    That is besides what y itself depends on.
    """
    return y


@jax.custom_jvp
def _times_gradient(cotangent: jax.Array, x: jax.Array, gradient: jax.Array) -> jax.Array:
    """The gradient for x, which is an argument so that its own derivative is refused, not zero."""
    return cotangent.astype(gradient.dtype)[:, None] * gradient


@_times_gradient.defjvp
def _times_gradient_jvp(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "scores of given targets have first derivatives only: for second ones take the logits"
    )


def _with_gradient_forward(
    y: jax.Array, x: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return y, (x, gradient)


def _with_gradient_backward(
    kept: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    return cotangent, _times_gradient(cotangent, *kept), None


_with_gradient.defvjp(_with_gradient_forward, _with_gradient_backward)
