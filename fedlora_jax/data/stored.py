"""A split of a data set whose images stay in their files until they are wanted."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Stored(NamedTuple):
    """Examples of which the images are in files.

    Attributes:
      columns: All else, arrays `[M]`, such as `label` and `domain`.
      image: Reads and decodes the image of an example, `[H, W, C]`, all of one shape and type;
        several threads may at once. Raises ValueError on a file that is no image.
    """

    columns: dict[str, np.ndarray]
    image: Callable[[int], np.ndarray]
