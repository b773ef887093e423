"""What happens to images between the data set and the model, on the device."""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


def normalize(images: jax.Array) -> jax.Array:
    """Maps pixels from 0 .. 255 to -1 .. 1, as the ViT releases do.

    Args:
      images: `[..., H, W, C]`, any type.

    Returns:
      float32 of the same shape.
    """
    return images.astype(jnp.float32) / 127.5 - 1.0


def random_affine(
    key: jax.Array, images: jax.Array, *, shift: float, distortion: float
) -> jax.Array:
    """Moves, turns, scales and slants each image a little, at random.

    Pixel x is read from `centre + (I + D)(x - centre) + d` by linear interpolation; what lies
    outside is the nearest pixel of the border.

    Args:
      key: Random key.
      images: Floats `[B, H, W, C]`.
      shift: The two numbers of d are uniform in `-shift .. shift`, in pixels.
      distortion: The four numbers of D are uniform in `-distortion .. distortion`.

    Returns:
      Images of the same shape.
    """
    batch, height, width, _ = images.shape
    shift_key, distortion_key = jax.random.split(key)
    shifts = jax.random.uniform(shift_key, (batch, 2), minval=-shift, maxval=shift)
    matrices = jnp.eye(2) + jax.random.uniform(
        distortion_key, (batch, 2, 2), minval=-distortion, maxval=distortion
    )
    centre = jnp.array([height - 1, width - 1]) / 2
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1)
    coordinates = jnp.einsum("bij,hwj->bihw", matrices, grid - centre)
    coordinates += (centre + shifts)[:, :, None, None]

    def sample(channel: jax.Array, at: jax.Array) -> jax.Array:
        return map_coordinates(channel, list(at), order=1, mode="nearest")

    per_channel = jax.vmap(sample, in_axes=(-1, None), out_axes=-1)
    return jax.vmap(per_channel)(images, coordinates)
