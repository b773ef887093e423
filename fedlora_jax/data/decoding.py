"""From the bytes of an image file to pixels."""

import functools
import io

import numpy as np
from PIL import Image, UnidentifiedImageError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Formats that Pillow knows by name but does not decode, and PostScript, for which it starts
# Ghostscript.
_REFUSED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_BITS_PER_SAMPLE = 258  # of TIFF


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
        with opened(content) as image:
            narrow = eight_bits(image)
            converted = narrow.convert(_MODES[channels]) if channels else narrow.copy()
    except UnidentifiedImageError as error:
        raise ValueError("not an image of a format that can be read") from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise ValueError(f"an image that cannot be read: {error}") from error
    if size is not None:
        converted = converted.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(converted)
    return pixels[..., None] if pixels.ndim == 2 else pixels


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.preinit()
    Image.init()
    return tuple(name for name in Image.ID if name not in _REFUSED)


@functools.cache
def suffixes() -> frozenset[str]:
    """How the names of files end that are images, in lower case, with the dot."""
    formats = {*_formats(), "MPO"}  # which is opened as JPEG
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in formats
    )


def opened(content: bytes) -> Image.Image:
    """An image, in whatever mode it has; most is decoded when it is wanted.

    Raises:
      UnidentifiedImageError: If it is of no format that is decoded here.
    """
    return Image.open(io.BytesIO(content), formats=_formats())


def eight_bits(image: Image.Image) -> Image.Image:
    """An opened image with at most 8 bits a channel: of more the upper 8, where Pillow clips.

    Raises:
      ValueError: If its pixels are integers or floats of 32 bits, whose range nobody knows.
    """
    # What has 16 bits of grey may be opened with room for 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels of 32 bits (mode {image.mode}), of which nobody says what is black and what "
            "is white: expected 8 or 16 bits"
        )
    return image
