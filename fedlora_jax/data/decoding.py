"""From the bytes of an image file to pixels."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode(content: bytes, *, channels: int | None = 3, size: int | None = None) -> np.ndarray:
    """Decodes an image, and resizes it.

    Args:
      content: A file that Pillow reads: JPEG, PNG, ...
      channels: 1, 3 or 4; None for those that it has.
      size: Side of the square that the whole image is resized to, by bicubic interpolation; None
        leaves it as it is.

    Returns:
      uint8 `[H, W, channels]`.

    Raises:
      ValueError: If it is no image, or not all of one; the message says why.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            converted = image.convert(_MODES[channels]) if channels else image.copy()
    except UnidentifiedImageError as error:
        raise ValueError("not an image of a format that can be read") from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise ValueError(f"an image that cannot be read: {error}") from error
    if size is not None:
        converted = converted.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(converted)
    return pixels[..., None] if pixels.ndim == 2 else pixels
