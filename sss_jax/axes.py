"""Axis legend and array aliases; every module uses these letters.

B batch (clips, or images where slices are flattened) · S slices · H W image space (rows, columns)
· C channels · N tokens · Q prompt points · M candidate masks · K foreground classes · T memory
slots · D feature width.

Arrays carry their axes as a suffix: ``image_BSHWC``, ``tokens_BND``, ``box_BK4``.
Points are (x, y) = (column, row) and boxes (x0, y0, x1, y1), both in pixels of the network's input.
"""

from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Int, Key

__all__ = ["Array", "Bool", "Float", "Int", "Key", "PyTree"]

PyTree = Any
