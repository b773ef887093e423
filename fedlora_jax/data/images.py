"""What happens to images between the data set and the model, on the device."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from fedlora_jax.names import lookup

# Mean and standard deviation of pixels in 0 .. 1, for all channels or for red, green and blue.
STATISTICS: dict[str, tuple[float | tuple[float, ...], float | tuple[float, ...]]] = {
    "half": (0.5, 0.5),  # of the ViT and Mixer releases: -1 .. 1
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # of torchvision's models
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def normalize(images: jax.Array, statistics: str = "half") -> jax.Array:
    """Maps pixels from 0 .. 255 to those of mean 0 and deviation 1, by published statistics.

    Args:
      images: `[..., H, W, C]`, any type.
      statistics: A name in `STATISTICS`; `'half'` gives -1 .. 1.

    Returns:
      float32 of the same shape.

    Raises:
      ValueError: If there are no such statistics, or they are of other channels.
    """
    mean, deviation = (np.asarray(x) for x in lookup(STATISTICS, statistics, "statistics"))
    if mean.shape not in ((), images.shape[-1:]):
        raise ValueError(
            f"the statistics {statistics!r} are of {len(mean)} channels, the images have "
            f"{images.shape[-1]}"
        )
    scale, shift = (x.astype(np.float32) for x in (255 * deviation, mean / deviation))
    return images.astype(jnp.float32) / scale - shift


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
